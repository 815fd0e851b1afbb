"""Comments in Markdown, one level of replies. A removed one keeps its place, without text, while it has replies."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa

from papertrial.feed import people_schema as tables
from papertrial.feed.store import Store, utc_now
from papertrial.site.errors import Problem
from papertrial.site.people import bounds, pulse
from papertrial.site.people.accounts import Reader
from papertrial.site.people.markdown import to_html
from papertrial.site.people.writing import insert_new

MAX_BODY = 5_000
#: How long an author may change a comment.
EDIT_MINUTES = 60
MOST_SHOWN = 500


@dataclass(frozen=True, slots=True)
class Comment:
    """A comment as shown; ``body`` is Markdown, and empty once it is removed."""

    id: int
    paper_id: int
    author_id: int
    author: str
    author_name: str
    parent_id: int | None
    body: str
    created: datetime
    edited: datetime | None
    removed: bool

    @property
    def html(self) -> str:
        """The body as safe HTML."""
        return to_html(self.body)


def add_comment(store: Store, reader: Reader, paper_id: int, body: str, parent_id: int | None = None) -> Comment:
    """Comment on a paper, or reply to a comment on it.

    Raises
    ------
    Problem
        422 for no text, too much of it, or a parent that is not a comment on this paper; 429 for too many.
    """
    body, table, now = _checked(body), tables.comments, utc_now()
    mine = table.c.user_id == reader.id
    with store.writing() as connection:
        for most, span in (
            (bounds.COMMENTS_AN_HOUR, timedelta(hours=1)),
            (bounds.COMMENTS_A_DAY, timedelta(days=1)),
        ):
            bounds.check_pace(connection, mine, table.c.created, most, span, now, "comments")
        if parent_id is not None:
            parent = connection.execute(sa.select(table).where(table.c.id == parent_id)).first()
            if parent is None or parent.paper_id != paper_id or parent.removed is not None:
                raise Problem(422, f"parent: there is no comment {parent_id} on this paper to reply to", field="parent")
            parent_id = parent.parent_id or parent.id
        last = sa.select(table.c.body).where(mine, table.c.paper_id == paper_id).order_by(table.c.id.desc()).limit(1)
        if connection.execute(last).scalar() == body:
            raise Problem(409, "body: you have said just that already", field="body")
        values = {"paper_id": paper_id, "user_id": reader.id, "parent_id": parent_id, "body": body, "created": now}
        added = insert_new(connection, table, values)[0]
        pulse.refresh(connection, [paper_id])
    return Comment(added, paper_id, reader.id, reader.name, reader.shown_name, parent_id, body, now, None, False)


def edit_comment(store: Store, reader: Reader, comment_id: int, body: str) -> Comment:
    """Change one's own comment, within `EDIT_MINUTES`.

    Raises
    ------
    Problem
        404, 403 or 422.
    """
    body, table, now = _checked(body), tables.comments, utc_now()
    with store.writing() as connection:
        row = _own(connection, reader, comment_id)
        if now - row.created > timedelta(minutes=EDIT_MINUTES):
            raise Problem(403, f"a comment can be changed for {EDIT_MINUTES} minutes")
        connection.execute(table.update().where(table.c.id == comment_id).values(body=body, edited=now))
    return Comment(
        comment_id,
        row.paper_id,
        reader.id,
        reader.name,
        reader.shown_name,
        row.parent_id,
        body,
        row.created,
        now,
        False,
    )


def remove_comment(store: Store, reader: Reader, comment_id: int) -> None:
    """Remove one's own comment; an administrator removes any. The text is gone for good.

    Raises
    ------
    Problem
        404 or 403.
    """
    table, now = tables.comments, utc_now()
    with store.writing() as connection:
        row = _own(connection, reader, comment_id, or_admin=True)
        connection.execute(table.update().where(table.c.id == comment_id).values(body="", removed=now))
        pulse.refresh(connection, [row.paper_id])


#: Built once: every paper's page asks for it. The newest, so that what somebody just said is always shown.
_ON_PAPER = (
    sa.select(tables.comments, tables.users.c.name, tables.users.c.full_name)
    .join(tables.users, tables.users.c.id == tables.comments.c.user_id)
    .where(tables.comments.c.paper_id == sa.bindparam("paper"), tables.comments.c.id < sa.bindparam("before"))
    .order_by(tables.comments.c.id.desc())
    .limit(MOST_SHOWN)
)


def comments_on(store: Store, paper_id: int, *, before: int | None = None) -> list[Comment]:
    """The newest comments on a paper, at most `MOST_SHOWN`: each with its replies behind it, oldest first.

    Parameters
    ----------
    before
        The number of a comment: only older ones.
    """
    with store.reading() as connection:
        rows = connection.execute(_ON_PAPER, {"paper": paper_id, "before": before or 2**63 - 1}).all()
    answered = {row.parent_id for row in rows if row.removed is None}
    kept = [row for row in rows if row.removed is None or row.id in answered]
    there = {row.id for row in kept}
    kept.sort(key=lambda row: (row.parent_id if row.parent_id in there else row.id, row.id))
    return [
        Comment(
            row.id,
            row.paper_id,
            row.user_id,
            row.name,
            row.full_name or row.name,
            row.parent_id if row.parent_id in there else None,
            row.body,
            row.created,
            row.edited,
            row.removed is not None,
        )
        for row in kept
    ]


def older_than(store: Store, paper_id: int, shown: Sequence[Comment]) -> int:
    """How many comments on a paper are older than all of the shown ones."""
    if not shown:
        return 0
    table = tables.comments
    count = sa.select(sa.func.count()).where(table.c.paper_id == paper_id, table.c.removed.is_(None))
    with store.reading() as connection:
        return int(connection.execute(count.where(table.c.id < min(one.id for one in shown))).scalar_one())


def _own(
    connection: sa.Connection, reader: Reader, comment_id: int, *, or_admin: bool = False
) -> sa.Row[tuple[object]]:
    table = tables.comments
    row = connection.execute(sa.select(table).where(table.c.id == comment_id)).first()
    if row is None or row.removed is not None:
        raise Problem(404, f"there is no comment {comment_id}")
    if row.user_id != reader.id and not (or_admin and reader.role == "admin"):
        raise Problem(403, "that comment is somebody else's")
    return row


def _checked(body: str) -> str:
    body = body.strip()
    if not body:
        raise Problem(422, "body: a comment needs some text", field="body")
    if len(body) > MAX_BODY:
        raise Problem(422, f"body: {len(body):,} characters; a comment has at most {MAX_BODY:,}", field="body")
    return body
