"""A reader's own papers: by tag, voted for, hidden, and what is recommended, with the words that say why."""

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response

from papertrial.site.context import Here, SignedIn
from papertrial.site.errors import Problem
from papertrial.site.pages.rows import explained, rows_of_ids
from papertrial.site.people import tags, votes
from papertrial.site.templating import render

router = APIRouter(include_in_schema=False)

MOST = 200
RECOMMENDED = 20


@router.get("/tags")
def all_tags(request: Request, here: Here, reader: SignedIn) -> Response:
    """The reader's tags."""
    return render(request, "tags.html.j2", tags=tags.tags_of(here.store, reader.id))


@router.get("/tags/{name:path}")
def one_tag(request: Request, name: Annotated[str, Path(max_length=40)], here: Here, reader: SignedIn) -> Response:
    """The papers under one tag."""
    found = tags.tagged(here.store, reader.id, name, MOST)
    if not found:
        raise Problem(404, f"you have no papers under the tag {name!r}", field="tag")
    return render(request, "shelf.html.j2", **_shelf(f"Tag: {name}", rows_of_ids(here, reader, found), tag=name))


@router.get("/votes")
def voted(request: Request, here: Here, reader: SignedIn) -> Response:
    """The papers that the reader voted for."""
    found = rows_of_ids(here, reader, votes.votes_of(here.store, reader.id, MOST))
    return render(request, "shelf.html.j2", **_shelf("Voted for", found))


@router.get("/hidden")
def hidden(request: Request, here: Here, reader: SignedIn) -> Response:
    """The papers that the reader hid."""
    ids = tags.hidden_of(here.store, reader.id)
    found = rows_of_ids(here, reader, ids[:MOST])
    return render(request, "shelf.html.j2", **_shelf("Hidden papers", found, hidden=len(ids)))


def _shelf(heading: str, found: list[Any], tag: str | None = None, hidden: int | None = None) -> dict[str, Any]:
    return {"heading": heading, "rows": found, "tag": tag, "hidden": hidden}


@router.get("/recommendations")
def recommendations(
    request: Request, here: Here, reader: SignedIn, tag: Annotated[str, Query(max_length=40)] = ""
) -> Response:
    """Papers like those that the reader tagged."""
    mine = tags.tags_of(here.store, reader.id)
    if tag and tag not in mine:
        raise Problem(404, f"you have no papers under the tag {tag!r}", field="tag")
    learned = tags.tagged(here.store, reader.id, tag or None)
    found = here.recommender.recommend(learned, limit=RECOMMENDED, leave_out=tags.hidden_of(here.store, reader.id))
    shown = rows_of_ids(here, reader, [item.paper_id for item in found.items])
    return render(
        request,
        "recommendations.html.j2",
        rows=explained(shown, {item.paper_id: item.words for item in found.items}),
        words=[word for word in found.words if word[1] > 0],
        against=[word for word in found.words if word[1] < 0],
        learned_from=found.learned_from,
        tags=mine,
        tag=tag,
    )
