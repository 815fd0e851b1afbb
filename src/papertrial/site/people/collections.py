"""Collections: ordered lists of papers with a title and notes, public or not."""

from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from papertrial.feed import people_schema as tables
from papertrial.feed.store import Store, utc_now
from papertrial.site.errors import Problem
from papertrial.site.fields import checked_slug
from papertrial.site.keys import new_token
from papertrial.site.people import bounds
from papertrial.site.people.accounts import Reader
from papertrial.site.people.writing import insert_new

MAX_NOTE = 2_000


@dataclass(frozen=True, slots=True)
class Item:
    """A paper of a collection, with a note."""

    paper_id: int
    position: int
    note: str


@dataclass(frozen=True, slots=True)
class Collection:
    """A list of papers; ``items`` are filled in by `collection` only, ``size`` always."""

    id: int
    owner_id: int
    owner: str
    slug: str
    title: str
    note: str
    public: bool
    created: datetime
    updated: datetime
    size: int
    items: tuple[Item, ...] = ()


def make_collection(store: Store, reader: Reader, title: str, note: str = "", *, public: bool = False) -> Collection:
    """A new, empty collection; its part of the address is made from the title.

    Raises
    ------
    Problem
        422 for a title or note that is too long; 409 beyond `bounds.COLLECTIONS`.
    """
    title, note = _checked(title, note)
    table, now = tables.collections, utc_now()
    values: dict[str, Any] = {"user_id": reader.id, "title": title, "note": note, "public": public}
    with store.writing() as connection:
        bounds.check_room(connection, table, table.c.user_id == reader.id, bounds.COLLECTIONS, "collections")
        base = checked_slug(title, "collection")
        mine = sa.select(table.c.id).where(table.c.user_id == reader.id)
        taken = connection.execute(mine.where(table.c.slug == base)).first() is not None
        values |= {"slug": f"{base}-{new_token()[:6].lower()}" if taken else base, "created": now, "updated": now}
        added = connection.execute(table.insert().values(**values))
    return Collection(
        added.inserted_primary_key[0],  # type: ignore[index]
        reader.id, reader.name, values["slug"], title, note, public, now, now, 0,
    )  # fmt: skip


def change_collection(
    store: Store,
    reader: Reader,
    slug: str,
    *,
    title: str | None = None,
    note: str | None = None,
    public: bool | None = None,
) -> Collection:
    """Change a collection's title, note or visibility; its address stays."""
    held = collection(store, reader.name, slug, reader)
    new_title, new_note = _checked(held.title if title is None else title, held.note if note is None else note)
    shown = held.public if public is None else public
    table, now = tables.collections, utc_now()
    with store.writing() as connection:
        values = {"title": new_title, "note": new_note, "public": shown, "updated": now}
        connection.execute(table.update().where(*_mine(reader, slug)).values(**values))
    return replace(held, title=new_title, note=new_note, public=shown, updated=now)


def delete_collection(store: Store, reader: Reader, slug: str) -> None:
    """Delete one's own collection.

    Raises
    ------
    Problem
        404 where there is none.
    """
    with store.writing() as connection:
        if not connection.execute(tables.collections.delete().where(*_mine(reader, slug))).rowcount:
            raise Problem(404, f"you have no collection {slug[:80]!r}")


def put_item(store: Store, reader: Reader, slug: str, paper_id: int, note: str = "") -> None:
    """Put a paper at the end of a collection, or change its note.

    Raises
    ------
    Problem
        404 where there is no such collection; 409 beyond `bounds.COLLECTION_PAPERS`; 422 for too long a note.
    """
    _, note = _checked("-", note)
    items, now = tables.collection_items, utc_now()
    with store.writing() as connection:
        number = _own_id(connection, reader, slug)
        here = items.c.collection_id == number
        changed = connection.execute(items.update().where(here, items.c.paper_id == paper_id).values(note=note))
        if not changed.rowcount:
            bounds.check_room(connection, items, here, bounds.COLLECTION_PAPERS, "papers in a collection")
            last = connection.execute(sa.select(sa.func.max(items.c.position)).where(here)).scalar()
            values = {"collection_id": number, "paper_id": paper_id, "note": note, "added": now}
            insert_new(connection, items, values | {"position": (last or 0) + 1})
        _touch(connection, number, now)


