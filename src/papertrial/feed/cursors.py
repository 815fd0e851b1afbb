"""Where a fetch stopped, so that the next run goes on from there."""

import json
from typing import Any

import sqlalchemy as sa

from papertrial.feed import schema
from papertrial.feed.store import Store, utc_now


def read_position(store: Store, name: str) -> dict[str, Any] | None:
    """The saved position of a fetch; None where it never ran."""
    table = schema.fetch_cursors
    with store.reading() as connection:
        value = connection.execute(sa.select(table.c.value).where(table.c.name == name)).scalar()
    return dict(value) if value is not None else None


def save_position(store: Store, name: str, value: dict[str, Any]) -> None:
    """Save a position, in place of an older one. Only after what lies before it is stored."""
    table = schema.fetch_cursors
    json.dumps(value)  # what is not plain data must not reach the table
    with store.writing() as connection:
        connection.execute(table.delete().where(table.c.name == name))
        connection.execute(table.insert().values(name=name, value=value, updated=utc_now()))
