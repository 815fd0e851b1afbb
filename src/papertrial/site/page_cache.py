"""Pages that are the same for everybody, kept packed, and answered before routing where nothing has changed since.

A page is kept with the version of what it was made from (`Store.version` and what else it shows). It is good for
`GRACE` seconds whatever happens, so that a service that is written to all the time makes a page at most every few
seconds; after that for as long as nothing was written, and `LONGEST` seconds at most, should something be written past
`Store.writing`.
"""

import asyncio
import gzip
import hashlib
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

GRACE = 2.0
LONGEST = 600.0
#: Memory for pages in each worker.
MOST_BYTES = 64_000_000
#: Of zlib: a third of the time of the usual 6 for pages that are some 5 % longer.
LEVEL = 3

#: What is made in turn: addresses that read the catalogue and wait for nothing (no letter, no figure, no encoder).
_IN_TURN = re.compile(
    r"/(?:trending|verdicts|(?:topics|organisations|families|day|week|month|papers)(?:/[^/]+)?"
    r"|api/daily_papers|api/papers/(?!search$)[^/]+)?"
)

Key = tuple[str, bytes]
Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Kept:
    """A page as it is sent, with what it was made from."""

    packed: bytes
    tag: str
    version: Hashable
    made: float

    @classmethod
    def of(cls, text: str, version: Hashable, made: float) -> "Kept":
        content = text.encode()
        tag = f'W/"{hashlib.sha256(content).hexdigest()[:20]}"'
        return cls(gzip.compress(content, LEVEL, mtime=0), tag, version, made)

    def answer(self, wanted_tags: str, accepts_gzip: bool) -> tuple[int, Headers, bytes]:
        """Status, headers and body for a client; 304 where it has this page already."""
        headers = [
            (b"etag", self.tag.encode()),
            (b"cache-control", b"public, no-cache"),
            (b"vary", b"Accept-Encoding"),
        ]
        if wanted_tags and self.tag in [given.strip() for given in wanted_tags.split(",")]:
            return 304, headers, b""
        body = self.packed if accepts_gzip else gzip.decompress(self.packed)
        headers += [(b"content-type", b"text/html; charset=utf-8"), (b"content-length", str(len(body)).encode())]
        if accepts_gzip:
            headers.append((b"content-encoding", b"gzip"))
        return 200, headers, body


class PageCache:
    """The pages of one worker; the least recently used go first.

    Parameters
    ----------
    version
        What there is to be seen now, as something that compares equal while nothing changes.
    recheck
        Seconds for which a version that was looked up is believed. 0 where asking costs next to nothing; else `look`,
        which must not wait, knows nothing when they are over, until `make` has asked again.
    """

    def __init__(
        self,
        version: Callable[[], Hashable],
        recheck: float = 0.0,
        most_bytes: int = MOST_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._version, self._recheck, self._most, self._clock = version, recheck, most_bytes, clock
        self._lock = threading.Lock()
        self._pages: OrderedDict[Key, Kept] = OrderedDict()
        self._bytes = 0
        self._seen: tuple[float, Hashable] | None = None

    def look(self, key: Key) -> Kept | None:
        """A page that is still good; None where there is none or nobody can say without waiting."""
        now = self._clock()
        held = self._pages.get(key)
        if held is None or now - held.made >= LONGEST:
            return None
        if now - held.made >= GRACE:
            if self._recheck and (self._seen is None or now - self._seen[0] >= self._recheck):
                return None
            if held.version != (self._seen[1] if self._recheck and self._seen else self._version()):
                return None
        with self._lock:
            if key in self._pages:
                self._pages.move_to_end(key)
        return held

    def make(self, key: Key, text: Callable[[], str]) -> Kept:
        """A page that is still good, else a new one from its text."""
        now = self._clock()
        version = self._version()  # before the text: what is written meanwhile makes the page old, not wrong
        self._seen = now, version
        held = self.look(key)
        if held is not None:
            return held
        made = Kept.of(text(), version, now)
        with self._lock:
            self._drop(key)
            self._pages[key] = made
            self._bytes += len(made.packed)
            while self._bytes > self._most:
                self._drop(next(iter(self._pages)))
        return made

    def clear(self) -> None:
        """Forget every page."""
        with self._lock:
            self._pages.clear()
            self._bytes = 0

    def _drop(self, key: Key) -> None:
        old = self._pages.pop(key, None)
        if old is not None:
            self._bytes -= len(old.packed)


class KeptPages:
    """Answers readers who are not signed in from the cache, ahead of everything that is slower; makes pages in turn.

    Making a page is work for the processor, and Python lets one thread work at a time. Threads that make pages side by
    side, or wait for each other, spend three times the processor time on taking turns; so the others wait here, where
    waiting costs nothing, and find that somebody before them may have made what they want.

    Parameters
    ----------
    at_once
        Pages in the making at once. 1 where the database is in this process; some more where it is waited for.
    """

    def __init__(self, app: ASGIApp, pages: PageCache, at_once: int = 1) -> None:
        self.app, self.pages = app, pages
        self._turns = asyncio.Semaphore(at_once)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "GET":
            await self.app(scope, receive, send)
            return
        if await self._answered(scope, send):
            return
        if not _IN_TURN.fullmatch(scope["path"]):
            await self.app(scope, receive, send)
            return
        made: list[Message] = []

        async def keep(message: Message) -> None:
            made.append(message)  # a client that reads slowly must not hold the turn

        async with self._turns:
            if not await self._answered(scope, keep):
                await self.app(scope, receive, keep)
        for message in made:
            await send(message)

    async def _answered(self, scope: Scope, send: Send) -> bool:
        given = {b"accept-encoding": b"", b"if-none-match": b""}
        for name, value in scope["headers"]:
            if name in (b"cookie", b"authorization"):
                return False
            if name in given:
                given[name] = value
        kept = self.pages.look((scope["path"], scope["query_string"]))
        if kept is None:
            return False
        tags = given[b"if-none-match"].decode("latin-1")
        status, headers, body = kept.answer(tags, b"gzip" in given[b"accept-encoding"])
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
        return True
