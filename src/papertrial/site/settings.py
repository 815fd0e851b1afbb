"""Everything that can be set about the service, in one place: from the command line or ``PAPERTRIAL_*`` variables."""

import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from papertrial.errors import UsageError
from papertrial.home import home

Quota = Annotated[int, Field(ge=0, le=10_000_000)]


def _split(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


Category = Annotated[str, Field(pattern=r"^[a-z]+(-[a-z]+)*(\.[A-Za-z]{2}(-[a-z]+)*)?$", max_length=40)]
Categories = Annotated[tuple[Category, ...], BeforeValidator(_split), Field(max_length=20)]


def _as_addresses(value: Any) -> Any:
    """Addresses and networks of proxies, or ``*``."""
    parts = _split(value)
    if parts in (["*"], ("*",)):
        return parts
    for part in parts if isinstance(parts, list | tuple) else ():
        try:
            ipaddress.ip_network(part)
        except ValueError:
            raise ValueError(f"{str(part)[:60]!r} is not an address such as 10.0.0.7 or 10.0.0.0/8") from None
    return parts


Proxies = Annotated[tuple[str, ...], BeforeValidator(_as_addresses), Field(max_length=100)]

#: Seconds of the window that request quotas are counted in.
WINDOW_SECONDS = 300


class Settings(BaseModel):
    """The service's settings. Quotas are requests in `WINDOW_SECONDS` of one client at one worker; 0 is no limit."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    database: str | None = Field(None, description="URL of the database; default SQLite in the home folder")
    base_url: str = Field("http://127.0.0.1:8000", description="address under which readers reach the service")
    title: str = Field("Papertrial", min_length=1, max_length=60)
    timezone: str = Field("UTC", description="whose midnight ends a day of the feed")
    admin_email: str | None = Field(None, description="the administrator's e-mail address")
    sign_up: bool = Field(True, description="whether anybody may open an account")
    api_quota: Quota = 1000
    api_quota_signed_in: Quota = 5000
    page_quota: Quota = 1500
    page_quota_signed_in: Quota = 5000
    letter_quota: Quota = Field(10, description="letters an hour that one client may cause; 0 is no limit")
    session_days: int = Field(30, ge=1, le=365)
    link_minutes: int = Field(20, ge=1, le=1440, description="how long a sign-in link is good")
    ingest: bool = Field(False, description="fetch new papers in the background")
    categories: Categories = Field(("cs.CL", "cs.LG"), description="arXiv categories that are fetched, comma-separated")
    smoke_runs: bool = Field(True, description="whether account holders may start smoke runs over MCP")
    fetch: bool = Field(True, description="whether the service may go to the network at all (submissions)")
    trusted_proxies: Proxies = Field(
        ("127.0.0.1", "::1"), description="addresses of proxies in front, comma-separated: who says who the client is"
    )
    smtp_url: str | None = Field(None, description="smtp://[user:password@]host[:port], smtps:// or smtp+starttls://")
    mail_from: str | None = Field(None, description="sender of letters")
    encoder: bool = Field(True, description="search by meaning as well as by words")

    @field_validator("base_url")
    @classmethod
    def _web_address(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"{value[:80]!r} is not an http or https address")
        return value.rstrip("/")

    @field_validator("timezone")
    @classmethod
    def _known_zone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (KeyError, ValueError, OSError) as error:
            raise ValueError(f"{value[:60]!r} is not a time zone such as Europe/Berlin") from error
        return value

    @field_validator("admin_email", "mail_from")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[^@\s<>,;]{1,64}@[^@\s<>,;]{1,189}", value):
            raise ValueError(f"{value[:80]!r} is not an e-mail address")
        return value

    @property
    def folder(self) -> Path:
        """Where keys, search index, outbox and figures stand."""
        return home()

    @property
    def secure(self) -> bool:
        """Whether readers come over https, so that cookies may be bound to it."""
        return self.base_url.startswith("https://")

    @property
    def cookie_name(self) -> str:
        return "__Host-papertrial" if self.secure else "papertrial"

    @property
    def sender(self) -> str:
        return self.mail_from or f"papertrial@{urlsplit(self.base_url).hostname}"

    def url(self, path: str) -> str:
        """An absolute address on this service."""
        return f"{self.base_url}/{path.lstrip('/')}"


def read_settings(**given: Any) -> Settings:
    """Settings from what is given, else from ``PAPERTRIAL_<NAME>`` variables, else the defaults.

    Raises
    ------
    UsageError
        Naming every setting that is wrong.
    """
    values = {
        name: os.environ[f"PAPERTRIAL_{name.upper()}"]
        for name in Settings.model_fields
        if f"PAPERTRIAL_{name.upper()}" in os.environ
    }
    values |= {name: value for name, value in given.items() if value is not None}
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UsageError(f"settings: {problems}") from None
