"""How often an account may do what costs others something: counted in the database, so shared by all workers."""

from datetime import datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from papertrial.feed import people_schema
from papertrial.site.errors import Problem

VOTES_AN_HOUR = 120
COMMENTS_AN_HOUR = 30
COMMENTS_A_DAY = 100
TAGGED_PAPERS = 5_000
COLLECTIONS = 100
COLLECTION_PAPERS = 1_000
HIDDEN_PAPERS = 50_000


def check_pace(
    connection: sa.Connection,
    owner: sa.ColumnElement[bool],
    when: sa.Column[datetime],
    most: int,
    span: timedelta,
    now: datetime,
    what: str,
) -> None:
    """Refuse more than `most` rows of an owner in the span of time that ends now.

    Raises
    ------
    Problem
        429 with the time to wait.
    """
    query = sa.select(when).where(owner, when > now - span).order_by(when.desc()).offset(most - 1).limit(1)
    oldest = connection.execute(query).scalar()
    if oldest is not None:
        seconds = max(1, int((oldest + span - now).total_seconds()) + 1)
        hours = span.total_seconds() / 3600
        within = "an hour" if hours == 1 else f"{hours:.0f} hours"
        raise Problem(429, f"at most {most} {what} in {within}", headers={"Retry-After": str(seconds)})


def count_letter(connection: sa.Connection, network: str, most: int, now: datetime) -> None:
    """Count a letter that somebody at a network caused; refuse more than `most` within a clock's hour.

    Parameters
    ----------
    network
        The client, as `papertrial.site.limits.network_of` names it.
    most
        0 is no limit.

    Raises
    ------
    Problem
        429 with the time to wait.
    """
    if not most:
        return
    table, hour = people_schema.letter_counts, now.replace(minute=0, second=0, microsecond=0)
    connection.execute(table.delete().where(table.c.hour < hour))
    mine = (table.c.network == network, table.c.hour == hour)
    one_more = table.update().where(*mine, table.c.letters < most).values(letters=table.c.letters + 1)
    if connection.execute(one_more).rowcount:
        return
    try:
        with connection.begin_nested():
            connection.execute(table.insert().values(network=network, hour=hour, letters=1))
    except IntegrityError:  # it is there: full, or begun by another worker this moment
        if not connection.execute(one_more).rowcount:
            seconds = int((hour + timedelta(hours=1) - now).total_seconds()) + 1
            message = f"your network has asked for {most} letters within an hour; go on in {seconds // 60 + 1} minutes"
            raise Problem(429, message, field="email", headers={"Retry-After": str(seconds)}) from None


def check_room(connection: sa.Connection, table: sa.Table, owner: sa.ColumnElement[bool], most: int, what: str) -> None:
    """Refuse one more row where an owner has `most`.

    Raises
    ------
    Problem
        409 saying what there is too much of.
    """
    held = connection.execute(sa.select(sa.func.count()).select_from(table).where(owner)).scalar_one()
    if held >= most:
        raise Problem(409, f"at most {most:,} {what}; remove some first")
