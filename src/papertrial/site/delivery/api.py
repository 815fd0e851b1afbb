"""Digests and saved searches over the API."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field, StringConstraints
from starlette.responses import Response

from papertrial.site.api.account import Strict
from papertrial.site.context import Context, Here, SignedIn, Writer
from papertrial.site.delivery import asking, subscriptions
from papertrial.site.delivery.subscriptions import Subscription
from papertrial.site.fields import RowNumber
from papertrial.site.limits import network_of
from papertrial.site.people import tags
from papertrial.site.signing_in import iso
from papertrial.site.syndication import addresses

router = APIRouter(tags=["delivery"])


class NewSubscription(Strict):
    """A digest for the reader's own address. ``value`` is the tag, the arXiv category or the query."""

    kind: Literal["feed", "tag", "topic", "search"] = "feed"
    value: Annotated[str, StringConstraints(max_length=250)] = ""
    family: Annotated[str, StringConstraints(max_length=40)] = ""
    cadence: Literal["daily", "weekly"] = "daily"
    timezone: Annotated[str, StringConstraints(min_length=1, max_length=60)] = "UTC"
    hour: Annotated[int, Field(ge=0, le=23, description="on the clock of the time zone")] = 7


class NewSearch(Strict):
    """A search to keep."""

    query: Annotated[str, StringConstraints(min_length=1, max_length=250)]
    family: Annotated[str, StringConstraints(max_length=40)] = ""


@router.get("/api/subscriptions")
def list_subscriptions(here: Here, reader: SignedIn) -> list[dict[str, Any]]:
    """The reader's digests."""
    return [_subscription(found) for found in subscriptions.subscriptions_of(here.store, reader)]


@router.post("/api/subscriptions", status_code=202)
def subscribe(request: Request, body: NewSubscription, here: Here, reader: Writer) -> dict[str, Any]:
    """Ask for a digest; a letter with a link to confirm it is sent."""
    watch = subscriptions.checked_watch(body.kind, body.value, body.family)
    network = network_of(request.scope)
    asking.subscribe(here, reader.email, watch, body.cadence, body.timezone, body.hour, reader, network)
    mine = subscriptions.subscriptions_of(here.store, reader)
    return _subscription(next(found for found in mine if found.watch == watch and found.email == reader.email))


@router.delete("/api/subscriptions/{subscription_id}", status_code=204)
def unsubscribe(subscription_id: RowNumber, here: Here, reader: Writer) -> Response:
    """End a digest."""
    found = subscriptions.own(here.store, reader, subscription_id)
    subscriptions.end(here.store, found.id, found.nonce)
    return Response(status_code=204)


@router.get("/api/searches")
def list_searches(here: Here, reader: SignedIn) -> list[dict[str, Any]]:
    """The reader's saved searches, with the addresses of their feeds."""
    return [_search(here, number, watch) for number, watch in subscriptions.searches_of(here.store, reader)]


@router.post("/api/searches", status_code=201)
def save_search(body: NewSearch, here: Here, reader: Writer) -> dict[str, Any]:
    """Keep a search."""
    number = subscriptions.save_search(here.store, reader, body.query, body.family)
    return _search(here, number, dict(subscriptions.searches_of(here.store, reader))[number])


@router.delete("/api/searches/{search_id}", status_code=204)
def forget_search(search_id: RowNumber, here: Here, reader: Writer) -> Response:
    """Keep a search no longer."""
    subscriptions.forget_search(here.store, reader, search_id)
    return Response(status_code=204)


@router.get("/api/feeds")
def list_feeds(here: Here, reader: SignedIn) -> dict[str, dict[str, str]]:
    """The private feeds of the reader's tags, by tag and format. Whoever has an address can read it."""
    found = addresses.tag_feeds(here, reader, list(tags.tags_of(here.store, reader.id)))
    return {name: _absolute(here, feeds) for name, feeds in found.items()}


def _absolute(here: Context, feeds: dict[str, str]) -> dict[str, str]:
    return {form: here.settings.url(address) for form, address in feeds.items()}


def _search(here: Context, number: int, watch: subscriptions.Watch) -> dict[str, Any]:
    more = {"family": watch.family} if watch.family else {}
    feeds = _absolute(here, addresses.feeds("/feeds/search", q=watch.value, **more))
    return {"id": number, "query": watch.value, "family": watch.family, "feeds": feeds}


def _subscription(found: Subscription) -> dict[str, Any]:
    return {
        "id": found.id,
        "email": found.email,
        "kind": found.watch.kind,
        "value": found.watch.value,
        "family": found.watch.family,
        "title": found.watch.title,
        "cadence": found.cadence,
        "timezone": found.timezone,
        "hour": found.hour,
        "state": found.state,
        "created": iso(found.created),
        "confirmed": iso(found.confirmed) if found.confirmed else None,
        "next": iso(found.next_due) if found.next_due else None,
    }
