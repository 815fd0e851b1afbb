"""Papers by topic, family and organisation."""

from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response

from papertrial.feed.schema import papers, topics
from papertrial.feed.store import Store
from papertrial.lab.claim import FAMILIES
from papertrial.site.context import Here, MaybeReader
from papertrial.site.errors import not_found
from papertrial.site.listing import Selection, count, list_papers, show
from papertrial.site.pages.families import families, family_of
from papertrial.site.pages.rows import rows
from papertrial.site.pages.serving import PER_PAGE, page, with_query
from papertrial.site.people.accounts import Reader

router = APIRouter(include_in_schema=False)

#: Counting walks an index; it need not be done for every reader.
COUNT_SECONDS = 300.0
MOST = 300

Name = Annotated[str, Path(max_length=200)]
PageNumber = Annotated[int, Query(ge=0, le=300, description="page, from 0")]


@router.get("/topics")
def all_topics(request: Request, here: Here, reader: MaybeReader) -> Response:
    """Families of methods, and the categories that sources give."""

    def values() -> dict[str, Any]:
        found = here.cache.get("topics", COUNT_SECONDS, lambda: _counts(here.store, topics.c.topic))
        return {"families": families(here.board.snapshot), "categories": found}

    return page(request, reader, "topics.html.j2", values)


@router.get("/organisations")
def all_organisations(request: Request, here: Here, reader: MaybeReader) -> Response:
    """Who papers come from."""

    def values() -> dict[str, Any]:
        found = here.cache.get("organisations", COUNT_SECONDS, lambda: _counts(here.store, papers.c.organisation))
        return {"organisations": found, "most": max((number for _, number in found), default=1)}

    return page(request, reader, "organisations.html.j2", values)


def _counts(store: Store, column: sa.Column[Any]) -> list[tuple[str, int]]:
    """The values of a column with how many papers have each, the most first."""
    number = sa.func.count()
    query = sa.select(column, number).where(column.is_not(None)).group_by(column)
    with store.reading() as connection:
        found = connection.execute(query.order_by(number.desc(), column).limit(MOST)).all()
    return [(row[0], row[1]) for row in found]


@router.get("/families/{name}")
def family(request: Request, name: Name, here: Here, reader: MaybeReader, p: PageNumber = 0) -> Response:
    """The papers in scope of one family."""
    if name not in FAMILIES:
        raise not_found(f"the family {name[:60]!r}")
    return _selection(request, here, reader, Selection(family=name), name.replace("_", "-"), "family", p)


@router.get("/organisations/{name:path}")
def organisation(request: Request, name: Name, here: Here, reader: MaybeReader, p: PageNumber = 0) -> Response:
    """The papers of one organisation."""
    return _selection(request, here, reader, Selection(organisation=name), name, "organisation", p)


def _selection(
    request: Request, here: Here, reader: Reader | None, selection: Selection, heading: str, kind: str, p: int
) -> Response:
    def values() -> dict[str, Any]:
        found = list_papers(here.store, selection, limit=PER_PAGE + 1, offset=p * PER_PAGE)
        if not found and not p:
            raise not_found(f"{kind} {heading[:60]!r}")
        path = request.url.path
        return {
            "heading": heading,
            "kind": kind,
            "family": family_of(here.board.snapshot, selection.family) if selection.family else None,
            "total": here.cache.get(
                ("group", selection.family, selection.organisation),
                COUNT_SECONDS,
                lambda: count(here.store, selection),
            ),
            "rows": rows(here, reader, found[:PER_PAGE]),
            "next_page": with_query(path, p=p + 1) if len(found) > PER_PAGE and p < 300 else None,
            "previous_page": with_query(path, p=p - 1) if p else None,
        }

    return page(request, reader, "group.html.j2", values)


@router.get("/topics/{name}")
def topic(
    request: Request,
    name: Name,
    here: Here,
    reader: MaybeReader,
    cursor: Annotated[str | None, Query(max_length=400)] = None,
) -> Response:
    """The papers of one category, newest first."""

    def values() -> dict[str, Any]:
        found = here.store.topic(name, limit=PER_PAGE, cursor=cursor)
        if not found.papers and cursor is None:
            raise not_found(f"topic {name[:60]!r}")
        return {
            "heading": name,
            "kind": "topic",
            "family": None,
            "total": None,
            "rows": rows(here, reader, show(here.store, found.papers)),
            "next_page": with_query(request.url.path, cursor=found.next_cursor) if found.next_cursor else None,
            "previous_page": None,
        }

    return page(request, reader, "group.html.j2", values)
