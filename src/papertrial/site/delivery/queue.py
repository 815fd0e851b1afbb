"""The queue of digests: which are due, which worker has which, and what became of each.

One row a subscription and period. A digest goes through these states:

    due -> building -> sending -> sent
                   \\-> empty  (there was nothing new)

A worker takes a row by one conditional update, and keeps it for minutes; the row of a worker that died while it was
``building`` is taken by another. ``sending`` is written before the letter is handed over. Where a worker dies in that
state, or the mail server breaks off in the middle, nobody can know whether the letter went out: the row becomes
``unknown`` and is never sent again. Its papers are not lost: a digest covers what came since the last one that was
sent, so the next one has them. A letter is therefore sent at most once, and a paper at least once.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from papertrial.feed import people_schema
from papertrial.feed.delivery_schema import digests, subscriptions
from papertrial.feed.store import Store
from papertrial.feed.writing import lock_counters
from papertrial.site.delivery.periods import end_after, period_ending
from papertrial.site.delivery.subscriptions import Subscription, read_row

#: How long a worker may have a digest before another may think it dead.
HELD = timedelta(minutes=10)
ATTEMPTS = 6
FIRST_WAIT = timedelta(minutes=5)
#: Letters in a row that an address refuses for good before its digest stops.
REFUSALS = 3
KEPT_DAYS = 90
_BATCH = 200
#: The longest span that a digest covers, after whatever pause.
LONGEST = timedelta(days=31)


@dataclass(frozen=True, slots=True)
class Digest:
    """A digest that a worker has taken: for whom, and of which papers (came in after ``starts``, until ``ends``)."""

    id: int
    subscription: Subscription
    period: str
    starts: datetime
    ends: datetime
    attempts: int
    holder: str


def enqueue_due(store: Store, now: datetime) -> int:
    """Put every digest that is due into the queue, each once; how many were put there.

    After a pause (the service was down) a subscription gets one digest of all that came since, not one a day.

    A paper carries the moment at which its batch began, and can be seen when that batch is stored. Batches hold the
    counters, so who has held them after a span ended knows that every paper of the span is there to be found.
    """
    added = 0
    table = subscriptions
    waiting = sa.select(table.c.id).where(table.c.state == "active", table.c.next_due <= now).limit(1)
    with store.reading() as connection:
        if connection.execute(waiting).first() is None:
            return 0  # most of the time: nobody who writes papers is kept waiting for that
    while True:
        with store.writing() as connection:
            lock_counters(connection)
            rows = _due(connection, now)
            added += sum(_enqueue(connection, row, now) for row in rows)
        if len(rows) < _BATCH:
            return added


def _due(connection: sa.Connection, now: datetime) -> list[Any]:
    table = subscriptions
    query = sa.select(table).where(table.c.state == "active", table.c.next_due <= now)
    query = query.order_by(table.c.next_due, table.c.id).limit(_BATCH).with_for_update(skip_locked=True)
    return list(connection.execute(query).mappings())


def _enqueue(connection: sa.Connection, row: Any, now: datetime) -> bool:
    period = period_ending(now, row["cadence"], row["timezone"], row["hour"])
    due = end_after(now, row["cadence"], row["timezone"], row["hour"])
    table = subscriptions
    connection.execute(table.update().where(table.c.id == row["id"]).values(next_due=due))
    starts = max(row["covered_to"] or period.starts, period.ends - LONGEST)
    if starts >= period.ends:
        return False
    values = {"subscription_id": row["id"], "period": period.name, "starts": starts, "ends": period.ends}
    values |= {"state": "due", "attempts": 0, "next_try": now, "papers": 0, "message": ""}
    try:
        with connection.begin_nested():
            connection.execute(digests.insert().values(**values))
    except IntegrityError:
        return False  # this period has its digest
    # One that could not be sent until now is not sent beside this one, which has its papers.
    older = (digests.c.subscription_id == row["id"], digests.c.state == "due", digests.c.ends < period.ends)
    replaced = {"state": "failed", "finished": now, "message": "its papers went into the next digest"}
    connection.execute(digests.update().where(*older).values(**replaced))
    return True


def claim(store: Store, holder: str, now: datetime) -> Digest | None:
    """Take one digest to build and send; None where none waits. Two workers never take the same."""
    table, users, other = digests, people_schema.users, digests.alias()
    waits = sa.and_(table.c.state == "due", table.c.next_try <= now)
    orphaned = sa.and_(table.c.state == "building", table.c.held_until <= now)
    busy = sa.exists().where(
        other.c.subscription_id == table.c.subscription_id,
        other.c.id != table.c.id,
        other.c.state.in_(("building", "sending")),
        other.c.held_until > now,
    )
    free = sa.and_(sa.or_(waits, orphaned), ~busy)
    first = sa.select(table.c.id).where(free).order_by(table.c.next_try, table.c.id).limit(1)
    with store.writing() as connection:
        number = connection.execute(first.with_for_update(skip_locked=True)).scalar()
        if number is None:
            return None
        taken = connection.execute(
            table.update()
            .where(table.c.id == number, free)
            .values(state="building", holder=holder, held_until=now + HELD, attempts=table.c.attempts + 1)
        )
        if taken.rowcount != 1:
            return None
        row = connection.execute(sa.select(table).where(table.c.id == number)).mappings().one()
        query = sa.select(subscriptions, users.c.role).outerjoin(users, users.c.id == subscriptions.c.user_id)
        mine = connection.execute(query.where(subscriptions.c.id == row["subscription_id"])).mappings().one()
        stopped = mine["role"] == "blocked" or mine["state"] != "active"
        if stopped:
            _finish(connection, number, "failed", now, "the account is blocked, or the address refuses letters")
    if stopped:
        return claim(store, holder, now)
    starts = max(row["starts"], mine["covered_to"] or row["starts"])
    return Digest(number, read_row(mine), row["period"], starts, row["ends"], row["attempts"], holder)


def begin_sending(store: Store, digest: Digest, papers: int, now: datetime) -> bool:
    """Say that the letter is handed over next; False where it must not be: it has ended, or another worker has it."""
    table = digests
    mine = (table.c.id == digest.id, table.c.state == "building", table.c.holder == digest.holder)
    with store.writing() as connection:
        changed = connection.execute(
            table.update().where(*mine).values(state="sending", papers=papers, held_until=now + HELD)
        )
    return bool(changed.rowcount)


def sent(store: Store, digest: Digest, now: datetime) -> None:
    """The mail server took the letter."""
    with store.writing() as connection:
        if _finish(connection, digest.id, "sent", now, "", "sending", "unknown"):
            _covered(connection, digest, refusals=0)


def empty(store: Store, digest: Digest, now: datetime) -> None:
    """There was nothing new, so there is no letter."""
    with store.writing() as connection:
        if _finish(connection, digest.id, "empty", now, "", "building"):
            _covered(connection, digest)


def try_later(store: Store, digest: Digest, reason: str, now: datetime) -> None:
    """The letter surely did not go out: again after a while, with longer and longer pauses, then not any more."""
    table = digests
    with store.writing() as connection:
        if digest.attempts >= ATTEMPTS:
            _finish(connection, digest.id, "failed", now, reason, "building", "sending")
            return
        wait = FIRST_WAIT * 2 ** (digest.attempts - 1)
        mine = (table.c.id == digest.id, table.c.holder == digest.holder, table.c.state.in_(("building", "sending")))
        values = {"state": "due", "next_try": now + wait, "holder": None, "message": reason[:500]}
        connection.execute(table.update().where(*mine).values(**values))


def refused(store: Store, digest: Digest, reason: str, now: datetime) -> None:
    """The address does not take the letter; after `REFUSALS` in a row its digest stops until it is asked for anew."""
    table = subscriptions
    with store.writing() as connection:
        if not _finish(connection, digest.id, "failed", now, reason, "sending"):
            return
        mine = table.update().where(table.c.id == digest.subscription.id)
        connection.execute(mine.values(refusals=table.c.refusals + 1))
        connection.execute(mine.where(table.c.refusals >= REFUSALS).values(state="bounced", next_due=None))


def unclear(store: Store, digest: Digest, reason: str, now: datetime) -> None:
    """Nobody can know whether the letter went out: it is not sent again."""
    with store.writing() as connection:
        _finish(connection, digest.id, "unknown", now, reason, "sending")


def tidy(store: Store, now: datetime) -> None:
    """Close what a dead worker left while it was sending, and forget what is long past."""
    table = digests
    with store.writing() as connection:
        left = (table.c.state == "sending", table.c.held_until <= now)
        reason = "the worker stopped while it handed the letter over"
        connection.execute(table.update().where(*left).values(state="unknown", finished=now, message=reason))
        past = table.c.ends < now - timedelta(days=KEPT_DAYS)
        connection.execute(table.delete().where(past, table.c.state.not_in(("due", "building", "sending"))))


def _finish(connection: sa.Connection, number: int, state: str, now: datetime, message: str, *only_from: str) -> bool:
    table = digests
    mine = [table.c.id == number]
    if only_from:
        mine.append(table.c.state.in_(only_from))
    values = {"state": state, "finished": now, "message": message[:500], "holder": None}
    return bool(connection.execute(table.update().where(*mine).values(**values)).rowcount)


def _covered(connection: sa.Connection, digest: Digest, **values: Any) -> None:
    table = subscriptions
    mine = table.update().where(table.c.id == digest.subscription.id)
    if values:
        connection.execute(mine.values(**values))
    older = sa.or_(table.c.covered_to.is_(None), table.c.covered_to < digest.ends)
    connection.execute(mine.where(older).values(covered_to=digest.ends))
