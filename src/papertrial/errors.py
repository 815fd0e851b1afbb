"""The one family of errors that a user caused and can mend: shown as a single line, never as a traceback."""


class PapertrialError(Exception):
    """A message for the user, and the exit code that the command line gives with it."""

    exit_code = 1


class UsageError(PapertrialError):
    """Something in the request is wrong: an unknown slug, scale, file or model."""

    exit_code = 2
