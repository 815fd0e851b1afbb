"""Accounts by e-mail link: no passwords. A link signs in once, within minutes; a session lasts for weeks."""

import re
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from papertrial.feed import people_schema as tables
from papertrial.feed.delivery_schema import subscriptions
from papertrial.feed.store import Store, utc_now
from papertrial.site.errors import Problem
from papertrial.site.keys import new_token, token_hash
from papertrial.site.people import bounds, pulse

Role = Literal["reader", "admin", "blocked"]

#: Links in an hour that one address gets and does not use, and that the whole service sends to strangers.
LINKS_PER_ADDRESS = 5
LINKS_PER_HOUR = 500
_HOUR = timedelta(hours=1)
MAX_SESSIONS = 20

_ADDRESS = re.compile(r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.)*[A-Za-z0-9-]{1,63}")
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,37}[a-z0-9])?")
_RESERVED = frozenset(("admin", "administrator", "root", "papertrial", "me", "system", "support", "deleted"))


@dataclass(frozen=True, slots=True)
class Reader:
    """A person who is signed in, and by what: a session cookie or an API token."""

    id: int
    email: str
    name: str
    full_name: str
    role: Role
    created: datetime
    confirmed: datetime | None
    credential: Literal["session", "token"] = "session"
    scope: Literal["read", "write"] = "write"

    @property
    def shown_name(self) -> str:
        return self.full_name or self.name


@dataclass(frozen=True, slots=True)
class SignedInBy:
    """What a sign-in gives: the reader, and the new session's token for the cookie."""

    reader: Reader
    session: str
    new: bool


@dataclass(frozen=True, slots=True)
class SignInLink:
    """The token of a link, and for how many minutes it is good."""

    token: str
    minutes: int


def checked_email(text: str) -> str:
    """An e-mail address in the one form it is stored in.

    Raises
    ------
    Problem
        422 naming the field ``email``.
    """
    text = text.strip()
    if len(text) > 254 or not text.isascii() or not _ADDRESS.fullmatch(text):
        raise Problem(422, f"email: {text[:80]!r} is not an e-mail address", field="email")
    return text.lower()


# -- looking up -------------------------------------------------------------------------------------------------------


def reader_of_session(store: Store, hashed: str) -> Reader | None:
    """Whose session that is; None if it has ended."""
    users, sessions = tables.users, tables.sessions
    query = sa.select(users).join(sessions, sessions.c.user_id == users.c.id)
    return _one_reader(store, query.where(sessions.c.token_hash == hashed, sessions.c.expires > utc_now()))


def reader_of_token(store: Store, hashed: str) -> Reader | None:
    """Whose API token that is; its last use is noted to the hour."""
    users, tokens = tables.users, tables.api_tokens
    query = sa.select(users, tokens.c.scope, tokens.c.id.label("token_id"), tokens.c.last_used)
    query = query.join(tokens, tokens.c.user_id == users.c.id).where(tokens.c.token_hash == hashed)
    with store.reading() as connection:
        row = connection.execute(query).mappings().first()
    if row is None or row["role"] == "blocked":
        return None
    now = utc_now()
    if row["last_used"] is None or now - row["last_used"] > timedelta(hours=1):
        with store.writing() as connection:
            connection.execute(tokens.update().where(tokens.c.id == row["token_id"]).values(last_used=now))
    return _reader(row, credential="token", scope=row["scope"])


def reader_by_name(store: Store, name: str) -> Reader | None:
    """An account by its name."""
    return _one_reader(store, sa.select(tables.users).where(tables.users.c.name == name))


def id_of(store: Store, name: str) -> int:
    """The number of an account, also of a blocked one.

    Raises
    ------
    Problem
        404 where there is no such account.
    """
    with store.reading() as connection:
        found = connection.execute(sa.select(tables.users.c.id).where(tables.users.c.name == name)).scalar()
    if found is None:
        raise Problem(404, f"there is no account {name[:40]!r}", field="name")
    return int(found)


