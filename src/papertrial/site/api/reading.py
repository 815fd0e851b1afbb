"""What readers do with papers, over the API: votes, comments, tags, hiding, submissions, recommendations."""

from typing import Annotated, Any

from fastapi import APIRouter, Body, Query
from pydantic import StringConstraints
from starlette.responses import JSONResponse, Response

from papertrial.site.api import shapes
from papertrial.site.api.account import Strict
from papertrial.site.context import Context, Here, SignedIn, Writer
from papertrial.site.errors import Problem
from papertrial.site.fields import Limit, PaperName, RowNumber, TagName, Text, found_paper
from papertrial.site.listing import show
from papertrial.site.people import comments, submissions, tags, votes
from papertrial.site.people.comments import MAX_BODY, Comment
from papertrial.site.signing_in import iso

router = APIRouter(tags=["reading"])

Before = Annotated[int | None, Query(ge=1, lt=2**63, description="only comments older than the one with this id")]
TagPath = Annotated[str, StringConstraints(min_length=1, max_length=40)]


class NewComment(Strict):
    """A comment in Markdown; ``parent`` is the comment that it replies to."""

    body: Annotated[Text, StringConstraints(min_length=1, max_length=MAX_BODY)]
    parent: Annotated[int, Body(ge=1, lt=2**63)] | None = None


class EditedComment(Strict):
    body: Annotated[Text, StringConstraints(min_length=1, max_length=MAX_BODY)]


class Submitted(Strict):
    """An arXiv id, or an address that holds one."""

    url: Annotated[str, StringConstraints(min_length=1, max_length=300)]


# -- votes ------------------------------------------------------------------------------------------------------------


@router.put("/api/papers/{paper_id:paper}/vote")
def vote(paper_id: PaperName, here: Here, reader: Writer) -> dict[str, Any]:
    """Vote for a paper."""
    paper = found_paper(here.store, paper_id)
    votes.cast_vote(here.store, reader, paper.id)
    return {"id": paper.key, "voted": True, "upvotes": show(here.store, [paper])[0].upvotes}


@router.delete("/api/papers/{paper_id:paper}/vote")
def take_vote_back(paper_id: PaperName, here: Here, reader: Writer) -> dict[str, Any]:
    """Take a vote back."""
    paper = found_paper(here.store, paper_id)
    votes.take_vote_back(here.store, reader, paper.id)
    return {"id": paper.key, "voted": False, "upvotes": show(here.store, [paper])[0].upvotes}


# -- comments ---------------------------------------------------------------------------------------------------------


@router.get("/api/papers/{paper_id:paper}/comments")
def list_comments(paper_id: PaperName, here: Here, response: Response, before: Before = None) -> list[dict[str, Any]]:
    """The newest 500 comments on a paper, each with its replies behind it.

    ``X-Older-Comments`` says how many there are before; ask for them with ``before``, the lowest id of this answer.
    """
    paper = found_paper(here.store, paper_id)
    found = comments.comments_on(here.store, paper.id, before=before)
    response.headers["X-Older-Comments"] = str(comments.older_than(here.store, paper.id, found))
    return [_comment(comment) for comment in found]


@router.post("/api/papers/{paper_id:paper}/comments", status_code=201)
def add_comment(paper_id: PaperName, body: NewComment, here: Here, reader: Writer) -> dict[str, Any]:
    """Comment on a paper, or reply to a comment."""
    paper = found_paper(here.store, paper_id)
    return _comment(comments.add_comment(here.store, reader, paper.id, body.body, body.parent))


@router.patch("/api/comments/{comment_id}")
def edit_comment(comment_id: RowNumber, body: EditedComment, here: Here, reader: Writer) -> dict[str, Any]:
    """Change one's own comment, for an hour after it was written."""
    return _comment(comments.edit_comment(here.store, reader, comment_id, body.body))


@router.delete("/api/comments/{comment_id}", status_code=204)
def remove_comment(comment_id: RowNumber, here: Here, reader: Writer) -> Response:
    """Remove one's own comment; administrators remove any."""
    comments.remove_comment(here.store, reader, comment_id)
    return Response(status_code=204)


def _comment(comment: Comment) -> dict[str, Any]:
    return {
        "id": comment.id,
        "author": None if comment.removed else comment.author,
        "author_name": None if comment.removed else comment.author_name,
        "parent": comment.parent_id,
        "body": comment.body,
        "html": comment.html,
        "created": iso(comment.created),
        "edited": iso(comment.edited) if comment.edited else None,
        "removed": comment.removed,
    }


# -- tags and hiding --------------------------------------------------------------------------------------------------


@router.get("/api/tags")
def list_tags(here: Here, reader: SignedIn) -> dict[str, int]:
    """The reader's tags, with how many papers each has."""
    return tags.tags_of(here.store, reader.id)


