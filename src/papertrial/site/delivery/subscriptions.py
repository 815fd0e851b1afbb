"""Subscriptions to digests: asked for by anybody, begun by whoever reads the address's mail, ended by one click.

Double opt-in: asking stores a pending row and sends a letter; only the link in it, opened and then confirmed by a
button, begins the digest. A pending row is forgotten after three days. Every letter carries a link of its own to end
the subscription; ending deletes the row, so nothing of the address is kept.
"""

import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal
from zoneinfo import ZoneInfo

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from papertrial.feed import people_schema
from papertrial.feed.delivery_schema import saved_searches, subscriptions
from papertrial.feed.store import Store, utc_now
from papertrial.lab.claim import FAMILIES
from papertrial.site import keys
from papertrial.site.delivery.periods import Cadence, end_after, period_ending
from papertrial.site.errors import Problem
from papertrial.site.fields import checked_line
from papertrial.site.people import bounds
from papertrial.site.people.accounts import Reader, checked_email

Kind = Literal["feed", "tag", "topic", "search"]
KINDS: tuple[Kind, ...] = ("feed", "tag", "topic", "search")
CADENCES: tuple[Cadence, ...] = ("daily", "weekly")

CONFIRM_DAYS = 3
#: Letters that ask for confirmation: to one address in a day, and to all in an hour; readers who are signed in and ask
#: for their own address are not bound by what others asked for.
LETTERS_PER_ADDRESS = 5
LETTERS_PER_HOUR = 500
#: How long the letter for one digest is not sent again: nobody can fill another person's mailbox with it.
LETTER_HOURS = 12
SUBSCRIPTIONS_PER_ADDRESS = 50
SAVED_SEARCHES = 200


@dataclass(frozen=True, slots=True)
class Watch:
    """What somebody wants to hear of: everything, papers like those under a tag, an arXiv category, or a search.

    ``value`` is the tag's name, the category or the query; ``family`` narrows feeds and searches to papers in scope.
    """

    kind: Kind
    value: str = ""
    family: str = ""

    @property
    def title(self) -> str:
        """In a few words, for subjects and lists."""
        named = {
            "feed": "all papers",
            "tag": f"papers like those tagged {self.value}",
            "topic": f"papers in {self.value}",
            "search": f"papers about {self.value}",
        }[self.kind]
        return f"{named} ({self.family.replace('_', ' ')})" if self.family else named


@dataclass(frozen=True, slots=True)
class Subscription:
    """A digest that an address gets, or will once it is confirmed."""

    id: int
    nonce: str
    email: str
    user_id: int | None
    watch: Watch
    cadence: Cadence
    timezone: str
    hour: int
    state: Literal["pending", "active", "bounced"]
    created: datetime
    confirmed: datetime | None
    covered_to: datetime | None
    next_due: datetime | None
    refusals: int


def checked_watch(kind: str, value: str, family: str) -> Watch:
    """A watch from what somebody typed.

    Raises
    ------
    Problem
        422 naming the field.
    """
    if kind not in KINDS:
        raise Problem(422, f"kind: {kind[:40]!r} is not one of {', '.join(KINDS)}", field="kind")
    try:
        value = " ".join(checked_line(value).split())
    except ValueError as error:
        raise Problem(422, f"value: {error}", field="value") from None
    most = {"feed": 0, "tag": 40, "topic": 40, "search": 250}[kind]
    if len(value) > most or (not value and kind != "feed"):
        wanted = {
            "feed": "must be empty for the whole feed",
            "tag": "a tag has 1 to 40 characters",
            "topic": "a category such as cs.CL has 1 to 40 characters",
            "search": "a search has 1 to 250 characters",
        }[kind]
        raise Problem(422, f"value: {wanted}", field="value")
    if family and (family not in FAMILIES or kind not in ("feed", "search")):
        known = ", ".join(FAMILIES) if kind in ("feed", "search") else "none for a tag or topic"
        raise Problem(422, f"family: {family[:40]!r} cannot be chosen here; known: {known}", field="family")
    return Watch(kind, value, family)  # type: ignore[arg-type]


