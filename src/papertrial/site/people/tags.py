"""A reader's own tags, and what a reader hides. Tags are private; recommendations are learned from them."""

from collections.abc import Sequence

import sqlalchemy as sa

from papertrial.feed import people_schema as tables
from papertrial.feed.store import Store, utc_now
from papertrial.site.people import bounds
from papertrial.site.people.accounts import Reader
from papertrial.site.people.writing import insert_new


def tag(store: Store, reader: Reader, paper_id: int, name: str) -> None:
    """Put a tag on a paper; a second time changes nothing.

    Raises
    ------
    Problem
        409 beyond `bounds.TAGGED_PAPERS`; 404 where the paper has gone.
    """
    table = tables.tags
    with store.writing() as connection:
        bounds.check_room(connection, table, table.c.user_id == reader.id, bounds.TAGGED_PAPERS, "tagged papers")
        values = {"user_id": reader.id, "name": name, "paper_id": paper_id, "created": utc_now()}
        insert_new(connection, table, values)


def untag(store: Store, reader: Reader, paper_id: int, name: str) -> None:
    """Take a tag off a paper."""
    table = tables.tags
    with store.writing() as connection:
        mine = (table.c.user_id == reader.id, table.c.name == name, table.c.paper_id == paper_id)
        connection.execute(table.delete().where(*mine))


def tags_of(store: Store, user_id: int) -> dict[str, int]:
    """A reader's tags with how many papers each has, by name."""
    table = tables.tags
    query = sa.select(table.c.name, sa.func.count()).where(table.c.user_id == user_id).group_by(table.c.name)
    with store.reading() as connection:
        return {row[0]: row[1] for row in connection.execute(query.order_by(table.c.name))}


def tagged(store: Store, user_id: int, name: str | None = None, limit: int = bounds.TAGGED_PAPERS) -> list[int]:
    """The papers under a tag, or under any, newest first."""
    table = tables.tags
    newest = sa.func.max(table.c.created)
    query = sa.select(table.c.paper_id).where(table.c.user_id == user_id).group_by(table.c.paper_id)
    if name is not None:
        query = query.where(table.c.name == name)
    with store.reading() as connection:
        return list(connection.execute(query.order_by(newest.desc(), table.c.paper_id).limit(limit)).scalars())


def tags_on(store: Store, user_id: int, paper_ids: Sequence[int]) -> dict[int, list[str]]:
    """A reader's tags on each of some papers."""
    table = tables.tags
    query = sa.select(table.c.paper_id, table.c.name).where(
        table.c.user_id == user_id, table.c.paper_id.in_(list(paper_ids))
    )
    found: dict[int, list[str]] = {}
    with store.reading() as connection:
        for paper_id, name in connection.execute(query.order_by(table.c.name)):
            found.setdefault(paper_id, []).append(name)
    return found


def hide(store: Store, reader: Reader, paper_ids: Sequence[int]) -> None:
    """Do not show these papers to the reader again."""
    table, now = tables.hidden, utc_now()
    with store.writing() as connection:
        room = bounds.HIDDEN_PAPERS - len(paper_ids) + 1
        bounds.check_room(connection, table, table.c.user_id == reader.id, room, "hidden papers")
        for paper_id in dict.fromkeys(paper_ids):
            insert_new(connection, table, {"user_id": reader.id, "paper_id": paper_id, "created": now})


def unhide(store: Store, reader: Reader, paper_ids: Sequence[int] | None = None) -> None:
    """Show some papers again, or all."""
    table = tables.hidden
    with store.writing() as connection:
        query = table.delete().where(table.c.user_id == reader.id)
        if paper_ids is not None:
            query = query.where(table.c.paper_id.in_(list(paper_ids)))
        connection.execute(query)


def hidden_of(store: Store, user_id: int) -> list[int]:
    """What a reader hid, newest first."""
    table = tables.hidden
    query = sa.select(table.c.paper_id).where(table.c.user_id == user_id).order_by(table.c.created.desc())
    with store.reading() as connection:
        return list(connection.execute(query).scalars())
