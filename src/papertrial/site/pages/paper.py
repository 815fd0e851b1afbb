"""The page of a paper: what it is, the claim beside the evidence, what is like it, and what people say."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from papertrial.errors import PapertrialError
from papertrial.feed.records import Paper
from papertrial.site.board import Entry
from papertrial.site.context import Context, Here, MaybeReader
from papertrial.site.errors import Problem
from papertrial.site.fields import PaperName, found_paper
from papertrial.site.listing import show
from papertrial.site.pages.rows import Row, rows, rows_of_ids
from papertrial.site.pages.serving import page
from papertrial.site.pages.trial_view import TrialView, trial_view
from papertrial.site.people import collections, comments, submissions, tags
from papertrial.site.people.accounts import Reader
from papertrial.site.templating import render

router = APIRouter(include_in_schema=False)

SIMILAR = 6
SIMILAR_SECONDS = 3600.0
TRIAL_SECONDS = 3600.0


@router.get("/papers/{paper_id:paper}")
def paper(
    request: Request,
    paper_id: PaperName,
    here: Here,
    reader: MaybeReader,
    scale: Annotated[str | None, Query(max_length=20)] = None,
) -> Response:
    """One paper, with its evidence at the largest scale or at the one asked for."""
    found = found_paper(here.store, paper_id)
    return page(request, reader, "paper.html.j2", lambda: paper_values(here, reader, found, scale))


def paper_values(here: Context, reader: Reader | None, found: Paper, scale: str | None = None) -> dict[str, Any]:
    """What the page shows.

    Raises
    ------
    Problem
        404: nothing was recorded at that scale.
    """
    row = rows(here, reader, show(here.store, [found]))[0]
    own: dict[str, Any] = {"hidden": False, "collections": [], "my_tags": []}
    if reader is not None:
        own = {
            "hidden": found.id in tags.hidden_of(here.store, reader.id),
            "collections": collections.collections_of(here.store, reader.name, reader),
            "my_tags": [name for name in tags.tags_of(here.store, reader.id) if name not in row.tags],
        }
    return own | {
        "row": row,
        "paper": found,
        "trial": _trial(here, row.entry, scale),
        "similar": _similar(here, found),
        "comments": (said := comments.comments_on(here.store, found.id)),
        "older_comments": comments.older_than(here.store, found.id, said),
        "submitter": submissions.submitters(here.store, [found.id]).get(found.id),
        "draft": "",
        "problem": None,
    }


def refused(request: Request, here: Context, reader: Reader, found: Paper, draft: str, problem: str) -> Response:
    """The page again, with a comment that was not taken and why."""
    values = paper_values(here, reader, found) | {"draft": draft, "problem": problem}
    return render(request, "paper.html.j2", status=422, **values)


def _trial(here: Context, entry: Entry | None, scale: str | None) -> TrialView | None:
    if scale is not None and (entry is None or scale not in entry.standing.evidence):
        raise Problem(404, f"scale: nothing was recorded of this paper at {scale!r}", field="scale")
    if entry is None:
        return None
    key = ("trial", entry.card.slug, entry.stamp, scale)
    return here.cache.get(key, TRIAL_SECONDS, lambda: trial_view(entry, scale))


def _similar(here: Context, found: Paper) -> list[Row]:
    """The nearest papers by meaning; none while the index cannot say."""

    def ids() -> list[int]:
        text = f"{found.title}\n{found.abstract or found.summary or ''}"
        try:
            return [hit.key for hit in here.index.similar(found.id, SIMILAR, text=text).hits]
        except PapertrialError:
            return []

    return rows_of_ids(here, None, here.similar.get((found.id, found.revision), SIMILAR_SECONDS, ids))