def checked_zone(name: str) -> str:
    """The name of a time zone.

    Raises
    ------
    Problem
        422 naming the field.
    """
    try:
        if not 1 <= len(name) <= 60:
            raise ValueError(name)
        ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # an unknown zone is a KeyError, a path a ValueError
        raise Problem(
            422, f"timezone: {name[:60]!r} is not a time zone such as Europe/Berlin", field="timezone"
        ) from None
    return name


# -- asking, confirming, ending ---------------------------------------------------------------------------------------


def ask(
    store: Store,
    email: str,
    watch: Watch,
    cadence: Cadence = "daily",
    *,
    timezone: str = "UTC",
    hour: int = 7,
    reader: Reader | None = None,
    network: str = "",
    letters: int = 0,
) -> tuple[Subscription, str] | None:
    """Ask for a digest; the pending subscription and the token for the letter that confirms it.

    None where no letter is due: the address has this digest already (its own reader changes when it comes), or the
    letter was sent a short while ago. What strangers are told must not depend on which it was.

    Parameters
    ----------
    network, letters
        From where it was asked for, and how many letters an hour may be asked for from there (0: any number).

    Raises
    ------
    Problem
        422 for a wrong address, zone or hour; 403 for a tag without an account; 404 for a tag that has no papers;
        409 for too many subscriptions; 429 for too many letters.
    """
    email, timezone = checked_email(email), checked_zone(timezone)
    if cadence not in CADENCES:
        raise Problem(422, f"cadence: {str(cadence)[:40]!r} is not daily or weekly", field="cadence")
    if not 0 <= hour <= 23:
        raise Problem(422, f"hour: {hour} is not an hour from 0 to 23", field="hour")
    now, token = utc_now(), keys.new_token()
    table = subscriptions
    with store.writing() as connection:
        owner = _owner(connection, watch, reader, email)
        same = (
            table.c.email == email,
            table.c.kind == watch.kind,
            table.c.value == watch.value,
            table.c.family == watch.family,
        )
        held = connection.execute(sa.select(table).where(*same)).mappings().first()
        chosen: dict[str, Any] = {"cadence": cadence, "timezone": timezone, "hour": hour}
        if held is not None and held["state"] == "active":
            if reader is not None and reader.email == email:
                due = end_after(max(now, held["covered_to"] or now), cadence, timezone, hour)
                connection.execute(table.update().where(table.c.id == held["id"]).values(**chosen, next_due=due))
            return None
        if held is not None and held["letter_sent"] > now - timedelta(hours=LETTER_HOURS):
            return None
        own = reader is not None and reader.email == email
        _check_letters(connection, email, now, own)
        if not own:
            bounds.count_letter(connection, network, letters, now)
        chosen |= {
            "state": "pending",
            "confirm_hash": keys.token_hash(token),
            "confirm_until": now + timedelta(days=CONFIRM_DAYS),
            "letter_sent": now,
            "user_id": owner,
            "refusals": 0,
        }
        if held is not None:
            connection.execute(table.update().where(table.c.id == held["id"]).values(**chosen))
            number = int(held["id"])
        else:
            number = _insert(connection, email, watch, chosen, now)
        row = connection.execute(sa.select(table).where(table.c.id == number)).mappings().one()
    return read_row(row), token


def _owner(connection: sa.Connection, watch: Watch, reader: Reader | None, email: str) -> int | None:
    """The account that a subscription belongs to: a tag is its reader's own, and is sent to no other address."""
    if watch.kind != "tag":
        return reader.id if reader is not None and reader.email == email else None
    if reader is None:
        raise Problem(403, "sign in to get a digest of a tag: tags are private", field="kind")
    if reader.email != email:
        raise Problem(
            422, f"email: the digest of a tag goes to its reader's own address, {reader.email}", field="email"
        )
    tags = people_schema.tags
    tagged = sa.select(tags.c.paper_id).where(tags.c.user_id == reader.id, tags.c.name == watch.value).limit(1)
    if connection.execute(tagged).first() is None:
        raise Problem(404, f"value: you have no papers under the tag {watch.value!r}", field="value")
    return reader.id


