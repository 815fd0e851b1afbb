"""The one family of errors that a user caused and can mend: shown as a single line, never as a traceback."""


class PapertrialError(Exception):
    """A message for the user, and the exit code that the command line gives with it."""

    exit_code = 1


class UsageError(PapertrialError):
    """Something in the request is wrong: an unknown slug, scale, file or model."""

    exit_code = 2


def first_line(error: BaseException) -> str:
    """The first line of another library's message that says anything, or the error's name; at most 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
