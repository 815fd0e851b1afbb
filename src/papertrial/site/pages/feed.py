"""The feed: the newest papers, a day, a week, a month, and what is trending."""

from datetime import date
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from papertrial.errors import UsageError
from papertrial.feed.merging import COMMENT_WEIGHT, HALF_LIFE_DAYS
from papertrial.feed.paging import period_bounds
from papertrial.site.context import Context, Here, MaybeReader
from papertrial.site.errors import Problem
from papertrial.site.listing import Order, Selection, count, list_papers, neighbours, period_of
from papertrial.site.pages.families import fared
from papertrial.site.pages.rows import by_day, day_text, rows
from papertrial.site.pages.serving import PER_PAGE, page, see_other, with_query
from papertrial.site.pages.strip import strip
from papertrial.site.pages.verdicts import Line, line_of
from papertrial.site.people.accounts import Reader

router = APIRouter(include_in_schema=False)

#: Verdicts that the front page begins with.
LATEST = 4
STRIP_SECONDS = 300.0

PageNumber = Annotated[int, Query(ge=0, le=300, description="page, from 0")]


@router.get("/")
def newest(request: Request, here: Here, reader: MaybeReader, p: PageNumber = 0) -> Response:
    """The newest papers, day by day."""

    def values() -> dict[str, Any]:
        shown = _listed(here, reader, None, "votes", p, "/")
        shown["anchor"] = shown["rows"][0].paper.feed_day if shown["rows"] else here.today()
        more: dict[str, Any] = {"days": by_day(shown["rows"]), "kind": "newest", "heading": "Newest papers"}
        if not p:
            more |= {"latest": latest_verdicts(here), "fared": fared(here.board.snapshot)}
        return shown | more

    return page(request, reader, "feed.html.j2", values)


@router.get("/trending")
def trending(request: Request, here: Here, reader: MaybeReader, p: PageNumber = 0) -> Response:
    """What is voted for and discussed now."""

    def values() -> dict[str, Any]:
        shown = _listed(here, reader, None, "trending", p, "/trending")
        return shown | {
            "days": None,
            "kind": "trending",
            "heading": "Trending",
            "half_life": HALF_LIFE_DAYS,
            "comment_weight": COMMENT_WEIGHT,
        }

    return page(request, reader, "feed.html.j2", values)


@router.get("/day/{period}")
def day(request: Request, period: str, here: Here, reader: MaybeReader, p: PageNumber = 0) -> Response:
    """The papers of a day, most votes first."""
    return _period(request, here, reader, period, "day", p)


@router.get("/week/{period}")
def week(request: Request, period: str, here: Here, reader: MaybeReader, p: PageNumber = 0) -> Response:
    """The papers of an ISO week, newest day first."""
    return _period(request, here, reader, period, "week", p)


@router.get("/month/{period}")
def month(request: Request, period: str, here: Here, reader: MaybeReader, p: PageNumber = 0) -> Response:
    """The papers of a month, newest day first."""
    return _period(request, here, reader, period, "month", p)


@router.get("/papers")
def papers() -> Response:
    """All papers are the feed."""
    return see_other("/")


@router.get("/papers/date/{period}")
def papers_of_day(period: str) -> Response:
    """The address that the Hugging Face site gives a day."""
    return see_other(f"/day/{_checked(period, 'day')}")


@router.get("/papers/week/{period}")
def papers_of_week(period: str) -> Response:
    """The address that the Hugging Face site gives a week."""
    return see_other(f"/week/{_checked(period, 'week')}")


@router.get("/papers/month/{period}")
def papers_of_month(period: str) -> Response:
    """The address that the Hugging Face site gives a month."""
    return see_other(f"/month/{_checked(period, 'month')}")


def latest_verdicts(here: Context) -> list[Line]:
    """The papers whose evidence was recorded last, newest first."""
    snapshot = here.board.snapshot

    def make() -> list[Line]:
        judged = [entry for entry in snapshot if entry.headline is not None and entry.headline.effect is not None]
        judged.sort(key=lambda e: max(evidence.recorded for evidence in e.evidence.values()), reverse=True)
        return [line_of(entry) for entry in judged[:LATEST]]

    return here.cache.get(("latest-verdicts", snapshot.number), 3600.0, make)


def _period(request: Request, here: Context, reader: Reader | None, period: str, kind: str, p: int) -> Response:
    period = _checked(period, kind)

    def values() -> dict[str, Any]:
        shown = _listed(here, reader, period, "votes", p, f"/{kind}/{period}")
        earlier, later = neighbours(here.store, period)
        first, last, _ = period_bounds(period)
        return shown | {
            "days": by_day(shown["rows"]) if kind != "day" else None,
            "kind": kind,
            "heading": _heading(first, last, kind),
            "earlier": f"/{kind}/{earlier}" if earlier else None,
            "later": f"/{kind}/{later}" if later else None,
            "total": count(here.store, Selection(period=period)),
            "anchor": min(max(first, date(1950, 1, 1)), max(first, min(last, here.today()))),
            "strip": here.cache.get(
                ("strip", period, here.today()), STRIP_SECONDS, lambda: strip(here.store, period, here.today())
            ),
        }

    return page(request, reader, "feed.html.j2", values)


def _checked(period: str, kind: str) -> str:
    """A period of the kind that the address says.

    Raises
    ------
    Problem
        404: there is no such day, week or month.
    """
    try:
        first, last, whole_month = period_bounds(period)
    except UsageError as error:
        raise Problem(404, str(error), field="period") from None
    found = "month" if whole_month else "day" if first == last else "week"
    if found != kind:
        raise Problem(404, f"{period} is a {found}, not a {kind}", field="period")
    return period.upper()


def _listed(
    here: Context, reader: Reader | None, period: str | None, order: Order, p: int, path: str
) -> dict[str, Any]:
    selection = Selection(period=period, hidden_from=reader.id if reader else None)
    found = list_papers(here.store, selection, order=order, limit=PER_PAGE + 1, offset=p * PER_PAGE)
    today = here.today()
    return {
        "rows": rows(here, reader, found[:PER_PAGE]),
        "next_page": with_query(path, p=p + 1) if len(found) > PER_PAGE and p < 300 else None,
        "previous_page": with_query(path, p=p - 1) if p else None,
        "earlier": None,
        "later": None,
        "total": None,
        "latest": [],
        "fared": None,
        "strip": [],
        "anchor": today,
        "period_of": period_of,
    }


def _heading(first: date, last: date, kind: str) -> str:
    if kind == "day":
        return day_text(first)
    if kind == "month":
        return f"{first:%B %Y}"
    year, number, _ = first.isocalendar()
    return f"Week {number} of {year}: {first.day} {first:%B} to {last.day} {last:%B %Y}"