def _check_letters(connection: sa.Connection, email: str, now: datetime, own: bool) -> None:
    table = subscriptions
    count = sa.select(sa.func.count())
    mine = count.where(table.c.email == email)
    if connection.execute(mine).scalar_one() >= SUBSCRIPTIONS_PER_ADDRESS:
        raise Problem(409, f"at most {SUBSCRIPTIONS_PER_ADDRESS} digests an address; end some first", field="email")
    if own:
        return
    today = connection.execute(mine.where(table.c.letter_sent > now - timedelta(days=1))).scalar_one()
    hour = connection.execute(count.where(table.c.letter_sent > now - timedelta(hours=1))).scalar_one()
    if today >= LETTERS_PER_ADDRESS or hour >= LETTERS_PER_HOUR:
        raise Problem(429, "too many letters were asked for; try again tomorrow", field="email")


def _insert(connection: sa.Connection, email: str, watch: Watch, chosen: dict[str, Any], now: datetime) -> int:
    values = {"nonce": secrets.token_hex(8), "email": email, "created": now}
    values |= {"kind": watch.kind, "value": watch.value, "family": watch.family}
    try:
        with connection.begin_nested():
            added = connection.execute(subscriptions.insert().values(**values, **chosen))
    except IntegrityError:
        raise Problem(409, "this digest is being asked for already; look into your mail") from None
    return int(added.inserted_primary_key[0])  # type: ignore[index]


def waiting_for(store: Store, token: str) -> Subscription | None:
    """The subscription that a link would confirm; looking confirms nothing."""
    table = subscriptions
    good = (table.c.confirm_hash == keys.token_hash(token), table.c.confirm_until > utc_now())
    return _first(store, sa.select(table).where(*good))


def confirm(store: Store, token: str) -> Subscription:
    """Begin a subscription: from now on it has digests. A second time changes nothing.

    Raises
    ------
    Problem
        403 where the link is too old or was never sent.
    """
    table, now = subscriptions, utc_now()
    good = (table.c.confirm_hash == keys.token_hash(token), table.c.confirm_until > now)
    with store.writing() as connection:
        row = connection.execute(sa.select(table).where(*good)).mappings().first()
        if row is None:
            raise Problem(403, "this link is too old or was used already; ask for the digest again", field="token")
        if row["state"] != "active":
            due = end_after(now, row["cadence"], row["timezone"], row["hour"])
            values = {"state": "active", "confirmed": now, "next_due": due, "refusals": 0}
            if row["covered_to"] is None:
                # From here on every paper is owed: a first digest that fails leaves its papers to the next one.
                values["covered_to"] = period_ending(now, row["cadence"], row["timezone"], row["hour"]).ends
            connection.execute(table.update().where(table.c.id == row["id"]).values(**values))
            row = connection.execute(sa.select(table).where(table.c.id == row["id"])).mappings().one()
    return read_row(row)


def unsubscribe_token(key: bytes, subscription: Subscription) -> str:
    """What ends a subscription, for links in its letters; it says which one, and nobody else can make it."""
    name = f"{subscription.id}.{subscription.nonce}"
    return f"{name}.{keys.seal(key, 'unsubscribe', name)}"


def of_token(store: Store, key: bytes, token: str) -> Subscription | None:
    """The subscription that a link of a letter is about; None where it has ended.

    Raises
    ------
    Problem
        404 for a link that the service did not make.
    """
    name, _, mac = token.rpartition(".")
    number, _, nonce = name.partition(".")
    if not keys.is_sealed(key, "unsubscribe", name, mac) or not number.isdecimal():
        raise Problem(404, "this is not a link of one of our letters", field="token")
    table = subscriptions
    return _first(store, sa.select(table).where(table.c.id == int(number), table.c.nonce == nonce))


