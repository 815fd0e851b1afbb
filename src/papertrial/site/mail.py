"""Letters: what the service writes to people, and what carries them."""

import os
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import EmailPolicy
from email.utils import format_datetime, make_msgid
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from papertrial.errors import UsageError
from papertrial.site.settings import Settings


class _OneLine(EmailPolicy):
    """Does not fold the ``List-`` headers: some mail services read ``List-Unsubscribe`` from one line only."""

    def fold(self, name: str, value: str) -> str:
        if name.lower().startswith("list-"):
            return f"{name}: {' '.join(value.split())}{self.linesep}"
        return super().fold(name, value)

    def fold_binary(self, name: str, value: str) -> bytes:
        if name.lower().startswith("list-"):
            return self.fold(name, value).encode("ascii")
        return super().fold_binary(name, value)


@dataclass(frozen=True)
class Letter:
    """A letter to one person; ``html`` is a second form of the same text, ``headers`` come beside the usual ones."""

    to: str
    subject: str
    text: str
    html: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def message(self, settings: Settings) -> EmailMessage:
        """As a message that any mail server takes."""
        message = EmailMessage(_OneLine())
        message["From"] = Address(settings.title, addr_spec=settings.sender)
        message["To"] = self.to
        message["Subject"] = " ".join(self.subject.split())
        message["Date"] = format_datetime(datetime.now(UTC))
        if "Message-ID" not in self.headers:
            message["Message-ID"] = make_msgid(domain=urlsplit(settings.base_url).hostname or "localhost")
        message["Auto-Submitted"] = "auto-generated"
        for name, value in self.headers.items():
            message[name] = value
        message.set_content(self.text)
        if self.html is not None:
            message.add_alternative(self.html, subtype="html")
        return message


class Mailer(Protocol):
    """Carries letters. Raises PapertrialError where it cannot."""

    def send(self, letter: Letter) -> None: ...


@dataclass(frozen=True)
class FileOutbox:
    """Writes every letter to a file in the ``outbox`` of the home folder: the default, and good for trying out."""

    settings: Settings

    @property
    def folder(self) -> Path:
        return self.settings.folder / "outbox"

    def send(self, letter: Letter) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        name = f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}-{secrets.token_hex(4)}.eml"
        descriptor = os.open(self.folder / f".{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(letter.message(self.settings).as_bytes())
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(self.folder / f".{name}", self.folder / name)


def mailer_of(settings: Settings) -> Mailer:
    """The mailer that the settings ask for."""
    if settings.smtp_url is None:
        return FileOutbox(settings)
    try:
        from papertrial.site.delivery.smtp import SmtpMailer
    except ImportError:
        raise UsageError("smtp_url is set, but this installation cannot send over SMTP") from None
    return SmtpMailer(settings)  # type: ignore[no-any-return]
