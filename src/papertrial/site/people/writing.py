"""Inserts that meet another one of the same row, or a row that has just gone."""

from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from papertrial.site.errors import Problem


def insert_new(connection: sa.Connection, table: sa.Table, values: dict[str, Any]) -> tuple[Any, ...]:
    """Insert a row; its key, or an empty tuple where it was there already.

    Raises
    ------
    Problem
        404 where what it belongs to (a paper that was merged this moment) is gone.
    """
    identity = [column == values[column.name] for column in table.primary_key.columns if column.name in values]
    try:
        with connection.begin_nested():
            added = connection.execute(table.insert().values(**values))
    except IntegrityError:
        if identity and connection.execute(sa.select(sa.literal(1)).select_from(table).where(*identity)).first():
            return ()
        raise Problem(404, "it is not here any more; load the page again") from None
    return tuple(added.inserted_primary_key or ())
