"""Where feeds are. Those of a reader's tags are private: their addresses hold a key that nobody can guess.

The key is sealed with the service's own and a nonce of the account; a new nonce makes old addresses void. Until the
first of them is made void an account has no nonce: showing addresses writes nothing.
"""

import secrets
from urllib.parse import quote, urlencode

import sqlalchemy as sa

from papertrial.feed.delivery_schema import feed_keys
from papertrial.feed.people_schema import users
from papertrial.feed.store import Store
from papertrial.site import keys
from papertrial.site.context import Context
from papertrial.site.errors import Problem
from papertrial.site.people.accounts import Reader
from papertrial.site.people.writing import insert_new

FORMS = {"rss": "RSS", "atom": "Atom", "json": "JSON Feed"}
MEDIA_TYPES = {"rss": "application/rss+xml", "atom": "application/atom+xml", "json": "application/feed+json"}


def feeds(path: str, **parameters: str) -> dict[str, str]:
    """The addresses of a feed by format."""
    query = f"?{urlencode(parameters)}" if parameters else ""
    return {form: f"{path}.{form}{query}" for form in FORMS}


def public_feeds() -> dict[str, dict[str, str]]:
    """The feeds that are about everything, by what they hold."""
    return {"All papers": feeds("/feeds/papers"), "Verdicts": feeds("/feeds/verdicts")}


def tag_feeds(here: Context, reader: Reader, names: list[str]) -> dict[str, dict[str, str]]:
    """The private feeds of a reader's tags, by tag."""
    nonce = _nonce(here.store, reader.id)
    made = f"{reader.id}.{keys.seal(here.key, 'feed', f'{reader.id}.{nonce}')[:40]}"
    return {name: feeds(f"/feeds/tags/{made}/{quote(name, safe='')}") for name in names}


def owner_of(here: Context, feed_key: str) -> int:
    """The account that a private address belongs to.

    Raises
    ------
    Problem
        404 for an address that is void, or never was.
    """
    number, _, mac = feed_key.partition(".")
    user_id = int(number) if number.isascii() and number.isdecimal() and len(number) < 19 else 0
    nonce = _nonce(here.store, user_id)
    made = keys.seal(here.key, "feed", f"{user_id}.{nonce}")[:40]
    if nonce is None or not mac.isascii() or not secrets.compare_digest(made, mac):
        raise Problem(404, "there is no feed at this address, or it was made void", field="feed_key")
    return user_id


def renew(store: Store, user_id: int) -> None:
    """Make the addresses of an account's private feeds void."""
    with store.writing() as connection:
        connection.execute(feed_keys.delete().where(feed_keys.c.user_id == user_id))
        insert_new(connection, feed_keys, {"user_id": user_id, "nonce": secrets.token_hex(8)})


def _nonce(store: Store, user_id: int) -> str | None:
    """What is sealed for an account: empty at first; None where there is no such account, or it is blocked."""
    query = (
        sa.select(sa.func.coalesce(feed_keys.c.nonce, ""))
        .select_from(users.outerjoin(feed_keys, feed_keys.c.user_id == users.c.id))
        .where(users.c.id == user_id, users.c.role != "blocked")
    )
    with store.reading() as connection:
        found = connection.execute(query).scalar()
    return None if found is None else str(found)
