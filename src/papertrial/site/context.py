"""What every route works with: settings, store, search index, the lab's board, and who is asking.

``context(request)`` gives the application's `Context`; routes that need to know the reader take one of the annotated
dependencies `MaybeReader`, `SignedIn`, `Writer` or `Admin`.
"""

import logging
import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from datetime import date, datetime
from functools import cached_property
from typing import Annotated
from zoneinfo import ZoneInfo

from fastapi import Depends, Request
from starlette.concurrency import run_in_threadpool

from papertrial.feed.catalogue import Found, open_index
from papertrial.feed.lexical import Filters
from papertrial.feed.search import Mode, SearchIndex, SearchResult
from papertrial.feed.store import Store
from papertrial.site import keys
from papertrial.site.board import Board
from papertrial.site.caching import Cache
from papertrial.site.errors import Problem
from papertrial.site.limits import Limiter, credential_of, is_bearer
from papertrial.site.mail import Mailer, mailer_of
from papertrial.site.page_cache import PageCache
from papertrial.site.people.accounts import Reader, reader_of_session, reader_of_token
from papertrial.site.people.recommend import Recommender
from papertrial.site.settings import Settings

log = logging.getLogger("papertrial.site")
#: How long a search waits for the index of a new catalogue.
FIRST_INDEX_SECONDS = 15.0
SAFE_METHODS = frozenset(("GET", "HEAD", "OPTIONS"))


@dataclass
class Context:
    """One per application; shared by its threads."""

    settings: Settings
    store: Store
    limiter: Limiter
    board: Board = field(default_factory=Board)
    cache: Cache = field(default_factory=Cache)
    _indexed: bool = False
    #: Answers as they are sent: large, and asked for again at once or not at all.
    bodies: Cache = field(default_factory=lambda: Cache(entries=64))
    #: Numbers of similar papers: small, many, and dear to find.
    similar: Cache = field(default_factory=lambda: Cache(entries=50_000))

    @cached_property
    def pages(self) -> PageCache:
        """The pages that are the same for everybody."""

        def version() -> Hashable:
            searched = self.index.revision if "index" in self.__dict__ else None  # opening it takes its time
            return self.store.version(), self.board.snapshot.number, self.today(), searched

        # a file is asked at once; another machine is asked by a thread, once in a while
        return PageCache(version, recheck=0.0 if self.store.is_sqlite else 1.0)

    @cached_property
    def index(self) -> SearchIndex:
        """The search index of the database."""
        encoder = "auto" if self.settings.encoder else None
        return open_index(self.store, self.settings.database, encoder)  # type: ignore[arg-type]

    @cached_property
    def recommender(self) -> Recommender:
        """Learns from tags."""
        return Recommender(self.store)

    @cached_property
    def key(self) -> bytes:
        """What the service seals its own tokens with."""
        return keys.read_key(self.settings.folder, "service")

    @cached_property
    def mailer(self) -> Mailer:
        """Sends letters."""
        return mailer_of(self.settings)

    def today(self) -> date:
        """The feed's day now, in the service's time zone."""
        return datetime.now(ZoneInfo(self.settings.timezone)).date()

    def search(
        self, query: str, limit: int = 20, *, mode: Mode = "hybrid", filters: Filters | None = None, offset: int = 0
    ) -> Found:
        """Search, and fetch the papers found, best first.

        Raises
        ------
        Problem
            503 while the index is made for the first time: to find nothing then would be untrue.
        """
        self._wait_for_first_index()
        result = self.index.search(query, limit, mode, filters, offset=offset)
        papers = self.store.by_ids([hit.key for hit in result.hits])
        kept = [(hit, paper) for hit, paper in zip(result.hits, papers, strict=True) if paper is not None]
        shown = SearchResult(tuple(hit for hit, _ in kept), result.mode, result.took_ms, result.notice)
        return Found(shown, tuple(paper for _, paper in kept), result.notice)

    def _wait_for_first_index(self) -> None:
        if self._indexed:
            return
        end = time.monotonic() + FIRST_INDEX_SECONDS
        while self.index.revision == 0 and self.store.revision() > 0:
            if time.monotonic() > end:
                message = "search is being prepared for the first time; try again in a minute"
                raise Problem(503, message, headers={"Retry-After": "30"})
            time.sleep(0.1)
        self._indexed = True

    def close(self) -> None:
        self.store.close()