def _one_reader(store: Store, query: sa.Select[Any]) -> Reader | None:
    with store.reading() as connection:
        row = connection.execute(query).mappings().first()
    return _reader(row) if row is not None and row["role"] != "blocked" else None


def _reader(row: Any, **more: Any) -> Reader:
    names = ("id", "email", "name", "full_name", "role", "created", "confirmed")
    return Reader(**{name: row[name] for name in names}, **more)


# -- signing in -------------------------------------------------------------------------------------------------------


def make_sign_in_link(store: Store, email: str, *, minutes: int, unlimited: bool = False) -> str:
    """A token that signs `email` in once, for whoever has the machine; see `ask_for_link`.

    Raises
    ------
    Problem
        429 where too many links were asked for.
    """
    email, now = checked_email(email), utc_now()
    with store.writing() as connection:
        if not unlimited:
            _check_links(connection, email, now)
        return _insert_link(connection, email, minutes, now).token


def ask_for_link(store: Store, email: str, *, minutes: int, network: str, letters: int) -> SignInLink:
    """A link for a letter that somebody asked for, whoever that was.

    Nobody can lock another person out by asking for too many: the last letter that an address gets before its limit
    is reached has a link that is good until more letters are sent. The limit of the whole service is for strangers;
    an address with an account passes.

    Parameters
    ----------
    network, letters
        From where it was asked for, and how many letters an hour may be asked for from there (0: any number).

    Raises
    ------
    Problem
        422 for what is not an address; 429 where too many links were asked for.
    """
    email, now = checked_email(email), utc_now()
    with store.writing() as connection:
        _check_links(connection, email, now)
        bounds.count_letter(connection, network, letters, now)
        return _insert_link(connection, email, minutes, now)


def _check_links(connection: sa.Connection, email: str, now: datetime) -> None:
    links, users = tables.sign_in_links, tables.users
    unused = sa.select(links.c.created, links.c.expires).where(_sent_lately(email, now)).order_by(links.c.created)
    held = connection.execute(unused).all()
    if len(held) >= LINKS_PER_ADDRESS:
        wait = max(1, int((held[-LINKS_PER_ADDRESS].created + _HOUR - now).total_seconds()) + 1)
        raise Problem(
            429,
            f"{LINKS_PER_ADDRESS} letters went to this address within an hour; the link in the newest of them signs in "
            f"until {held[-1].expires:%H:%M} UTC",
            field="email",
            headers={"Retry-After": str(wait)},
        )
    sent = connection.execute(sa.select(sa.func.count()).where(links.c.created > now - _HOUR)).scalar_one()
    known = sa.select(users.c.id).where(users.c.email == email)
    if sent >= LINKS_PER_HOUR and connection.execute(known).first() is None:
        raise Problem(429, "too many sign-in links were asked for; try again in an hour", field="email")


def _sent_lately(email: str, now: datetime) -> sa.ColumnElement[bool]:
    """Links of the last hour that were not used; one that was shows that its letters are wanted."""
    links = tables.sign_in_links
    return sa.and_(links.c.email == email, links.c.created > now - _HOUR, links.c.used.is_(None))


