"""The tables of the catalogue. `migrations/` builds them; a test holds the two together."""

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Date,
    DateTime,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)

#: The revision that the code expects the database to be at: the newest file in `migrations/versions`.
HEAD = "0005"

metadata = MetaData()

#: SQLite makes only a column that is declared INTEGER the key of its own row tree.
RowId = BigInteger().with_variant(Integer, "sqlite")

papers = Table(
    "papers",
    metadata,
    Column("id", RowId, primary_key=True, autoincrement=False),
    Column("arxiv_id", String(40), unique=True),
    Column("arxiv_version", Integer),
    Column("slug", String(80), unique=True),
    Column("family", String(80)),
    Column("title", Text, nullable=False),
    Column("abstract", Text),
    Column("summary", Text),
    Column("ai_summary", Text),
    Column("authors", JSON, nullable=False),
    Column("author_count", Integer),
    Column("published", Date),
    Column("published_precision", String(5), nullable=False),
    Column("entered", Date),
    Column("listed", Date),
    Column("feed_day", Date, nullable=False),
    Column("feed_precision", String(5), nullable=False),
    Column("organisation", String(200)),
    Column("comment_count", Integer, nullable=False),
    Column("upvotes", Integer, nullable=False),
    Column("categories", JSON, nullable=False),
    Column("keywords", JSON, nullable=False),
    Column("code_url", Text),
    Column("project_url", Text),
    Column("pdf_url", Text),
    Column("sources", JSON, nullable=False),
    Column("origins", JSON, nullable=False),
    Column("heat", Float, nullable=False),
    Column("first_seen", DateTime, nullable=False),
    Column("updated", DateTime, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Index("ix_papers_feed", "feed_day", "upvotes", "id"),
    Index("ix_papers_organisation", "organisation", "feed_day", "upvotes", "id"),
    Index("ix_papers_family", "family", "feed_day", "upvotes", "id"),
    Index("ix_papers_heat", "heat", "id"),
    Index("ix_papers_revision", "revision", unique=True),
)

#: Every title under which a paper was ever seen, so that a page with an old title still finds it.
titles = Table(
    "titles",
    metadata,
    Column("title_key", String(20), primary_key=True),
    Column("paper_id", BigInteger, ForeignKey("papers.id", ondelete="CASCADE"), primary_key=True, autoincrement=False),
    Index("ix_titles_paper", "paper_id"),
)

#: The categories of a paper, for listings by topic; `feed_day` is repeated here so that one index serves them.
topics = Table(
    "topics",
    metadata,
    Column("topic", String(200), primary_key=True),
    Column("paper_id", BigInteger, ForeignKey("papers.id", ondelete="CASCADE"), primary_key=True, autoincrement=False),
    Column("feed_day", Date, nullable=False),
    Index("ix_topics_feed", "topic", "feed_day", "paper_id"),
    Index("ix_topics_paper", "paper_id"),
)

#: Papers that are no more (merged, or out of scope and known from nowhere else), for indices to drop.
removals = Table(
    "removals",
    metadata,
    Column("paper_id", RowId, primary_key=True, autoincrement=False),
    Column("key", String(40), nullable=False),
    Column("revision", BigInteger, nullable=False),
    Index("ix_removals_revision", "revision"),
)

#: `revision`, `paper_id` and `papers`; a writer holds this table's rows, so revisions are seen in order.
counters = Table(
    "counters",
    metadata,
    Column("name", String(20), primary_key=True),
    Column("value", BigInteger, nullable=False),
)

ingest_runs = Table(
    "ingest_runs",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("source", String(200), nullable=False),
    Column("started", DateTime, nullable=False),
    Column("finished", DateTime),
    Column("added", Integer, nullable=False),
    Column("updated", Integer, nullable=False),
    Column("unchanged", Integer, nullable=False),
    Column("problem_count", Integer, nullable=False),
    Column("problems", JSON, nullable=False),
    Column("error", Text),
    Index("ix_ingest_runs_started", "started"),
)

#: Where an interrupted fetch goes on.
fetch_cursors = Table(
    "fetch_cursors",
    metadata,
    Column("name", String(300), primary_key=True),
    Column("value", JSON, nullable=False),
    Column("updated", DateTime, nullable=False),
)

# The tables of people and of delivery belong to the same metadata, whoever opens the database.
import papertrial.feed.delivery_schema  # noqa: E402
import papertrial.feed.people_schema  # noqa: E402, F401
