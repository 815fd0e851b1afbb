"""Letters over SMTP, and what can become of one: taken, refused for good, better tried later, or nobody knows.

``smtp_url`` is ``smtp://``, ``smtps://`` (TLS from the start, port 465) or ``smtp+starttls://`` (port 587), with
``user:password@`` where the server wants it, both percent-encoded. Certificates are checked. A password is sent in the
clear to this machine only.
"""

import contextlib
import smtplib
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import SplitResult, unquote, urlsplit

from papertrial.errors import PapertrialError, UsageError
from papertrial.site.mail import Letter
from papertrial.site.settings import Settings

TIMEOUT = 30.0
_PORTS = {"smtp": 25, "smtps": 465, "smtp+starttls": 587}
_LOCAL = frozenset(("localhost", "127.0.0.1", "::1"))


class LetterRefused(PapertrialError):
    """The mail server will never take this letter for this address."""


class LetterDelayed(PapertrialError):
    """The letter surely did not go out, and may another time."""


class LetterUnclear(PapertrialError):
    """The mail server broke off when it had the letter: it may have gone out."""


@dataclass(frozen=True)
class Server:
    """A mail server, as ``smtp_url`` names it."""

    scheme: str
    host: str
    port: int
    user: str | None
    password: str | None

    @classmethod
    def of(cls, url: str) -> "Server":
        """Read an address.

        Raises
        ------
        UsageError
            Naming the setting; the address is not shown, it may hold a password.
        """
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            parts, host, port = SplitResult("", "", "", "", ""), None, None
        if parts.scheme not in _PORTS or not host or parts.path not in ("", "/") or parts.query or parts.fragment:
            raise UsageError(
                "smtp_url: is not smtp://host, smtps://host or smtp+starttls://host, with user:password@ before and "
                ":port behind the host where needed"
            )
        user = unquote(parts.username) if parts.username else None
        password = unquote(parts.password) if parts.password is not None else None
        if user and parts.scheme == "smtp" and host not in _LOCAL:
            raise UsageError("smtp_url: a password in the clear goes to this machine only; use smtp+starttls or smtps")
        return cls(parts.scheme, host, port or _PORTS[parts.scheme], user, password)


class SmtpMailer:
    """Hands each letter to one mail server, in a connection of its own."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._server = Server.of(settings.smtp_url or "")

    def send(self, letter: Letter) -> None:
        """Send a letter; when this returns, the server has taken it.

        Raises
        ------
        LetterRefused, LetterDelayed, LetterUnclear
        """
        message = letter.message(self._settings)
        with self._connection() as connection:
            try:
                _answered(connection.mail(self._settings.sender, _options(connection, len(message.as_bytes()))))
                _answered(connection.rcpt(letter.to))
            except (smtplib.SMTPException, OSError) as error:
                raise LetterDelayed(f"the mail server broke off: {_said(error)}") from error
            try:
                # From here on the server may have the letter whatever happens to the connection.
                _answered(connection.data(message.as_bytes(policy=message.policy.clone(linesep="\r\n"))))
            except smtplib.SMTPDataError as error:
                _answered((error.smtp_code, error.smtp_error if isinstance(error.smtp_error, bytes) else b""))
            except (smtplib.SMTPException, OSError) as error:
                raise LetterUnclear(f"the mail server broke off when it had the letter: {_said(error)}") from error

    @contextlib.contextmanager
    def _connection(self) -> Iterator[smtplib.SMTP]:
        server = self._server
        connection: smtplib.SMTP | None = None
        try:
            if server.scheme == "smtps":
                secure = ssl.create_default_context()
                connection = smtplib.SMTP_SSL(server.host, server.port, timeout=TIMEOUT, context=secure)
            else:
                connection = smtplib.SMTP(server.host, server.port, timeout=TIMEOUT)
            connection.ehlo_or_helo_if_needed()
            if server.scheme == "smtp+starttls":
                connection.starttls(context=ssl.create_default_context())
                connection.ehlo()
            if server.user:
                connection.login(server.user, server.password or "")
        except (smtplib.SMTPException, OSError) as error:
            if connection is not None:
                connection.close()
            raise LetterDelayed(f"the mail server {server.host} cannot be used: {_said(error)}") from error
        try:
            yield connection
        finally:
            with contextlib.suppress(smtplib.SMTPException, OSError):
                connection.quit()
            connection.close()


def _options(connection: smtplib.SMTP, size: int) -> list[str]:
    return [f"size={size}"] if connection.has_extn("size") else []


def _answered(answer: tuple[int, bytes]) -> None:
    """Turn what the server says to a command into an error, unless it agrees."""
    code, text = answer
    said = f"{code} {text.decode('utf-8', 'replace')}"[:300]
    if 500 <= code < 600:
        raise LetterRefused(f"the mail server refuses: {said}")
    if not 200 <= code < 300:
        raise LetterDelayed(f"the mail server wants to be asked later: {said}")


def _said(error: Exception) -> str:
    """What went wrong, without credentials."""
    if isinstance(error, smtplib.SMTPResponseException):
        text = error.smtp_error.decode("utf-8", "replace") if isinstance(error.smtp_error, bytes) else error.smtp_error
        return f"{error.smtp_code} {text}"[:300]
    return str(error)[:300] or type(error).__name__
