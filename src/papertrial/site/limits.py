"""Request quotas, counted in memory by each worker in fixed windows, with the headers that clients parse.

Actions that cost others something (letters, votes, comments, submissions) have limits of their own, counted in the
database and so shared by all workers: see `papertrial.site.people.bounds`.
"""

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.types import Scope

from papertrial.site.keys import token_hash
from papertrial.site.settings import WINDOW_SECONDS, Settings

_MOST_CLIENTS = 200_000
_MOST_READERS = 50_000
_FREE = ("/static/", "/health", "/favicon")


@dataclass(frozen=True, slots=True)
class Quota:
    """Whether a request may pass, and what is left."""

    allowed: bool
    message: str = ""
    headers: dict[str, str] = field(default_factory=dict)


_UNLIMITED = Quota(True)


class Limiter:
    """Counts requests by client: by account where the credentials are known to be good, else by network address."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.time) -> None:
        self._quotas = {
            ("api", False): settings.api_quota,
            ("api", True): settings.api_quota_signed_in,
            ("pages", False): settings.page_quota,
            ("pages", True): settings.page_quota_signed_in,
        }
        self._cookie = settings.cookie_name
        self._clock = clock
        self._window = -1
        self._counts: dict[tuple[str, str], int] = {}
        self._readers: OrderedDict[str, int] = OrderedDict()

    def recognise(self, credential_hash: str, user_id: int) -> None:
        """Remember that a credential belongs to an account: from now on it has the account's quota."""
        self._readers[credential_hash] = user_id
        self._readers.move_to_end(credential_hash)
        while len(self._readers) > _MOST_READERS:
            self._readers.popitem(last=False)

    def forget(self, credential_hash: str) -> None:
        """A credential is no longer good."""
        self._readers.pop(credential_hash, None)

    def count(self, scope: Scope, headers: Headers) -> Quota:
        """Count one request."""
        path = scope["path"]
        if path.startswith(_FREE):
            return _UNLIMITED
        bucket = "api" if path.startswith(("/api/", "/mcp")) else "pages"
        user = self._reader(headers)
        most = self._quotas[bucket, user is not None]
        if not most:
            return _UNLIMITED
        now = self._clock()
        window = int(now // WINDOW_SECONDS)
        if window != self._window or len(self._counts) > _MOST_CLIENTS:
            self._window, self._counts = window, {}
        client = f"user {user}" if user is not None else network_of(scope)
        used = self._counts[bucket, client] = self._counts.get((bucket, client), 0) + 1
        left, reset = max(0, most - used), int((window + 1) * WINDOW_SECONDS - now) + 1
        shown = {
            "RateLimit": f'"{bucket}";r={left};t={reset}',
            "RateLimit-Policy": f'"fixed window";"{bucket}";q={most};w={WINDOW_SECONDS}',
        }
        if used <= most:
            return Quota(True, headers=shown)
        message = f"more than {most:,} requests in {WINDOW_SECONDS // 60} minutes; go on in {reset} seconds"
        return Quota(False, message, shown | {"Retry-After": str(reset)})

    def _reader(self, headers: Headers) -> int | None:
        if not self._readers:
            return None
        credential = credential_of(headers, self._cookie)
        return self._readers.get(token_hash(credential)) if credential else None


def is_bearer(headers: Headers) -> bool:
    """Whether a request carries a bearer token. Other ``Authorization`` is for a proxy in front (HTTP Basic)."""
    return headers.get("authorization", "")[:7].lower() == "bearer "


def credential_of(headers: Headers, cookie_name: str) -> str | None:
    """The bearer token of a request, else the session in its cookie."""
    if is_bearer(headers):
        return headers["authorization"][7:].strip()[:500] or None
    for part in headers.get("cookie", "").split(";"):
        name, _, value = part.strip().partition("=")
        if name == cookie_name:
            return value[:500] or None
    return None


def network_of(scope: Scope) -> str:
    """The client's address; of IPv6 the /64, which is what one subscriber gets."""
    client = scope.get("client")
    host = client[0] if client else ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "unknown"
    if address.version == 6:
        return str(ipaddress.ip_network((address, 64), strict=False).network_address)
    return host