def context(request: Request) -> Context:
    """The application's context."""
    return request.app.state.context  # type: ignore[no-any-return]


def reader_of(request: Request) -> Reader | None:
    """Who is asking, from the bearer token or the session cookie; looked up once a request.

    Raises
    ------
    Problem
        401 for a token of ours that is not good; a session that has ended is nobody, and so is a foreign token.
    """
    if hasattr(request.state, "reader"):
        return request.state.reader  # type: ignore[no-any-return]
    found = _look_up(request)
    request.state.reader = found
    return found


def _look_up(request: Request) -> Reader | None:
    here = context(request)
    credential = credential_of(request.headers, here.settings.cookie_name)
    if credential is None:
        return None
    bearer = is_bearer(request.headers)
    if bearer and not credential.startswith("pt_"):
        return None  # a client's token for another service: reading is open to everybody
    hashed = keys.token_hash(credential)
    found = (reader_of_token if bearer else reader_of_session)(here.store, hashed)
    if found is None:
        here.limiter.forget(hashed)
        if bearer:
            request.state.reader = None
            raise Problem(401, "this API token is not known here; make a new one on your profile page")
        return None
    here.limiter.recognise(hashed, found.id)
    return found


async def _maybe_reader(request: Request) -> Reader | None:
    if "cookie" not in request.headers and "authorization" not in request.headers:
        request.state.reader = None  # most requests: no thread, no look-up
        return None
    return await run_in_threadpool(reader_of, request)


async def _signed_in(request: Request) -> Reader:
    found = await _maybe_reader(request)
    if found is None:
        raise Problem(401, "sign in, or send an API token as a bearer token")
    return found


async def _writer(request: Request) -> Reader:
    """A reader who may change things. With a cookie, the request must come from our own pages (see `csrf_token`)."""
    found = await _signed_in(request)
    if found.credential == "token":
        if found.scope != "write":
            raise Problem(403, "this API token may read only; make one with the scope 'write'")
        return found
    await check_csrf(request)
    return found


async def _admin(request: Request) -> Reader:
    found = await _signed_in(request)
    if found.role != "admin":
        raise Problem(403, "this is for administrators")
    if request.method not in SAFE_METHODS:
        await _writer(request)
    return found


MaybeReader = Annotated[Reader | None, Depends(_maybe_reader)]
SignedIn = Annotated[Reader, Depends(_signed_in)]
Writer = Annotated[Reader, Depends(_writer)]
Admin = Annotated[Reader, Depends(_admin)]
Here = Annotated[Context, Depends(context)]


def csrf_token(request: Request) -> str:
    """What a form of this session must send back as ``csrf`` (or a script as ``X-CSRF-Token``).

    It begins with random characters that mask the rest, so that compression cannot be used to guess it. Empty for
    those who are not signed in.
    """
    here = context(request)
    session = credential_of(request.headers, here.settings.cookie_name)
    if session is None or is_bearer(request.headers):
        return ""
    mask = keys.new_token()[:16]
    return mask + keys.seal(here.key, "csrf", mask + keys.token_hash(session))


async def check_csrf(request: Request) -> None:
    """Refuse a state-changing request that another site may have made in the reader's name."""
    here = context(request)
    check_origin(request)
    session = credential_of(request.headers, here.settings.cookie_name) or ""
    given = request.headers.get("x-csrf-token", "")
    if not given and request.headers.get("content-type", "").startswith(
        ("application/x-www-form-urlencoded", "multipart/form-data")
    ):
        field_value = (await request.form()).get("csrf")
        given = field_value if isinstance(field_value, str) else ""
    if not keys.is_sealed(here.key, "csrf", given[:16] + keys.token_hash(session), given[16:]):
        raise Problem(403, "the form is too old or came from elsewhere; load the page again", field="csrf")


def check_origin(request: Request) -> None:
    """Refuse what a browser says came from another site; clients that are not browsers say nothing."""
    site = request.headers.get("sec-fetch-site")
    if site in ("cross-site", "same-site"):
        raise Problem(403, "this request came from another site")
    origin = request.headers.get("origin")
    if origin is None or site == "same-origin":
        return
    own = {context(request).settings.base_url, f"{request.url.scheme}://{request.headers.get('host', '')}"}
    if not any(origin == _origin(address) for address in own):
        raise Problem(403, "this request came from another site")


def _origin(address: str) -> str:
    return "/".join(address.split("/")[:3])
