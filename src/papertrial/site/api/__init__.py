"""The HTTP API: every module here with a ``router`` is part of the application."""
