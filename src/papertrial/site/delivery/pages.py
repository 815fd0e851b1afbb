"""Pages of delivery: ask for a digest, confirm it, see one's digests and feeds, end one.

GET shows a page and changes nothing: mail scanners open every link of a letter. Ending by POST needs no cookie and no
token of a form, because mail services send it for the reader (RFC 8058); the link itself is the proof.
"""

from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import parse_qs, unquote

from fastapi import APIRouter, Depends, Form, Path, Query, Request
from starlette.responses import PlainTextResponse, Response

from papertrial.lab.claim import FAMILIES
from papertrial.site.context import Here, MaybeReader, Writer, check_csrf, check_origin
from papertrial.site.delivery import asking, subscriptions
from papertrial.site.delivery.subscriptions import Subscription, Watch
from papertrial.site.errors import Problem
from papertrial.site.fields import RowNumber
from papertrial.site.limits import network_of
from papertrial.site.pages.serving import local, see_other
from papertrial.site.people import tags
from papertrial.site.people.accounts import Reader
from papertrial.site.syndication import addresses
from papertrial.site.templating import environment, render

router = APIRouter(include_in_schema=False)

Token = Annotated[str, Path(min_length=16, max_length=200)]


async def _anybody(request: Request, reader: MaybeReader) -> Reader | None:
    """Whoever sends a form: from our own pages, whether signed in or not."""
    if reader is not None and reader.credential == "session":
        await check_csrf(request)
    else:
        check_origin(request)
    return reader


Anybody = Annotated[Reader | None, Depends(_anybody)]


@router.get("/subscriptions")
def mine(
    request: Request,
    here: Here,
    reader: MaybeReader,
    kind: Annotated[str, Query(max_length=10)] = "feed",
    value: Annotated[str, Query(max_length=250)] = "",
    family: Annotated[str, Query(max_length=40)] = "",
) -> Response:
    """A form for a new digest; for readers who are signed in, their digests, saved searches and private feeds."""
    return _form(request, here, reader, {"kind": kind, "value": value, "family": family})


def _form(
    request: Request,
    here: Here,
    reader: Reader | None,
    given: dict[str, Any],
    *,
    status: int = 200,
    problem: Problem | None = None,
) -> Response:
    fields: dict[str, Any] = {"email": reader.email if reader else "", "kind": "feed", "value": "", "family": ""}
    fields |= {"cadence": "daily", "timezone": here.settings.timezone, "hour": 7} | given
    own = subscriptions.subscriptions_of(here.store, reader) if reader else []
    names = list(tags.tags_of(here.store, reader.id)) if reader else []
    return render(
        request,
        "subscriptions.html.j2",
        status=status,
        headers={"Cache-Control": "no-store"},
        given=fields,
        problem=problem,
        own=own,
        searches=subscriptions.searches_of(here.store, reader) if reader else [],
        tag_feeds=addresses.tag_feeds(here, reader, names) if reader else {},
        families=FAMILIES,
        public_feeds=addresses.public_feeds(),
    )


@router.post("/subscriptions")
def subscribe(
    request: Request,
    here: Here,
    reader: Anybody,
    email: Annotated[str, Form(max_length=1000)] = "",
    kind: Annotated[str, Form(max_length=100)] = "feed",
    value: Annotated[str, Form(max_length=1000)] = "",
    family: Annotated[str, Form(max_length=100)] = "",
    cadence: Annotated[str, Form(max_length=100)] = "daily",
    timezone: Annotated[str, Form(max_length=100)] = "UTC",
    hour: Annotated[int, Form()] = 7,
) -> Response:
    """Ask for a digest: the same answer to everybody, whether or not the address has it already."""
    given: dict[str, Any] = {"email": email, "kind": kind, "value": value, "family": family}
    given |= {"cadence": cadence, "timezone": timezone, "hour": hour}
    try:
        watch = subscriptions.checked_watch(kind, value, family)
        asking.subscribe(here, email, watch, cadence, timezone, hour, reader, network_of(request.scope))  # type: ignore[arg-type]
    except Problem as problem:
        if problem.field is None:
            raise
        return _form(request, here, reader, given, status=problem.status, problem=problem)
    return render(request, "subscribed.html.j2", email=email.strip(), watch=watch, state="asked", link="")


@router.get("/subscriptions/confirm/{token}")
def confirm_form(request: Request, here: Here, token: Token) -> Response:
    """What the link of the letter shows: a button. Looking confirms nothing."""
    found = subscriptions.waiting_for(here.store, token)
    if found is None:
        raise Problem(403, "this link is too old or was never sent; ask for the digest again", field="token")
    state = "confirmed" if found.state == "active" else "to-confirm"
    return _private(render(request, "subscribed.html.j2", email=found.email, watch=found.watch, state=state, link=""))


