"""People: accounts, votes, comments, tags, collections, submissions, and the leases of background jobs."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

ROW = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table(
        "users",
        sa.Column("id", ROW, primary_key=True),
        sa.Column("email", sa.String(254), nullable=False, unique=True),
        sa.Column("name", sa.String(40), nullable=False, unique=True),
        sa.Column("full_name", sa.String(100), nullable=False),
        sa.Column("role", sa.String(10), nullable=False),
        sa.Column("created", sa.DateTime, nullable=False),
        sa.Column("confirmed", sa.DateTime),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "sessions",
        sa.Column("token_hash", sa.String(64), primary_key=True),
        sa.Column("user_id", ROW, sa.ForeignKey("users.id", ondelete="CASCADE"), nullable=False),
        sa.Column("created", sa.DateTime, nullable=False),
        sa.Column("expires", sa.DateTime, nullable=False),
    )
    op.create_index("ix_sessions_expires", "sessions", ["expires"])
    op.create_index("ix_sessions_user", "sessions", ["user_id"])
    op.create_table(
        "sign_in_links",
        sa.Column("token_hash", sa.String(64), primary_key=True),
        sa.Column("email", sa.String(254), nullable=False),
        sa.Column("created", sa.DateTime, nullable=False),
        sa.Column("expires", sa.DateTime, nullable=False),
        sa.Column("used", sa.DateTime),
    )
    op.create_index("ix_sign_in_links_created", "sign_in_links", ["created"])
    op.create_index("ix_sign_in_links_email", "sign_in_links", ["email", "created"])
    op.create_table(
        "api_tokens",
        sa.Column("id", ROW, primary_key=True),
        sa.Column("user_id", ROW, sa.ForeignKey("users.id", ondelete="CASCADE"), nullable=False),
        sa.Column("name", sa.String(60), nullable=False),
        sa.Column("token_hash", sa.String(64), nullable=False, unique=True),
        sa.Column("scope", sa.String(10), nullable=False),
        sa.Column("created", sa.DateTime, nullable=False),
        sa.Column("last_used", sa.DateTime),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_api_tokens_user", "api_tokens", ["user_id"])
    op.create_table(
        "votes",
        sa.Column(
            "paper_id", ROW, sa.ForeignKey("papers.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
        ),
        sa.Column("user_id", ROW, sa.ForeignKey("users.id", ondelete="CASCADE"), primary_key=True, autoincrement=False),
        sa.Column("weight", sa.Float, nullable=False),
        sa.Column("cast_at", sa.DateTime, nullable=False),
    )
    op.create_index("ix_votes_user", "votes", ["user_id", "cast_at"])
    op.create_table(
        "comments",
        sa.Column("id", ROW, primary_key=True),
        sa.Column("paper_id", ROW, sa.ForeignKey("papers.id", ondelete="CASCADE"), nullable=False),
        sa.Column("user_id", ROW, sa.ForeignKey("users.id", ondelete="CASCADE"), nullable=False),
        sa.Column("parent_id", ROW, sa.ForeignKey("comments.id", ondelete="SET NULL")),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("created", sa.DateTime, nullable=False),
        sa.Column("edited", sa.DateTime),
        sa.Column("removed", sa.DateTime),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_comments_paper", "comments", ["paper_id", "id"])
    op.create_index("ix_comments_parent", "comments", ["parent_id"])
    op.create_index("ix_comments_user", "comments", ["user_id", "created"])
    op.create_table(
        "tags",
        sa.Column("user_id", ROW, sa.ForeignKey("users.id", ondelete="CASCADE"), primary_key=True, autoincrement=False),
        sa.Column("name", sa.String(40), primary_key=True),
        sa.Column(
            "paper_id", ROW, sa.ForeignKey("papers.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
        ),
        sa.Column("created", sa.DateTime, nullable=False),
    )
    op.create_index("ix_tags_paper", "tags", ["paper_id"])
    op.create_table(
        "collections",
        sa.Column("id", ROW, primary_key=True),
        sa.Column("user_id", ROW, sa.ForeignKey("users.id", ondelete="CASCADE"), nullable=False),
        sa.Column("slug", sa.String(80), nullable=False),
        sa.Column("title", sa.String(120), nullable=False),
        sa.Column("note", sa.Text, nullable=False),
        sa.Column("public", sa.Boolean, nullable=False),
        sa.Column("created", sa.DateTime, nullable=False),
        sa.Column("updated", sa.DateTime, nullable=False),
        sa.UniqueConstraint("user_id", "slug"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_collections_updated", "collections", ["public", "updated"])
    op.create_table(
        "collection_items",
        sa.Column(
            "collection_id",
            ROW,
            sa.ForeignKey("collections.id", ondelete="CASCADE"),
            primary_key=True,
            autoincrement=False,
        ),
        sa.Column(
            "paper_id", ROW, sa.ForeignKey("papers.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
        ),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("note", sa.Text, nullable=False),
        sa.Column("added", sa.DateTime, nullable=False),
    )
    op.create_index("ix_collection_items_paper", "collection_items", ["paper_id"])
    op.create_table(
        "hidden",
        sa.Column("user_id", ROW, sa.ForeignKey("users.id", ondelete="CASCADE"), primary_key=True, autoincrement=False),
        sa.Column(
            "paper_id", ROW, sa.ForeignKey("papers.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
        ),
        sa.Column("created", sa.DateTime, nullable=False),
    )
    op.create_index("ix_hidden_paper", "hidden", ["paper_id"])
    op.create_table(
        "submissions",
        sa.Column("id", ROW, primary_key=True),
        sa.Column("user_id", ROW, sa.ForeignKey("users.id", ondelete="CASCADE"), nullable=False),
        sa.Column("arxiv_id", sa.String(40)),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("for_feed", sa.Boolean, nullable=False),
        sa.Column("state", sa.String(10), nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("paper_id", ROW, sa.ForeignKey("papers.id", ondelete="SET NULL")),
        sa.Column("created", sa.DateTime, nullable=False),
        sa.Column("finished", sa.DateTime),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_submissions_paper", "submissions", ["paper_id"])
    op.create_index("ix_submissions_state", "submissions", ["state", "created"])
    op.create_index("ix_submissions_user", "submissions", ["user_id", "created"])
    op.create_table(
        "pulse",
        sa.Column(
            "paper_id", ROW, sa.ForeignKey("papers.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
        ),
        sa.Column("votes", sa.Integer, nullable=False),
        sa.Column("comments", sa.Integer, nullable=False),
        sa.Column("commenters", sa.Integer, nullable=False),
        sa.Column("weight", sa.Float, nullable=False),
        sa.Column("heat", sa.Float, nullable=False),
    )
    op.create_index("ix_pulse_heat", "pulse", ["heat", "paper_id"])
    op.create_table(
        "leases",
        sa.Column("name", sa.String(60), primary_key=True),
        sa.Column("holder", sa.String(60), nullable=False),
        sa.Column("until", sa.DateTime, nullable=False),
        sa.Column("last_done", sa.DateTime),
    )


def downgrade() -> None:
    for table in (
        "leases",
        "pulse",
        "submissions",
        "hidden",
        "collection_items",
        "collections",
        "tags",
        "comments",
        "votes",
        "api_tokens",
        "sign_in_links",
        "sessions",
        "users",
    ):
        op.drop_table(table)
