"""Votes: one per account and paper. The weight in trending is fixed when a vote is cast (see `pulse`)."""

from collections.abc import Sequence
from datetime import timedelta

import sqlalchemy as sa

from papertrial.feed import people_schema as tables
from papertrial.feed.store import Store, utc_now
from papertrial.site.people import bounds, pulse
from papertrial.site.people.accounts import Reader
from papertrial.site.people.writing import insert_new


def cast_vote(store: Store, reader: Reader, paper_id: int) -> None:
    """Vote for a paper; a second time changes nothing.

    Raises
    ------
    Problem
        429 beyond `bounds.VOTES_AN_HOUR`; 404 where the paper has gone.
    """
    table, now = tables.votes, utc_now()
    mine = table.c.user_id == reader.id
    with store.writing() as connection:
        if connection.execute(sa.select(table.c.paper_id).where(mine, table.c.paper_id == paper_id)).first():
            return
        bounds.check_pace(connection, mine, table.c.cast_at, bounds.VOTES_AN_HOUR, timedelta(hours=1), now, "votes")
        in_day = sa.select(sa.func.count()).where(mine, table.c.cast_at > now - timedelta(days=1))
        weight = pulse.vote_weight(reader.confirmed, now, 1 + connection.execute(in_day).scalar_one())
        values = {"paper_id": paper_id, "user_id": reader.id, "weight": weight, "cast_at": now}
        if insert_new(connection, table, values):
            pulse.refresh(connection, [paper_id])


def take_vote_back(store: Store, reader: Reader, paper_id: int) -> None:
    """Take a vote back; where there is none, nothing changes."""
    table = tables.votes
    with store.writing() as connection:
        mine = (table.c.user_id == reader.id, table.c.paper_id == paper_id)
        if connection.execute(table.delete().where(*mine)).rowcount:
            pulse.refresh(connection, [paper_id])


def voted_for(store: Store, user_id: int, paper_ids: Sequence[int]) -> set[int]:
    """Those of the papers that the account voted for."""
    table = tables.votes
    query = sa.select(table.c.paper_id).where(table.c.user_id == user_id, table.c.paper_id.in_(list(paper_ids)))
    with store.reading() as connection:
        return set(connection.execute(query).scalars())


def votes_of(store: Store, user_id: int, limit: int = 100) -> list[int]:
    """The papers that the account voted for, newest vote first."""
    table = tables.votes
    query = sa.select(table.c.paper_id).where(table.c.user_id == user_id)
    with store.reading() as connection:
        return list(connection.execute(query.order_by(table.c.cast_at.desc()).limit(limit)).scalars())
