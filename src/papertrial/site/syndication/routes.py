"""The feeds over HTTP, with ETag, Last-Modified and conditional GET (RFC 9110)."""

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime, parsedate_to_datetime
from typing import Annotated, Any, Literal
from urllib.parse import urlencode

from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response

from papertrial.feed.lexical import Filters
from papertrial.feed.store import utc_now
from papertrial.lab.claim import FAMILIES
from papertrial.site.context import Context, Here
from papertrial.site.delivery.subscriptions import Watch
from papertrial.site.delivery.watching import Pick, new_papers, picked
from papertrial.site.delivery.watching import Query as Wanted
from papertrial.site.errors import Problem
from papertrial.site.fields import checked_line
from papertrial.site.listing import Selection, list_papers
from papertrial.site.people import tags
from papertrial.site.syndication import addresses, formats
from papertrial.site.syndication.items import Feed, Item, of_pick, of_verdict, tag_uri

router = APIRouter(tags=["feeds"])

#: Items of a feed; days that a tag's feed looks back; seconds that a worker keeps a feed.
ITEMS = 50
TAG_DAYS = 14
FRESH_SECONDS = 60.0
#: Hits of a search that are looked through for papers with every word.
SEARCHED = 300

Form = Annotated[Literal["rss", "atom", "json"], Path(description="rss, atom or json")]
Family = Annotated[Literal[("", *FAMILIES)], Query(description="only this family")]  # type: ignore[valid-type]
Answer: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The feed.",
        "content": {media: {"schema": {"type": "string"}} for media in addresses.MEDIA_TYPES.values()},
    },
    304: {"description": "Not changed since."},
}


@router.get("/feeds/papers.{form}", response_class=Response, responses=Answer)
def papers_feed(
    request: Request,
    form: Form,
    here: Here,
    period: Annotated[str, Query(max_length=10, description="a day, week or month; default: the newest papers")] = "",
    family: Family = "",
    organisation: Annotated[str, Query(max_length=200)] = "",
) -> Response:
    """The daily feed: the newest papers, or those of one day, week or month."""

    def make() -> Feed:
        selection = Selection(period=period or None, family=family or None, organisation=_line(organisation) or None)
        shown = list_papers(here.store, selection, limit=ITEMS)
        found = picked(here, [one.paper for one in shown])
        named = [part for part in (period, family.replace("_", "-"), organisation) if part]
        title = f"{here.settings.title}: {', '.join(named)}" if named else f"{here.settings.title}: new papers"
        return _feed(here, request, title, "New papers, newest day first.", "/", found)

    return _answer(request, here, form, make)


@router.get("/feeds/topic.{form}", response_class=Response, responses=Answer)
def topic_feed(
    request: Request,
    form: Form,
    here: Here,
    topic: Annotated[str, Query(min_length=1, max_length=40, description="an arXiv category such as cs.CL")],
) -> Response:
    """The newest papers of one category."""

    def make() -> Feed:
        name = _line(topic)
        found = picked(here, here.store.topic(name, limit=ITEMS).papers)
        return _feed(
            here, request, f"{here.settings.title}: {name}", f"New papers in {name}.", f"/topics/{name}", found
        )

    return _answer(request, here, form, make)


@router.get("/feeds/search.{form}", response_class=Response, responses=Answer)
def search_feed(
    request: Request,
    form: Form,
    here: Here,
    q: Annotated[str, Query(min_length=1, max_length=250, description="words that all must occur")],
    family: Family = "",
) -> Response:
    """The newest papers that have every word of a search, and its quoted phrases as they stand."""

    def make() -> Feed:
        words = _line(q)
        wanted = Wanted.of(words)
        filters = Filters(families=[family] if family else None)
        found = here.search(words, SEARCHED, mode="lexical", filters=filters).papers
        newest = sorted(filter(wanted.finds, found), key=lambda paper: (paper.feed_day, paper.id), reverse=True)
        title, page = f"{here.settings.title}: {words}", f"/search?{urlencode({'q': words})}"
        return _feed(here, request, title, f"New papers about {words}.", page, picked(here, newest[:ITEMS]))

    return _answer(request, here, form, make)


