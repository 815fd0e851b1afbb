"""The tables of delivery: saved searches, subscriptions to digests, and the queue of digests.

What they mean is in `papertrial.site.delivery`. Times are UTC. Links that confirm are kept as SHA-256 digests only;
those that unsubscribe are sealed with the service's key and hold the row's ``nonce``.
"""

from sqlalchemy import (
    Column,
    DateTime,
    ForeignKey,
    Index,
    Integer,
    String,
    Table,
    Text,
    UniqueConstraint,
)

from papertrial.feed.schema import RowId, metadata

saved_searches = Table(
    "saved_searches",
    metadata,
    Column("id", RowId, primary_key=True),
    Column("user_id", RowId, ForeignKey("users.id", ondelete="CASCADE"), nullable=False),
    Column("query", String(250), nullable=False),
    Column("family", String(40), nullable=False),  # empty: every family
    Column("created", DateTime, nullable=False),
    UniqueConstraint("user_id", "query", "family"),
    sqlite_autoincrement=True,
)

#: One digest that one address gets. ``covered_to`` is the moment up to which its papers were sent; ``next_due`` is None
#: until the address is confirmed.
subscriptions = Table(
    "subscriptions",
    metadata,
    Column("id", RowId, primary_key=True),
    Column("nonce", String(32), nullable=False),
    Column("email", String(254), nullable=False),
    Column("user_id", RowId, ForeignKey("users.id", ondelete="CASCADE")),
    Column("kind", String(10), nullable=False),  # feed, tag, topic or search
    Column("value", String(250), nullable=False),
    Column("family", String(40), nullable=False),
    Column("cadence", String(10), nullable=False),  # daily or weekly
    Column("timezone", String(60), nullable=False),
    Column("hour", Integer, nullable=False),
    Column("state", String(10), nullable=False),  # pending, active or bounced
    Column("created", DateTime, nullable=False),
    Column("confirm_hash", String(64), unique=True),
    Column("confirm_until", DateTime),
    Column("letter_sent", DateTime),
    Column("confirmed", DateTime),
    Column("covered_to", DateTime),
    Column("next_due", DateTime),
    Column("refusals", Integer, nullable=False),
    UniqueConstraint("email", "kind", "value", "family"),
    Index("ix_subscriptions_due", "state", "next_due"),
    Index("ix_subscriptions_user", "user_id"),
    Index("ix_subscriptions_letter", "letter_sent"),
    sqlite_autoincrement=True,
)

#: The queue, and what became of each digest; one a subscription and period, however many workers look.
digests = Table(
    "digests",
    metadata,
    Column("id", RowId, primary_key=True),
    Column("subscription_id", RowId, ForeignKey("subscriptions.id", ondelete="CASCADE"), nullable=False),
    Column("period", String(10), nullable=False),
    Column("starts", DateTime, nullable=False),
    Column("ends", DateTime, nullable=False),
    Column("state", String(10), nullable=False),  # due, building, sending, sent, empty, failed or unknown
    Column("holder", String(60)),
    Column("held_until", DateTime),
    Column("attempts", Integer, nullable=False),
    Column("next_try", DateTime, nullable=False),
    Column("papers", Integer, nullable=False),
    Column("message", Text, nullable=False),
    Column("finished", DateTime),
    UniqueConstraint("subscription_id", "period"),
    Index("ix_digests_queue", "state", "next_try"),
    Index("ix_digests_ends", "ends"),
    sqlite_autoincrement=True,
)

#: What makes the private feed addresses of an account; a new nonce makes the old addresses void.
feed_keys = Table(
    "feed_keys",
    metadata,
    Column("user_id", RowId, ForeignKey("users.id", ondelete="CASCADE"), primary_key=True, autoincrement=False),
    Column("nonce", String(32), nullable=False),
)

#: When this service first had some evidence: an upgrade brings evidence that was recorded long before.
evidence_seen = Table(
    "evidence_seen",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("slug", String(80), nullable=False),
    Column("first_seen", DateTime, nullable=False),
)