@router.get("/api/tags/{name}")
def tagged_papers(name: TagPath, here: Here, reader: SignedIn, limit: Limit = 50) -> JSONResponse:
    """The papers under one of the reader's tags, newest first."""
    ids = tags.tagged(here.store, reader.id, name, limit)
    return _papers(here, ids)


@router.put("/api/papers/{paper_id:paper}/tags/{name}")
def tag(paper_id: PaperName, name: TagPath, here: Here, reader: Writer) -> dict[str, Any]:
    """Put a tag on a paper."""
    paper = found_paper(here.store, paper_id)
    tags.tag(here.store, reader, paper.id, _tag_name(name))
    return {"id": paper.key, "tags": tags.tags_on(here.store, reader.id, [paper.id]).get(paper.id, [])}


@router.delete("/api/papers/{paper_id:paper}/tags/{name}")
def untag(paper_id: PaperName, name: TagPath, here: Here, reader: Writer) -> dict[str, Any]:
    """Take a tag off a paper."""
    paper = found_paper(here.store, paper_id)
    tags.untag(here.store, reader, paper.id, name)
    return {"id": paper.key, "tags": tags.tags_on(here.store, reader.id, [paper.id]).get(paper.id, [])}


@router.put("/api/papers/{paper_id:paper}/hidden", status_code=204)
def hide(paper_id: PaperName, here: Here, reader: Writer) -> Response:
    """Do not show a paper in the reader's lists again."""
    tags.hide(here.store, reader, [found_paper(here.store, paper_id).id])
    return Response(status_code=204)


@router.delete("/api/papers/{paper_id:paper}/hidden", status_code=204)
def unhide(paper_id: PaperName, here: Here, reader: Writer) -> Response:
    """Show a paper again."""
    tags.unhide(here.store, reader, [found_paper(here.store, paper_id).id])
    return Response(status_code=204)


def _tag_name(name: str) -> str:
    from pydantic import TypeAdapter, ValidationError

    try:
        return str(TypeAdapter(TagName).validate_python(name))
    except ValidationError as error:
        raise Problem(422, f"name: {error.errors()[0]['msg']}", field="name") from None


# -- submissions and recommendations ----------------------------------------------------------------------------------


@router.get("/api/submissions")
def list_submissions(here: Here, reader: SignedIn) -> list[dict[str, Any]]:
    """What the reader brought in, newest first."""
    return [_submission(submission) for submission in submissions.submissions_of(here.store, reader.id)]


@router.post("/api/submissions", status_code=202)
def submit(body: Submitted, here: Here, reader: Writer) -> dict[str, Any]:
    """Bring a paper into the daily feed, by its arXiv id or an address that holds one."""
    return _submission(submissions.submit(here.store, reader, body.url, today=here.today(), fetch=here.settings.fetch))


def _submission(submission: submissions.Submission) -> dict[str, Any]:
    return {
        "id": submission.id,
        "arxiv": submission.arxiv_id,
        "state": submission.state,
        "message": submission.message,
        "created": iso(submission.created),
    }


@router.get("/api/recommendations")
def recommendations(
    here: Here,
    reader: SignedIn,
    tag: Annotated[str | None, Query(max_length=40, description="learn from one tag instead of from all")] = None,
    limit: Limit = 20,
) -> JSONResponse:
    """Papers like those that the reader tagged, with the words that speak for each."""
    learned = tags.tagged(here.store, reader.id, tag)
    if tag is not None and not learned:
        raise Problem(404, f"you have no papers under the tag {tag!r}", field="tag")
    found = here.recommender.recommend(learned, limit=limit, leave_out=tags.hidden_of(here.store, reader.id))
    kept = here.store.by_ids([item.paper_id for item in found.items])
    shown = show(here.store, [paper for paper in kept if paper is not None])
    by_id = {item.paper_id: item for item in found.items}
    who = submissions.submitters(here.store, [s.paper.id for s in shown])
    return JSONResponse(
        {
            "learned_from": found.learned_from,
            "words": [{"word": word, "weight": weight} for word, weight in found.words],
            "papers": [
                shapes.entry(s, here, who)
                | {
                    "score": by_id[s.paper.id].score,
                    "because": [{"word": word, "adds": adds} for word, adds in by_id[s.paper.id].words],
                }
                for s in shown
            ],
        }
    )


def _papers(here: Context, ids: list[int]) -> JSONResponse:
    found = show(here.store, [paper for paper in here.store.by_ids(ids) if paper is not None])
    who = submissions.submitters(here.store, [shown.paper.id for shown in found])
    return JSONResponse([shapes.entry(shown, here, who) for shown in found])