def _insert_link(connection: sa.Connection, email: str, minutes: int, now: datetime) -> SignInLink:
    links, token = tables.sign_in_links, new_token()
    connection.execute(links.delete().where(links.c.created < now - timedelta(days=2)))
    lately = sa.select(sa.func.count()).where(_sent_lately(email, now))
    if connection.execute(lately).scalar_one() + 1 >= LINKS_PER_ADDRESS:
        minutes = max(minutes, int(_HOUR.total_seconds()) // 60)  # no other letter may come before then
    values = {"email": email, "created": now, "expires": now + timedelta(minutes=minutes)}
    connection.execute(links.insert().values(token_hash=token_hash(token), **values))
    return SignInLink(token, minutes)


def link_is_good(store: Store, token: str) -> bool:
    """Whether a link can still sign in; looking does not use it up (mail scanners look)."""
    links = tables.sign_in_links
    query = sa.select(links.c.email).where(links.c.token_hash == token_hash(token))
    with store.reading() as connection:
        row = connection.execute(query.where(links.c.used.is_(None), links.c.expires > utc_now())).first()
    return row is not None


def sign_in(store: Store, token: str, *, days: int, sign_up: bool = True) -> SignedInBy:
    """Use up a link: opens the account if the address has none yet, and begins a session.

    Raises
    ------
    Problem
        403 where the link is used or too old, the account is blocked, or new accounts are not taken.
    """
    links, users, now = tables.sign_in_links, tables.users, utc_now()
    with store.writing() as connection:
        good = (links.c.token_hash == token_hash(token), links.c.used.is_(None), links.c.expires > now)
        used = connection.execute(links.update().where(*good).values(used=now))
        if used.rowcount != 1:
            raise Problem(403, "this sign-in link was used already or is too old; ask for a new one", field="token")
        email = connection.execute(sa.select(links.c.email).where(links.c.token_hash == token_hash(token))).scalar_one()
        row: Any = connection.execute(sa.select(users).where(users.c.email == email)).mappings().first()
        new = row is None
        if row is None:
            if not sign_up:
                raise Problem(403, "this service takes no new accounts; ask its administrator")
            row = _add_user(connection, email, "reader", now)
        if row["role"] == "blocked":
            raise Problem(403, "this account is blocked")
        if row["confirmed"] is None:
            connection.execute(users.update().where(users.c.id == row["id"]).values(confirmed=now))
        session = _begin_session(connection, row["id"], now, days)
        row = connection.execute(sa.select(users).where(users.c.id == row["id"])).mappings().one()
    return SignedInBy(_reader(row), session, new)


def _add_user(connection: sa.Connection, email: str, role: Role, now: datetime) -> Any:
    """A new account; its name is made from the address and can be changed."""
    users = tables.users
    base = re.sub(r"[^a-z0-9]+", "-", email.partition("@")[0]).strip("-")[:30].strip("-") or "reader"
    if role == "admin":
        base = "admin"
    for attempt in range(20):
        free = base not in _RESERVED or role == "admin"
        name = base if attempt == 0 and free else f"{base}-{secrets.token_hex(2 + attempt // 5)}"
        values = {"email": email, "name": name, "full_name": "", "role": role, "created": now}
        try:
            with connection.begin_nested():
                added = connection.execute(users.insert().values(**values))
        except IntegrityError:
            continue
        user_id = added.inserted_primary_key[0]  # type: ignore[index]
        return connection.execute(sa.select(users).where(users.c.id == user_id)).mappings().one()
    raise Problem(409, "no free account name was found; try again")


def _begin_session(connection: sa.Connection, user_id: int, now: datetime, days: int) -> str:
    sessions = tables.sessions
    connection.execute(sessions.delete().where(sessions.c.expires < now))
    mine = sa.select(sessions.c.token_hash).where(sessions.c.user_id == user_id)
    oldest = connection.execute(mine.order_by(sessions.c.created.desc()).offset(MAX_SESSIONS - 1)).scalars().all()
    if oldest:
        connection.execute(sessions.delete().where(sessions.c.token_hash.in_(oldest)))
    token = new_token()
    values = {"user_id": user_id, "created": now, "expires": now + timedelta(days=days)}
    connection.execute(sessions.insert().values(token_hash=token_hash(token), **values))
    return token


def sign_out(store: Store, session: str, *, everywhere: bool = False) -> None:
    """End a session, or all sessions of its account."""
    sessions = tables.sessions
    mine = sessions.c.token_hash == token_hash(session)
    with store.writing() as connection:
        if everywhere:
            user = sa.select(sessions.c.user_id).where(mine).scalar_subquery()
            connection.execute(sessions.delete().where(sessions.c.user_id == user))
        connection.execute(sessions.delete().where(mine))


# -- the account ------------------------------------------------------------------------------------------------------


def ensure_admin(store: Store, email: str | None) -> str | None:
    """Make the administrator's account where there is none; its address if it never signed in, else None."""
    users = tables.users
    with store.writing() as connection:
        row = (
            connection.execute(sa.select(users).where(users.c.role == "admin").order_by(users.c.id)).mappings().first()
        )
        if row is None:
            address = checked_email(email or "admin@localhost")
            taken = connection.execute(sa.select(users).where(users.c.email == address)).mappings().first()
            if taken is not None:
                connection.execute(users.update().where(users.c.id == taken["id"]).values(role="admin"))
                return None
            row = _add_user(connection, address, "admin", utc_now())
        return str(row["email"]) if row["confirmed"] is None else None


def update_profile(store: Store, reader: Reader, *, name: str | None = None, full_name: str | None = None) -> Reader:
    """Change the name in addresses and the name that is shown.

    Raises
    ------
    Problem
        422 for a name that cannot be, 409 for one that is taken.
    """
    users, changes = tables.users, {}
    if name is not None and name != reader.name:
        if not _NAME.fullmatch(name) or name in _RESERVED:
            raise Problem(422, f"name: {name[:60]!r} cannot be a name; use 1-39 of a-z, 0-9 and -", field="name")
        changes["name"] = name
    if full_name is not None:
        full_name = " ".join(full_name.split())
        if len(full_name) > 100 or not full_name.isprintable():
            raise Problem(422, "full_name: at most 100 printable characters", field="full_name")
        changes["full_name"] = full_name
    with store.writing() as connection:
        if changes:
            try:
                connection.execute(users.update().where(users.c.id == reader.id).values(**changes))
            except IntegrityError:
                raise Problem(409, f"name: {name!r} is taken", field="name") from None
        row = connection.execute(sa.select(users).where(users.c.id == reader.id)).mappings().one()
    return _reader(row, credential=reader.credential, scope=reader.scope)


def delete_account(store: Store, user_id: int) -> None:
    """Delete an account with everything that belongs to it or its address. The last administrator cannot go.

    Raises
    ------
    Problem
        409 for the last administrator.
    """
    users = tables.users
    with store.writing() as connection:
        found = connection.execute(sa.select(users.c.role, users.c.email).where(users.c.id == user_id)).first()
        role, email = found or (None, None)
        admins = connection.execute(sa.select(sa.func.count()).where(users.c.role == "admin")).scalar_one()
        if role == "admin" and admins == 1:
            raise Problem(409, "the last administrator cannot be deleted; make another one first")
        touched: set[int] = set()
        for table in (tables.votes, tables.comments):
            mine = sa.select(table.c.paper_id).where(table.c.user_id == user_id)
            touched |= set(connection.execute(mine).scalars())
        connection.execute(users.delete().where(users.c.id == user_id))
        # Digests that the address asked for before it had an account belong to nobody else.
        for table in (subscriptions, tables.sign_in_links):
            connection.execute(table.delete().where(table.c.email == email))
        pulse.refresh(connection, sorted(touched))


def set_role(store: Store, user_id: int, role: Role) -> None:
    """Make an account a reader, an administrator or blocked; a blocked one is signed out at once."""
    users = tables.users
    with store.writing() as connection:
        admins = set(connection.execute(sa.select(users.c.id).where(users.c.role == "admin")).scalars())
        if admins == {user_id} and role != "admin":
            raise Problem(409, "the last administrator must stay one; make another one first")
        changed = connection.execute(users.update().where(users.c.id == user_id).values(role=role))
        if not changed.rowcount:
            raise Problem(404, "no such account")
        if role == "blocked":
            for table in (tables.sessions, tables.api_tokens):
                connection.execute(table.delete().where(table.c.user_id == user_id))
