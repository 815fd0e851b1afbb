"""A polite client: one connection, a pause between requests, patience with a server that is busy."""

import errno
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from email.utils import parsedate_to_datetime

import httpx
from filelock import FileLock, Timeout

import papertrial
from papertrial.errors import PapertrialError, UsageError
from papertrial.feed.sources import MAX_BYTES
from papertrial.home import cache_folder

logger = logging.getLogger(__name__)

#: Answers after which the same request may well succeed.
_BUSY = frozenset((408, 425, 429, 500, 502, 503, 504))


@dataclass
class PoliteClient:
    """Fetches from one service.

    Parameters
    ----------
    name
        The service, for messages and for the lock that keeps two processes from asking at once.
    interval
        Seconds between the starts of two requests, also across processes that share a home folder.
    attempts
        How often a request is tried before the fetch gives up.
    longest_wait
        Seconds; a server that asks for more patience (``Retry-After``) ends the fetch with a message.
    patience
        Seconds to wait until another fetch from the service has ended.
    sleep, clock
        For tests.
    """

    name: str
    interval: float
    attempts: int = 6
    longest_wait: float = 600.0
    timeout: float = 60.0
    patience: float = 0.0
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.time
    headers: Mapping[str, str] = field(default_factory=dict)
    _client: httpx.Client | None = None

    @contextmanager
    def session(self) -> Iterator["PoliteClient"]:
        """The one connection, held by one process at a time.

        Raises
        ------
        PapertrialError
            Another fetch is under way, and still was after `patience` seconds.
        """
        lock = FileLock(cache_folder("fetch") / f"{self.name}.lock")
        try:
            lock.acquire(timeout=self.patience, poll_interval=0.2)
        except Timeout:
            raise PapertrialError(f"another fetch from {self.name} is under way; one at a time is allowed") from None
        agent = f"papertrial/{papertrial.__version__} (self-hosted paper catalogue; python-httpx/{httpx.__version__})"
        try:
            with httpx.Client(
                headers={"User-Agent": agent, **self.headers},
                timeout=self.timeout,
                follow_redirects=True,
                max_redirects=5,
                limits=httpx.Limits(max_connections=1),
            ) as self._client:
                yield self
        finally:
            self._client = None
            lock.release()

    def get(self, url: str, params: Mapping[str, str], *, whole: Callable[[bytes], bool]) -> httpx.Response:
        """One document.

        Parameters
        ----------
        whole
            Whether a body is complete; one that is not is fetched again, and given as it is after the last attempt.

        Raises
        ------
        PapertrialError
            The service could not be reached or did not give the document in `attempts` tries.
        """
        reason, response = "", None
        for attempt in range(self.attempts):
            if attempt:
                self._wait_for_retry(attempt, reason, response)
            self._keep_interval()
            try:
                response = self._once(url, params)
            except httpx.InvalidURL as error:
                raise UsageError(f"{url!r} is not an address to fetch from: {error}") from None
            except httpx.RequestError as error:
                reason, response = f"cannot be reached at {httpx.URL(url).host}: {error or type(error).__name__}", None
                continue
            if response.status_code in _BUSY:
                reason = f"answered {response.status_code}"
            elif response.is_success and not whole(response.content):
                reason = "sent an incomplete document"
            else:
                return response
        if response is not None and response.is_success:
            return response
        raise PapertrialError(
            f"{self.name} {reason} in {self.attempts} attempts; what was fetched is stored, run again later to go on"
        )

    def _once(self, url: str, params: Mapping[str, str]) -> httpx.Response:
        if self._client is None:
            raise RuntimeError("get() belongs inside session()")
        with self._client.stream("GET", url, params=dict(params)) as response:
            body, deadline = bytearray(), time.monotonic() + self.longest_wait
            for piece in response.iter_bytes():
                body += piece
                if time.monotonic() > deadline:  # a server that sends byte by byte never runs into the time-out
                    raise httpx.ReadTimeout(f"the answer took more than {self.longest_wait:.0f} seconds")
                if len(body) > MAX_BYTES:
                    raise PapertrialError(f"{self.name} sent more than {MAX_BYTES:,} bytes; fetch in smaller slices")
            headers = [
                (k, v) for k, v in response.headers.items() if k.lower() not in ("content-encoding", "content-length")
            ]
            return httpx.Response(response.status_code, headers=headers, content=bytes(body))

    def _keep_interval(self) -> None:
        """Wait until the last request, of this process or another one, is `interval` seconds ago."""
        stamp = cache_folder("fetch") / f"{self.name}.last"
        try:
            elapsed = self.clock() - stamp.stat().st_mtime
        except FileNotFoundError:
            elapsed = self.interval
        if 0 <= elapsed < self.interval:
            self.sleep(self.interval - elapsed)
        try:
            stamp.touch()
            os.utime(stamp, (self.clock(), self.clock()))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise

    def _wait_for_retry(self, attempt: int, reason: str, response: httpx.Response | None) -> None:
        asked = _retry_after(response, self.clock()) if response is not None else None
        seconds = asked if asked is not None else min(self.interval * 2.0**attempt, 120.0)
        if seconds > self.longest_wait:
            raise PapertrialError(
                f"{self.name} {reason} and asks to wait {seconds:.0f} seconds; what was fetched is stored, "
                "run again then to go on"
            )
        logger.info("%s %s; trying again in %.0f s", self.name, reason, seconds)
        self.sleep(seconds)


def _retry_after(response: httpx.Response, now: float) -> float | None:
    """``Retry-After`` in seconds, given as such or as a date."""
    value = response.headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit() and len(value) < 10:
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).astimezone(UTC).timestamp() - now)
    except (ValueError, TypeError, OverflowError):
        return None


def utc_today() -> date:
    """Today in UTC, the zone of arXiv's and Hugging Face's days."""
    return datetime.now(UTC).date()
