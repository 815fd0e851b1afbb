"""What readers do on the pages: vote, comment, tag, hide. Every form leads back to where it stood."""

from typing import Annotated

from fastapi import APIRouter, Form, Request
from pydantic import StringConstraints, TypeAdapter, ValidationError
from starlette.responses import Response

from papertrial.site.context import Here, Writer
from papertrial.site.errors import Problem
from papertrial.site.fields import PaperName, RowNumber, TagName, Text, found_paper
from papertrial.site.pages.paper import refused
from papertrial.site.pages.serving import local, see_other
from papertrial.site.people import comments, tags, votes

router = APIRouter(include_in_schema=False)

Back = Annotated[str | None, Form(max_length=2000)]
#: Papers that one form may hide.
MOST_HIDDEN = 100


@router.post("/papers/{paper_id:paper}/vote")
def vote(
    paper_id: PaperName, here: Here, reader: Writer, value: Annotated[int, Form(ge=0, le=1)], back: Back = None
) -> Response:
    """Vote for a paper (1), or take the vote back (0)."""
    paper = found_paper(here.store, paper_id)
    (votes.cast_vote if value else votes.take_vote_back)(here.store, reader, paper.id)
    return see_other(local(back, f"/papers/{paper.key}"))


@router.post("/papers/{paper_id:paper}/comments")
def comment(
    request: Request,
    paper_id: PaperName,
    here: Here,
    reader: Writer,
    body: Annotated[str, Form(max_length=20_000)] = "",
    parent: Annotated[int | None, Form(ge=1, lt=2**63)] = None,
) -> Response:
    """Comment on a paper, or reply; a comment that cannot be taken comes back with the reason."""
    paper = found_paper(here.store, paper_id)
    try:
        text = _text(body)
        added = comments.add_comment(here.store, reader, paper.id, text, parent)
    except Problem as problem:
        if problem.field != "body":
            raise
        return refused(request, here, reader, paper, body, problem.message.removeprefix("body: "))
    return see_other(f"/papers/{paper.key}#comment-{added.id}")


def _text(body: str) -> str:
    try:
        return str(TypeAdapter(Text).validate_python(body))
    except ValidationError as error:
        raise Problem(422, f"body: {error.errors()[0]['msg']}", field="body") from None


@router.post("/comments/{comment_id}/edit")
def edit_comment(
    comment_id: RowNumber,
    here: Here,
    reader: Writer,
    body: Annotated[str, Form(max_length=20_000)] = "",
    back: Back = None,
) -> Response:
    """Change one's own comment."""
    comments.edit_comment(here.store, reader, comment_id, _text(body))
    return see_other(f"{local(back)}#comment-{comment_id}")


@router.post("/comments/{comment_id}/remove")
def remove_comment(comment_id: RowNumber, here: Here, reader: Writer, back: Back = None) -> Response:
    """Remove one's own comment; administrators remove any."""
    comments.remove_comment(here.store, reader, comment_id)
    return see_other(f"{local(back)}#comments")


@router.post("/papers/{paper_id:paper}/tags")
def tag(
    paper_id: PaperName,
    here: Here,
    reader: Writer,
    name: Annotated[str, Form(max_length=200)] = "",
    back: Back = None,
) -> Response:
    """Put a tag on a paper."""
    paper = found_paper(here.store, paper_id)
    try:
        checked = TypeAdapter(TagName).validate_python(" ".join(name.split()))
    except ValidationError:
        raise Problem(422, "name: a tag has 1 to 40 characters", field="name") from None
    tags.tag(here.store, reader, paper.id, checked)
    return see_other(local(back, f"/papers/{paper.key}"))


@router.post("/papers/{paper_id:paper}/untag")
def untag(
    paper_id: PaperName,
    here: Here,
    reader: Writer,
    name: Annotated[str, Form(min_length=1, max_length=40)],
    back: Back = None,
) -> Response:
    """Take a tag off a paper."""
    paper = found_paper(here.store, paper_id)
    tags.untag(here.store, reader, paper.id, name)
    return see_other(local(back, f"/papers/{paper.key}"))


@router.post("/hidden")
def hide(
    here: Here,
    reader: Writer,
    paper: Annotated[list[Annotated[str, StringConstraints(max_length=80)]], Form(max_length=MOST_HIDDEN)],
    back: Back = None,
) -> Response:
    """Do not show some papers again."""
    tags.hide(here.store, reader, [found_paper(here.store, name).id for name in paper])
    return see_other(local(back))


@router.post("/hidden/show")
def show_again(
    here: Here, reader: Writer, paper: Annotated[str | None, Form(max_length=80)] = None, back: Back = None
) -> Response:
    """Show a paper again, or all of them."""
    chosen = None if paper is None else [found_paper(here.store, paper).id]
    tags.unhide(here.store, reader, chosen)
    return see_other(local(back, "/hidden"))