@router.get("/feeds/verdicts.{form}", response_class=Response, responses=Answer)
def verdicts_feed(
    request: Request,
    form: Form,
    here: Here,
    family: Family = "",
    verdict: Annotated[Literal["", "upheld", "contradicted", "undecided"], Query()] = "",
) -> Response:
    """The newest verdicts on headline claims."""

    def make() -> Feed:
        chosen = [e for e in here.board.snapshot if family in ("", e.card.family)]
        items = [item for entry in chosen if (item := of_verdict(here, entry)) is not None]
        if verdict:
            items = [item for item in items if item.verdict and item.verdict["verdict"] == verdict]
        items.sort(key=lambda item: (item.updated, item.id), reverse=True)
        title = f"{here.settings.title}: verdicts"
        text = "Claims of papers, as recorded trials have judged them."
        return _of_items(here, request, title, text, "/verdicts", items[:ITEMS])

    return _answer(request, here, form, make)


@router.get("/feeds/tags/{feed_key}/{tag}.{form}", response_class=Response, responses=Answer)
def tag_feed(
    request: Request,
    feed_key: Annotated[str, Path(max_length=80, description="what makes the address private")],
    tag: Annotated[str, Path(max_length=40)],
    form: Form,
    here: Here,
) -> Response:
    """New papers like those under a reader's tag. The address is private: it is all that is asked for."""
    user_id = addresses.owner_of(here, feed_key)
    if tag not in tags.tags_of(here.store, user_id):
        raise Problem(404, f"there are no papers under the tag {tag[:40]!r}", field="tag")

    def make() -> Feed:
        until = utc_now()
        watch = Watch("tag", tag)
        found = new_papers(here, watch, until - timedelta(days=TAG_DAYS), until, user_id=user_id)
        newest = sorted(found[:ITEMS], key=lambda pick: (pick.paper.first_seen, pick.paper.id), reverse=True)
        title = f"{here.settings.title}: {watch.title}"
        return _feed(here, request, title, f"New {watch.title}.", "/recommendations", newest)

    return _answer(request, here, form, make, private=True)


def _line(text: str) -> str:
    try:
        return checked_line(text)
    except ValueError as error:
        raise Problem(400, f"a parameter {error}") from None


def _feed(here: Context, request: Request, title: str, text: str, page: str, found: list[Pick]) -> Feed:
    return _of_items(here, request, title, text, page, [of_pick(here, pick) for pick in found])


def _of_items(here: Context, request: Request, title: str, text: str, page: str, items: list[Item]) -> Feed:
    target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    same_in_all_formats = f"{request.url.path.rsplit('.', 1)[0]}?{request.url.query}"
    name = hashlib.sha256(same_in_all_formats.encode("utf-8", "replace")).hexdigest()[:16]
    address = here.settings.url(target)
    return Feed(title, text, here.settings.url(page), address, tag_uri(here, f"feeds/{name}"), items)


def _answer(request: Request, here: Context, form: str, make: Callable[[], Feed], *, private: bool = False) -> Response:
    """A feed, or 304 where the client has it: by its ETag if it sends one, else by its date."""

    def written() -> tuple[bytes, str, datetime]:
        feed = make()
        body = formats.written(feed, form)
        return body, f'W/"{hashlib.sha256(body).hexdigest()[:24]}"', feed.changed.replace(microsecond=0)

    if request.url.query or private:  # there are any number of these: none is worth keeping
        body, tag, changed = written()
    else:
        body, tag, changed = here.bodies.get(("feed", request.url.path), FRESH_SECONDS, written)
    headers = {
        "ETag": tag,
        "Last-Modified": format_datetime(changed, usegmt=True),
        "Cache-Control": f"{'private' if private else 'public'}, max-age=300",
        "X-Robots-Tag": "noindex",
    }
    if not private:
        headers |= {"Access-Control-Allow-Origin": "*", "Cross-Origin-Resource-Policy": "cross-origin"}
    if is_current(request, tag, changed):
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers, media_type=f"{addresses.MEDIA_TYPES[form]}; charset=utf-8")


def is_current(request: Request, tag: str, changed: datetime) -> bool:
    """Whether a client's copy still holds. An ETag decides alone: it also sees what no date shows."""
    given = request.headers.get("if-none-match")
    if given is not None:
        sent = [part.strip().removeprefix("W/") for part in given.split(",")]
        return "*" in sent or tag.removeprefix("W/") in sent
    try:
        since = parsedate_to_datetime(request.headers.get("if-modified-since", ""))
    except (ValueError, TypeError):
        return False
    return changed <= (since if since.tzinfo else since.replace(tzinfo=UTC))