def end(store: Store, subscription_id: int, nonce: str) -> bool:
    """End a subscription at once, also what is being sent of it; whether there was one."""
    table = subscriptions
    with store.writing() as connection:
        gone = connection.execute(table.delete().where(table.c.id == subscription_id, table.c.nonce == nonce))
    return bool(gone.rowcount)


# -- lists ------------------------------------------------------------------------------------------------------------


def subscriptions_of(store: Store, reader: Reader) -> list[Subscription]:
    """What a reader's account or address gets, newest first."""
    table = subscriptions
    mine = sa.or_(table.c.user_id == reader.id, table.c.email == reader.email)
    with store.reading() as connection:
        rows = connection.execute(sa.select(table).where(mine).order_by(table.c.id.desc())).mappings().all()
    return [read_row(row) for row in rows]


def own(store: Store, reader: Reader, subscription_id: int) -> Subscription:
    """One of a reader's subscriptions.

    Raises
    ------
    Problem
        404 where it is not his, or is not there.
    """
    found = next((s for s in subscriptions_of(store, reader) if s.id == subscription_id), None)
    if found is None:
        raise Problem(404, f"you have no subscription {subscription_id}", field="subscription_id")
    return found


def save_search(store: Store, reader: Reader, query: str, family: str = "") -> int:
    """Keep a search; its number. One that is kept already keeps its number.

    Raises
    ------
    Problem
        422 for what cannot be searched, 409 beyond `SAVED_SEARCHES`.
    """
    watch, table = checked_watch("search", query, family), saved_searches
    same = (table.c.user_id == reader.id, table.c.query == watch.value, table.c.family == watch.family)
    with store.writing() as connection:
        held = connection.execute(sa.select(table.c.id).where(*same)).scalar()
        if held is not None:
            return int(held)
        bounds.check_room(connection, table, table.c.user_id == reader.id, SAVED_SEARCHES, "saved searches")
        values = {"user_id": reader.id, "query": watch.value, "family": watch.family, "created": utc_now()}
        try:
            with connection.begin_nested():
                added = connection.execute(table.insert().values(**values))
        except IntegrityError:
            return int(connection.execute(sa.select(table.c.id).where(*same)).scalar_one())
        return int(added.inserted_primary_key[0])  # type: ignore[index]


def searches_of(store: Store, reader: Reader) -> list[tuple[int, Watch]]:
    """A reader's saved searches with their numbers, newest first."""
    table = saved_searches
    query = sa.select(table).where(table.c.user_id == reader.id).order_by(table.c.id.desc())
    with store.reading() as connection:
        return [(row.id, Watch("search", row.query, row.family)) for row in connection.execute(query)]


def forget_search(store: Store, reader: Reader, search_id: int) -> None:
    """Keep a search no longer; a digest of it goes on until it is ended."""
    table = saved_searches
    with store.writing() as connection:
        connection.execute(table.delete().where(table.c.id == search_id, table.c.user_id == reader.id))


def tidy(store: Store) -> None:
    """Forget addresses that never confirmed."""
    table = subscriptions
    with store.writing() as connection:
        connection.execute(table.delete().where(table.c.state == "pending", table.c.confirm_until < utc_now()))


def _first(store: Store, query: sa.Select[Any]) -> Subscription | None:
    with store.reading() as connection:
        row = connection.execute(query).mappings().first()
    return read_row(row) if row is not None else None


def read_row(row: Any) -> Subscription:
    """A subscription from its row."""
    plain = ("id", "nonce", "email", "user_id", "cadence", "timezone", "hour", "state", "created", "confirmed")
    rest = ("covered_to", "next_due", "refusals")
    watch = Watch(row["kind"], row["value"], row["family"])
    return Subscription(watch=watch, **{name: row[name] for name in (*plain, *rest)})
