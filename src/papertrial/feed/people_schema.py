"""The tables of people: accounts, votes, comments, tags, collections, submissions.

They stand beside the catalogue's because a paper that is merged into another takes its votes and comments along
(`papertrial.feed.writing`), whichever command does the merging. What they mean is in `papertrial.site.people`.
Times are UTC. Secrets (session, sign-in and API tokens) are kept as SHA-256 digests only.
"""

from sqlalchemy import (
    Boolean,
    Column,
    DateTime,
    Float,
    ForeignKey,
    Index,
    Integer,
    String,
    Table,
    Text,
    UniqueConstraint,
)

from papertrial.feed.schema import RowId, metadata


def _user(name: str = "user_id", **options: object) -> Column[int]:
    return Column(name, RowId, ForeignKey("users.id", ondelete="CASCADE"), nullable=False, **options)  # type: ignore[arg-type]


def _paper(**options: object) -> Column[int]:
    return Column("paper_id", RowId, ForeignKey("papers.id", ondelete="CASCADE"), nullable=False, **options)  # type: ignore[arg-type]


users = Table(
    "users",
    metadata,
    Column("id", RowId, primary_key=True),
    Column("email", String(254), nullable=False, unique=True),
    Column("name", String(40), nullable=False, unique=True),
    Column("full_name", String(100), nullable=False),
    Column("role", String(10), nullable=False),  # reader, admin or blocked
    Column("created", DateTime, nullable=False),
    Column("confirmed", DateTime),
    sqlite_autoincrement=True,
)

sessions = Table(
    "sessions",
    metadata,
    Column("token_hash", String(64), primary_key=True),
    _user(),
    Column("created", DateTime, nullable=False),
    Column("expires", DateTime, nullable=False),
    Index("ix_sessions_user", "user_id"),
    Index("ix_sessions_expires", "expires"),
)

#: Links that were sent by e-mail; each signs in once.
sign_in_links = Table(
    "sign_in_links",
    metadata,
    Column("token_hash", String(64), primary_key=True),
    Column("email", String(254), nullable=False),
    Column("created", DateTime, nullable=False),
    Column("expires", DateTime, nullable=False),
    Column("used", DateTime),
    Index("ix_sign_in_links_email", "email", "created"),
    Index("ix_sign_in_links_created", "created"),
)

#: Letters that a client's network caused in an hour; kept until that hour is past.
letter_counts = Table(
    "letter_counts",
    metadata,
    Column("network", String(64), primary_key=True),
    Column("hour", DateTime, primary_key=True),
    Column("letters", Integer, nullable=False),
)

api_tokens = Table(
    "api_tokens",
    metadata,
    Column("id", RowId, primary_key=True),
    _user(),
    Column("name", String(60), nullable=False),
    Column("token_hash", String(64), nullable=False, unique=True),
    Column("scope", String(10), nullable=False),  # read or write
    Column("created", DateTime, nullable=False),
    Column("last_used", DateTime),
    Index("ix_api_tokens_user", "user_id"),
    sqlite_autoincrement=True,
)

votes = Table(
    "votes",
    metadata,
    _paper(primary_key=True, autoincrement=False),
    _user(primary_key=True, autoincrement=False),
    Column("weight", Float, nullable=False),
    Column("cast_at", DateTime, nullable=False),
    Index("ix_votes_user", "user_id", "cast_at"),
)

comments = Table(
    "comments",
    metadata,
    Column("id", RowId, primary_key=True),
    _paper(),
    _user(),
    Column("parent_id", RowId, ForeignKey("comments.id", ondelete="SET NULL")),
    Column("body", Text, nullable=False),
    Column("created", DateTime, nullable=False),
    Column("edited", DateTime),
    Column("removed", DateTime),
    Index("ix_comments_paper", "paper_id", "id"),
    Index("ix_comments_user", "user_id", "created"),
    Index("ix_comments_parent", "parent_id"),
    sqlite_autoincrement=True,
)

tags = Table(
    "tags",
    metadata,
    _user(primary_key=True, autoincrement=False),
    Column("name", String(40), primary_key=True),
    _paper(primary_key=True, autoincrement=False),
    Column("created", DateTime, nullable=False),
    Index("ix_tags_paper", "paper_id"),
)

collections = Table(
    "collections",
    metadata,
    Column("id", RowId, primary_key=True),
    _user(),
    Column("slug", String(80), nullable=False),
    Column("title", String(120), nullable=False),
    Column("note", Text, nullable=False),
    Column("public", Boolean, nullable=False),
    Column("created", DateTime, nullable=False),
    Column("updated", DateTime, nullable=False),
    UniqueConstraint("user_id", "slug"),
    Index("ix_collections_updated", "public", "updated"),
    sqlite_autoincrement=True,
)

collection_items = Table(
    "collection_items",
    metadata,
    Column(
        "collection_id",
        RowId,
        ForeignKey("collections.id", ondelete="CASCADE"),
        primary_key=True,
        autoincrement=False,
    ),
    _paper(primary_key=True, autoincrement=False),
    Column("position", Integer, nullable=False),
    Column("note", Text, nullable=False),
    Column("added", DateTime, nullable=False),
    Index("ix_collection_items_paper", "paper_id"),
)

#: Papers that a reader does not want to be shown again.
hidden = Table(
    "hidden",
    metadata,
    _user(primary_key=True, autoincrement=False),
    _paper(primary_key=True, autoincrement=False),
    Column("created", DateTime, nullable=False),
    Index("ix_hidden_paper", "paper_id"),
)

submissions = Table(
    "submissions",
    metadata,
    Column("id", RowId, primary_key=True),
    _user(),
    Column("arxiv_id", String(40)),
    Column("url", Text, nullable=False),
    Column("for_feed", Boolean, nullable=False),
    Column("state", String(10), nullable=False),  # waiting, done or refused
    Column("message", Text, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("paper_id", RowId, ForeignKey("papers.id", ondelete="SET NULL")),
    Column("created", DateTime, nullable=False),
    Column("finished", DateTime),
    Index("ix_submissions_user", "user_id", "created"),
    Index("ix_submissions_state", "state", "created"),
    Index("ix_submissions_paper", "paper_id"),
    sqlite_autoincrement=True,
)

#: What people here did with a paper, summed; derived from votes and comments and made anew from them at any time.
pulse = Table(
    "pulse",
    metadata,
    _paper(primary_key=True, autoincrement=False),
    Column("votes", Integer, nullable=False),
    Column("comments", Integer, nullable=False),
    Column("commenters", Integer, nullable=False),
    Column("weight", Float, nullable=False),
    Column("heat", Float, nullable=False),
    Index("ix_pulse_heat", "heat", "paper_id"),
)

#: Which process does a background job, until when; several workers on one database do each job once.
leases = Table(
    "leases",
    metadata,
    Column("name", String(60), primary_key=True),
    Column("holder", String(60), nullable=False),
    Column("until", DateTime, nullable=False),
    Column("last_done", DateTime),
)
