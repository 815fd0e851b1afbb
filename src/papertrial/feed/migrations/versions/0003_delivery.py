"""Delivery: saved searches, subscriptions, the queue of digests, keys of private feeds."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

ROW = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table(
        "saved_searches",
        sa.Column("id", ROW, primary_key=True),
        sa.Column("user_id", ROW, sa.ForeignKey("users.id", ondelete="CASCADE"), nullable=False),
        sa.Column("query", sa.String(250), nullable=False),
        sa.Column("family", sa.String(40), nullable=False),
        sa.Column("created", sa.DateTime, nullable=False),
        sa.UniqueConstraint("user_id", "query", "family"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "subscriptions",
        sa.Column("id", ROW, primary_key=True),
        sa.Column("nonce", sa.String(32), nullable=False),
        sa.Column("email", sa.String(254), nullable=False),
        sa.Column("user_id", ROW, sa.ForeignKey("users.id", ondelete="CASCADE")),
        sa.Column("kind", sa.String(10), nullable=False),
        sa.Column("value", sa.String(250), nullable=False),
        sa.Column("family", sa.String(40), nullable=False),
        sa.Column("cadence", sa.String(10), nullable=False),
        sa.Column("timezone", sa.String(60), nullable=False),
        sa.Column("hour", sa.Integer, nullable=False),
        sa.Column("state", sa.String(10), nullable=False),
        sa.Column("created", sa.DateTime, nullable=False),
        sa.Column("confirm_hash", sa.String(64), unique=True),
        sa.Column("confirm_until", sa.DateTime),
        sa.Column("letter_sent", sa.DateTime),
        sa.Column("confirmed", sa.DateTime),
        sa.Column("covered_to", sa.DateTime),
        sa.Column("next_due", sa.DateTime),
        sa.Column("refusals", sa.Integer, nullable=False),
        sa.UniqueConstraint("email", "kind", "value", "family"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_subscriptions_due", "subscriptions", ["state", "next_due"])
    op.create_index("ix_subscriptions_user", "subscriptions", ["user_id"])
    op.create_index("ix_subscriptions_letter", "subscriptions", ["letter_sent"])
    op.create_table(
        "digests",
        sa.Column("id", ROW, primary_key=True),
        sa.Column("subscription_id", ROW, sa.ForeignKey("subscriptions.id", ondelete="CASCADE"), nullable=False),
        sa.Column("period", sa.String(10), nullable=False),
        sa.Column("starts", sa.DateTime, nullable=False),
        sa.Column("ends", sa.DateTime, nullable=False),
        sa.Column("state", sa.String(10), nullable=False),
        sa.Column("holder", sa.String(60)),
        sa.Column("held_until", sa.DateTime),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("next_try", sa.DateTime, nullable=False),
        sa.Column("papers", sa.Integer, nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("finished", sa.DateTime),
        sa.UniqueConstraint("subscription_id", "period"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_digests_queue", "digests", ["state", "next_try"])
    op.create_index("ix_digests_ends", "digests", ["ends"])
    op.create_table(
        "feed_keys",
        sa.Column("user_id", ROW, sa.ForeignKey("users.id", ondelete="CASCADE"), primary_key=True, autoincrement=False),
        sa.Column("nonce", sa.String(32), nullable=False),
    )


def downgrade() -> None:
    for table in ("feed_keys", "digests", "subscriptions", "saved_searches"):
        op.drop_table(table)
