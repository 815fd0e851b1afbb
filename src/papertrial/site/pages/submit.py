"""Bring a paper in by its arXiv id or address."""

from typing import Annotated

from fastapi import APIRouter, Form, Request
from starlette.responses import Response

from papertrial.site.context import Context, Here, SignedIn, Writer
from papertrial.site.errors import Problem
from papertrial.site.pages.serving import see_other
from papertrial.site.people import submissions
from papertrial.site.people.accounts import Reader
from papertrial.site.templating import render

router = APIRouter(include_in_schema=False)


@router.get("/submit")
def submit_form(request: Request, here: Here, reader: SignedIn) -> Response:
    """The form, and what became of the reader's papers."""
    return _page(request, here, reader)


def _page(
    request: Request, here: Context, reader: Reader, *, status: int = 200, url: str = "", problem: str | None = None
) -> Response:
    mine = submissions.submissions_of(here.store, reader.id)
    papers = here.store.by_ids([one.paper_id for one in mine if one.paper_id is not None])
    found = {paper.id: paper for paper in papers if paper is not None}
    return render(request, "submit.html.j2", status=status, submissions=mine, papers=found, url=url, problem=problem)


@router.post("/submit")
def submit(request: Request, here: Here, reader: Writer, url: Annotated[str, Form(max_length=2000)] = "") -> Response:
    """Take a paper in, or say why not."""
    try:
        done = submissions.submit(here.store, reader, url, today=here.today(), fetch=here.settings.fetch)
    except Problem as problem:
        if problem.field != "url":
            raise
        shown = problem.message.removeprefix("url: ")
        return _page(request, here, reader, status=problem.status, url=url[:300], problem=shown)
    paper = here.store.by_ids([done.paper_id])[0] if done.paper_id is not None else None
    return see_other(f"/papers/{paper.key}" if paper else "/submit")
