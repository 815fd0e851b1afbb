"""What people here did with a paper, and how much of it counts for trending.

A vote's weight is fixed when it is cast, from who casts it:

    weight = age * pace
    age    = days since the account was confirmed / 7, from 0.1 to 1; 0 for an account that is not confirmed
    pace   = 1 for the first 20 votes an account casts in 24 hours, then 20 / their number

Votes on one paper that come in a burst count less: of the weights cast within one clock hour, the sum S counts

    damped(S) = S                       up to 5
              = 5 * (1 + ln(S / 5))     above

so ten times the votes in an hour add 11.5 to what counts, not ten times. A comment counts half a vote, once a person.
With the votes v and comments c that other services reported, and d the feed day as a day number, a paper's heat is

    heat = log2(1 + v + sum of damped hours + 0.5 * (c + commenters)) + d / 7

which orders papers as interest that halves every seven days (see `papertrial.feed.trending`). The number of votes that
is shown counts every account once, whatever its weight.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date, datetime

import sqlalchemy as sa

from papertrial.feed import people_schema as tables
from papertrial.feed.merging import COMMENT_WEIGHT, HALF_LIFE_DAYS
from papertrial.feed.schema import papers
from papertrial.feed.store import Store

FULL_WEIGHT_DAYS = 7.0
LEAST_AGE_FACTOR = 0.1
VOTES_A_DAY = 20
BURST = 5.0


@dataclass(frozen=True, slots=True)
class Pulse:
    """What happened here: votes (one per account), comments, people who commented, and what counts of the votes."""

    votes: int = 0
    comments: int = 0
    commenters: int = 0
    weight: float = 0.0


def vote_weight(confirmed: datetime | None, now: datetime, cast_in_day: int) -> float:
    """The weight of a vote cast now.

    Parameters
    ----------
    confirmed
        When the account's address was confirmed; None if it was not.
    now
        The time of the vote.
    cast_in_day
        Votes that the account cast in the 24 hours before, this one included.
    """
    if confirmed is None:
        return 0.0
    days = max(0.0, (now - confirmed).total_seconds() / 86400)
    age = min(1.0, max(LEAST_AGE_FACTOR, days / FULL_WEIGHT_DAYS))
    return age * min(1.0, VOTES_A_DAY / max(1, cast_in_day))


def damped(weight: float) -> float:
    """What counts of the weights that were cast on one paper within one hour."""
    return weight if weight <= BURST else BURST * (1.0 + math.log(weight / BURST))


def counted(votes: Iterable[tuple[datetime, float]]) -> float:
    """What counts of a paper's votes: (when cast, weight) of each."""
    hours: dict[datetime, float] = defaultdict(float)
    for cast_at, weight in votes:
        hours[cast_at.replace(minute=0, second=0, microsecond=0)] += weight
    return math.fsum(damped(weight) for weight in hours.values())


def heat(upvotes: int, comments: int, feed_day: date, here: Pulse) -> float:
    """Where a paper stands in the trending order; equal to the catalogue's heat where nothing happened here."""
    interest = 1.0 + upvotes + here.weight + COMMENT_WEIGHT * (comments + here.commenters)
    return round(math.log2(interest) + feed_day.toordinal() / HALF_LIFE_DAYS, 9)


def refresh(connection: sa.Connection, paper_ids: Sequence[int]) -> None:
    """Sum up some papers anew, in the transaction that changed them."""
    votes, comments = tables.votes, tables.comments
    for paper_id in paper_ids:
        # Two voters at once (PostgreSQL): the second one waits here, and then counts the first one's vote.
        lock = sa.select(papers.c.id).where(papers.c.id == paper_id).with_for_update(key_share=True)
        connection.execute(lock)
        query = sa.select(votes.c.cast_at, votes.c.weight).where(votes.c.paper_id == paper_id)
        cast = [(row.cast_at, row.weight) for row in connection.execute(query)]
        shown = (comments.c.paper_id == paper_id, comments.c.removed.is_(None))
        said = connection.execute(
            sa.select(sa.func.count(), sa.func.count(sa.distinct(comments.c.user_id))).where(*shown)
        ).one()
        _write(connection, paper_id, Pulse(len(cast), said[0], said[1], counted(cast)))


def _write(connection: sa.Connection, paper_id: int, here: Pulse) -> None:
    table = tables.pulse
    connection.execute(table.delete().where(table.c.paper_id == paper_id))
    paper = connection.execute(
        sa.select(papers.c.upvotes, papers.c.comment_count, papers.c.feed_day).where(papers.c.id == paper_id)
    ).first()
    if paper is None or here == Pulse():
        return
    values = {"votes": here.votes, "comments": here.comments, "commenters": here.commenters, "weight": here.weight}
    hot = heat(paper.upvotes, paper.comment_count, paper.feed_day, here)
    connection.execute(table.insert().values(paper_id=paper_id, heat=hot, **values))


def refresh_all(store: Store) -> int:
    """Sum up every paper that people touched: after an ingest changed its votes or merged it. How many there were."""
    with store.reading() as connection:
        touched: set[int] = set()
        for table in (tables.votes, tables.comments, tables.pulse):
            touched |= set(connection.execute(sa.select(table.c.paper_id).distinct()).scalars())
    ordered = sorted(touched)
    for start in range(0, len(ordered), 200):
        with store.writing() as connection:
            refresh(connection, ordered[start : start + 200])
    return len(ordered)


#: Built once: every page asks for it.
_OF_PAPERS = sa.select(tables.pulse).where(tables.pulse.c.paper_id.in_(sa.bindparam("papers", expanding=True)))


def pulses(store: Store, paper_ids: Sequence[int]) -> dict[int, Pulse]:
    """What happened here with some papers; those with which nothing did are left out."""
    found = {}
    with store.reading() as connection:
        for start in range(0, len(paper_ids), 500):
            for row in connection.execute(_OF_PAPERS, {"papers": list(paper_ids[start : start + 500])}):
                found[row.paper_id] = Pulse(row.votes, row.comments, row.commenters, row.weight)
    return found