@router.post("/subscriptions/confirm/{token}")
def confirm(request: Request, here: Here, token: Token) -> Response:
    """Begin the digest. The link is the proof, so no session is needed."""
    check_origin(request)
    found = subscriptions.confirm(here.store, token)
    shown = render(request, "subscribed.html.j2", email=found.email, watch=found.watch, state="confirmed", link="")
    return _private(shown)


@router.get("/unsubscribe/{token}")
def unsubscribe_form(request: Request, here: Here, token: Token) -> Response:
    """A button that ends a digest. Looking ends nothing."""
    found = subscriptions.of_token(here.store, here.key, token)
    return _ended(request, found, "to-end" if found else "ended", f"/unsubscribe/{token}")


@router.post("/unsubscribe/{token}")
def unsubscribe(
    request: Request,
    here: Here,
    token: Token,
    one_click: Annotated[str, Form(alias="List-Unsubscribe", max_length=40)] = "",
) -> Response:
    """End a digest at once: from our page, or as one click in a mail program. A second time changes nothing."""
    found = subscriptions.of_token(here.store, here.key, token)
    if found is not None:
        subscriptions.end(here.store, found.id, found.nonce)
    if one_click == "One-Click":
        return PlainTextResponse("unsubscribed\n", headers={"Cache-Control": "no-store"})
    return _ended(request, found, "ended", "")


def _ended(request: Request, found: Subscription | None, state: str, link: str) -> Response:
    email, watch = (found.email, found.watch) if found else ("", Watch("feed"))
    return _private(render(request, "subscribed.html.j2", email=email, watch=watch, state=state, link=link))


@router.post("/subscriptions/{subscription_id}/end")
def end(here: Here, reader: Writer, subscription_id: RowNumber) -> Response:
    """End one of one's own digests."""
    found = subscriptions.own(here.store, reader, subscription_id)
    subscriptions.end(here.store, found.id, found.nonce)
    return see_other("/subscriptions")


@router.post("/saved-searches")
def save_search(
    here: Here,
    reader: Writer,
    query: Annotated[str, Form(max_length=1000)] = "",
    family: Annotated[str, Form(max_length=100)] = "",
    back: Annotated[str, Form(max_length=2000)] = "",
) -> Response:
    """Keep a search."""
    subscriptions.save_search(here.store, reader, query, family)
    return see_other(local(back, "/subscriptions#searches"))


@router.post("/saved-searches/{search_id}/forget")
def forget_search(here: Here, reader: Writer, search_id: RowNumber) -> Response:
    """Keep a search no longer."""
    subscriptions.forget_search(here.store, reader, search_id)
    return see_other("/subscriptions#searches")


@router.post("/subscriptions/renew-feeds")
def renew_feeds(here: Here, reader: Writer) -> Response:
    """Make the addresses of one's private feeds void, for new ones."""
    addresses.renew(here.store, reader.id)
    return see_other("/subscriptions#feeds")


def _private(response: Response) -> Response:
    response.headers["Cache-Control"] = "no-store"
    return response


# -- what other pages show of delivery --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Offer:
    """What can be subscribed to from a page: by mail (a watch) and in a feed reader (addresses by format)."""

    watch: Watch | None
    feeds: dict[str, str]
    mark: str


def offer(request: Request) -> Offer:
    """What the page at an address is about, as something to subscribe to."""
    path, query = request.url.path, parse_qs(request.url.query)
    first, _, rest = path.strip("/").partition("/")
    name = unquote(rest)
    if first == "verdicts":
        kept = {k: query[k][0] for k in ("family", "verdict") if query.get(k, [""])[0]}
        return Offer(None, addresses.feeds("/feeds/verdicts", **kept), "verdicts")
    if first == "topics" and name:
        return Offer(Watch("topic", name), addresses.feeds("/feeds/topic", topic=name), name)
    if first == "families" and name in FAMILIES:
        return Offer(Watch("feed", "", name), addresses.feeds("/feeds/papers", family=name), name.replace("_", "-"))
    if first == "organisations" and name:
        return Offer(None, addresses.feeds("/feeds/papers", organisation=name), name)
    if first == "tags" and name:
        return Offer(Watch("tag", name), {}, name)
    words = " ".join(query.get("q", [""])[0].split())[:250]
    if first == "search" and words:
        chosen = query.get("family", [""])[0]
        family = chosen if chosen in FAMILIES else ""
        more = {"family": family} if family else {}
        return Offer(
            Watch("search", words[:250], family), addresses.feeds("/feeds/search", q=words[:250], **more), words
        )
    return Offer(Watch("feed"), addresses.feeds("/feeds/papers"), "")


environment().globals["offer"] = offer
