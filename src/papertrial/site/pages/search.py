"""Search with filters; the same address gives the results alone for search as you type."""

from datetime import date
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from papertrial.feed.lexical import Filters
from papertrial.lab.claim import FAMILIES
from papertrial.site.context import Context, Here, MaybeReader
from papertrial.site.errors import Problem
from papertrial.site.fields import Query250
from papertrial.site.listing import show
from papertrial.site.pages.rows import rows, searched
from papertrial.site.pages.serving import page, with_query
from papertrial.site.people.accounts import Reader

router = APIRouter(include_in_schema=False)

PER_PAGE = 20
LAST_PAGE = 40
VERDICTS = ("upheld", "contradicted", "undecided", "none")

Choice = Annotated[str, Query(max_length=40)]


@router.get("/search")
def search(
    request: Request,
    here: Here,
    reader: MaybeReader,
    q: Query250 = None,
    family: Choice = "",
    verdict: Choice = "",
    since: Choice = "",
    until: Choice = "",
    p: Annotated[int, Query(ge=0, le=LAST_PAGE)] = 0,
) -> Response:
    """Papers that fit the words, narrowed down by family, verdict and date."""
    if family and family not in FAMILIES:
        raise Problem(400, f"family: {family!r} is not one of {', '.join(FAMILIES)}", field="family")
    if verdict and verdict not in VERDICTS:
        raise Problem(400, f"verdict: {verdict!r} is not one of {', '.join(VERDICTS)}", field="verdict")
    first, last = _day(since, "since"), _day(until, "until")
    if first and last and last < first:
        raise Problem(400, f"until: {until} lies before since, {since}", field="until")
    chosen = {"q": (q or "").strip(), "family": family, "verdict": verdict, "since": since, "until": until}

    def values() -> dict[str, Any]:
        keys = _with_verdict(here, verdict) if verdict else None
        filters = Filters(families=[family] if family else None, since=first, until=last, keys=keys)
        return {
            "chosen": chosen,
            "families": FAMILIES,
            "verdict_words": VERDICTS,
            **_found(here, reader, chosen, filters, p),
        }

    return page(request, reader, "search.html.j2", values)


def _day(text: str, field: str) -> date | None:
    if not text:
        return None
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise Problem(400, f"{field}: {text!r} is not a day; write YYYY-MM-DD", field=field) from None


def _with_verdict(here: Context, verdict: str) -> list[int]:
    """The papers whose headline claim has a verdict; ``none`` are those in scope that have no evidence yet."""
    snapshot = here.board.snapshot

    def make() -> list[int]:
        wanted = []
        for paper in here.store.in_scope():
            entry = snapshot.get(paper.slug)
            word = entry.headline.word if entry and entry.headline else "none"
            if word == verdict:
                wanted.append(paper.id)
        return wanted

    return here.cache.get(("with-verdict", verdict, snapshot.number), 30.0, make)


def _found(here: Context, reader: Reader | None, chosen: dict[str, str], filters: Filters, p: int) -> dict[str, Any]:
    narrowed = {name: value for name, value in chosen.items() if name != "q" and value}
    empty: dict[str, Any] = {"rows": [], "next_page": None, "previous_page": None, "notice": None, "took_ms": None}
    if chosen["q"]:
        found = here.search(chosen["q"], PER_PAGE + 1, filters=filters, offset=p * PER_PAGE)
        papers, notice, took = found.papers, found.notice, found.result.took_ms
    elif narrowed and filters.keys is not None:
        papers, notice, took = tuple(_by_date(here, filters)[p * PER_PAGE : (p + 1) * PER_PAGE + 1]), None, None
    elif narrowed:
        family = next(iter(filters.families)) if filters.families else None
        # Deep pages of a filter without words are rare; the cursor of the store would need one request a page.
        listed = here.store.listing(
            limit=(p + 1) * PER_PAGE + 1, family=family, since=filters.since, until=filters.until
        )
        papers, notice, took = listed.papers[p * PER_PAGE :], None, None
    else:
        return empty
    more = len(papers) > PER_PAGE and p < LAST_PAGE
    return {
        "rows": searched(rows(here, reader, show(here.store, papers[:PER_PAGE])), chosen["q"]),
        "next_page": with_query("/search", **chosen, p=p + 1) if more else None,
        "previous_page": with_query("/search", **chosen, p=p - 1) if p else None,
        "notice": notice,
        "took_ms": took,
    }


def _by_date(here: Context, filters: Filters) -> list[Any]:
    """Papers with a verdict, without words to search for: newest first."""
    found = [paper for paper in here.store.by_ids(list(filters.keys or ())) if paper is not None]
    kept = [
        paper
        for paper in found
        if (not filters.families or paper.family in filters.families)
        and (filters.since is None or paper.feed_day >= filters.since)
        and (filters.until is None or paper.feed_day <= filters.until)
    ]
    return sorted(kept, key=lambda paper: (paper.feed_day, paper.id), reverse=True)