def remove_item(store: Store, reader: Reader, slug: str, paper_id: int) -> None:
    """Take a paper out of a collection."""
    items = tables.collection_items
    with store.writing() as connection:
        number = _own_id(connection, reader, slug)
        connection.execute(items.delete().where(items.c.collection_id == number, items.c.paper_id == paper_id))
        _touch(connection, number, utc_now())


def order_items(store: Store, reader: Reader, slug: str, paper_ids: list[int]) -> None:
    """Bring a collection's papers into an order; those that are not named keep theirs, behind."""
    items = tables.collection_items
    with store.writing() as connection:
        number = _own_id(connection, reader, slug)
        here = items.c.collection_id == number
        held = connection.execute(sa.select(items.c.paper_id).where(here).order_by(items.c.position)).scalars().all()
        named = [paper_id for paper_id in dict.fromkeys(paper_ids) if paper_id in set(held)]
        for position, paper_id in enumerate([*named, *(i for i in held if i not in set(named))], start=1):
            connection.execute(items.update().where(here, items.c.paper_id == paper_id).values(position=position))
        _touch(connection, number, utc_now())


def collection(store: Store, owner: str, slug: str, reader: Reader | None) -> Collection:
    """One collection with its papers.

    Raises
    ------
    Problem
        404 where there is none, also where it is somebody else's and not public.
    """
    table, users, items = tables.collections, tables.users, tables.collection_items
    query = sa.select(table, users.c.name.label("owner")).join(users, users.c.id == table.c.user_id)
    with store.reading() as connection:
        row = connection.execute(query.where(users.c.name == owner, table.c.slug == slug)).first()
        if row is None or not (row.public or (reader is not None and reader.id == row.user_id)):
            raise Problem(404, f"there is no collection {owner[:40]}/{slug[:80]}")
        found = connection.execute(
            sa.select(items).where(items.c.collection_id == row.id).order_by(items.c.position, items.c.paper_id)
        ).all()
    held = tuple(Item(item.paper_id, item.position, item.note) for item in found)
    return replace(_collection(row, len(held)), items=held)


def collections_of(store: Store, owner: str, reader: Reader | None) -> list[Collection]:
    """An account's collections that the reader may see, last changed first."""
    table, users = tables.collections, tables.users
    query = _with_size().where(users.c.name == owner)
    if reader is None or reader.name != owner:
        query = query.where(table.c.public)
    with store.reading() as connection:
        return [_collection(row, row.size) for row in connection.execute(query.order_by(table.c.updated.desc()))]


def public_collections(store: Store, limit: int = 50, offset: int = 0) -> list[Collection]:
    """Everybody's public collections that hold papers, last changed first."""
    table, items = tables.collections, tables.collection_items
    filled = sa.select(items.c.collection_id).distinct()
    query = _with_size().where(table.c.public, table.c.id.in_(filled)).order_by(table.c.updated.desc())
    with store.reading() as connection:
        return [_collection(row, row.size) for row in connection.execute(query.limit(limit).offset(offset))]


def _with_size() -> sa.Select[Any]:
    table, users, items = tables.collections, tables.users, tables.collection_items
    size = sa.select(sa.func.count()).where(items.c.collection_id == table.c.id).scalar_subquery().label("size")
    return sa.select(table, users.c.name.label("owner"), size).join(users, users.c.id == table.c.user_id)


def _collection(row: Any, size: int) -> Collection:
    return Collection(
        row.id, row.user_id, row.owner, row.slug, row.title, row.note, row.public, row.created, row.updated, size
    )


def _mine(reader: Reader, slug: str) -> tuple[sa.ColumnElement[bool], ...]:
    table = tables.collections
    return table.c.user_id == reader.id, table.c.slug == slug


def _own_id(connection: sa.Connection, reader: Reader, slug: str) -> int:
    found = connection.execute(sa.select(tables.collections.c.id).where(*_mine(reader, slug))).scalar()
    if found is None:
        raise Problem(404, f"you have no collection {slug[:80]!r}")
    return int(found)


def _touch(connection: sa.Connection, number: int, now: datetime) -> None:
    table = tables.collections
    connection.execute(table.update().where(table.c.id == number).values(updated=now))


def _checked(title: str, note: str) -> tuple[str, str]:
    title, note = " ".join(title.split()), note.strip()
    if not 1 <= len(title) <= 120:
        raise Problem(422, "title: a collection needs a title of 1 to 120 characters", field="title")
    if len(note) > MAX_NOTE:
        raise Problem(422, f"note: {len(note):,} characters; at most {MAX_NOTE:,}", field="note")
    return title, note
