"""API tokens: shown once, kept as a digest, with a scope."""

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import sqlalchemy as sa

from papertrial.feed import people_schema as tables
from papertrial.feed.store import Store, utc_now
from papertrial.site.errors import Problem
from papertrial.site.keys import new_token, token_hash
from papertrial.site.people.accounts import Reader

#: What a token of ours begins with: leaks are found by it, and tokens of other services are told apart.
PREFIX = "pt_"
MOST = 20
Scope = Literal["read", "write"]


@dataclass(frozen=True, slots=True)
class Token:
    """What is known of a token after it was shown."""

    id: int
    name: str
    scope: Scope
    created: datetime
    last_used: datetime | None


def make_token(store: Store, reader: Reader, name: str, scope: Scope) -> tuple[str, Token]:
    """A new token and what is kept of it.

    Raises
    ------
    Problem
        422 for a name of no or more than 60 characters; 409 beyond `MOST` tokens.
    """
    name = " ".join(name.split())
    if not 1 <= len(name) <= 60:
        raise Problem(422, "name: a token needs a name of 1 to 60 characters", field="name")
    if scope not in ("read", "write"):
        raise Problem(422, f"scope: {scope!r} is neither read nor write", field="scope")
    table, token, now = tables.api_tokens, new_token(PREFIX), utc_now()
    with store.writing() as connection:
        mine = sa.select(sa.func.count()).select_from(table).where(table.c.user_id == reader.id)
        if connection.execute(mine).scalar_one() >= MOST:
            raise Problem(409, f"at most {MOST} tokens; revoke one first")
        values = {"user_id": reader.id, "name": name, "scope": scope, "created": now}
        added = connection.execute(table.insert().values(token_hash=token_hash(token), **values))
    return token, Token(added.inserted_primary_key[0], name, scope, now, None)  # type: ignore[index]


def tokens_of(store: Store, user_id: int) -> list[Token]:
    """An account's tokens, newest first."""
    table = tables.api_tokens
    query = sa.select(table.c.id, table.c.name, table.c.scope, table.c.created, table.c.last_used)
    with store.reading() as connection:
        rows = connection.execute(query.where(table.c.user_id == user_id).order_by(table.c.id.desc())).all()
    return [Token(*row) for row in rows]


def revoke_token(store: Store, user_id: int, token_id: int) -> None:
    """A token is good no longer, from now on.

    Raises
    ------
    Problem
        404 where the account has no such token.
    """
    table = tables.api_tokens
    with store.writing() as connection:
        gone = connection.execute(table.delete().where(table.c.id == token_id, table.c.user_id == user_id))
    if not gone.rowcount:
        raise Problem(404, "you have no such token")
