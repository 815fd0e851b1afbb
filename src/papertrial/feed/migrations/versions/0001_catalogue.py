"""The catalogue: papers, their titles and topics, removals, counters, ingest runs and fetch cursors."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "papers",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=False),
        sa.Column("arxiv_id", sa.String(40), unique=True),
        sa.Column("arxiv_version", sa.Integer),
        sa.Column("slug", sa.String(80), unique=True),
        sa.Column("family", sa.String(80)),
        sa.Column("title", sa.Text, nullable=False),
        sa.Column("abstract", sa.Text),
        sa.Column("summary", sa.Text),
        sa.Column("ai_summary", sa.Text),
        sa.Column("authors", sa.JSON, nullable=False),
        sa.Column("author_count", sa.Integer),
        sa.Column("published", sa.Date),
        sa.Column("published_precision", sa.String(5), nullable=False),
        sa.Column("entered", sa.Date),
        sa.Column("listed", sa.Date),
        sa.Column("feed_day", sa.Date, nullable=False),
        sa.Column("feed_precision", sa.String(5), nullable=False),
        sa.Column("organisation", sa.String(200)),
        sa.Column("comment_count", sa.Integer, nullable=False),
        sa.Column("upvotes", sa.Integer, nullable=False),
        sa.Column("categories", sa.JSON, nullable=False),
        sa.Column("keywords", sa.JSON, nullable=False),
        sa.Column("code_url", sa.Text),
        sa.Column("project_url", sa.Text),
        sa.Column("pdf_url", sa.Text),
        sa.Column("sources", sa.JSON, nullable=False),
        sa.Column("origins", sa.JSON, nullable=False),
        sa.Column("heat", sa.Float, nullable=False),
        sa.Column("first_seen", sa.DateTime, nullable=False),
        sa.Column("updated", sa.DateTime, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_papers_feed", "papers", ["feed_day", "upvotes", "id"])
    op.create_index("ix_papers_organisation", "papers", ["organisation", "feed_day", "upvotes", "id"])
    op.create_index("ix_papers_family", "papers", ["family", "feed_day", "upvotes", "id"])
    op.create_index("ix_papers_heat", "papers", ["heat", "id"])
    op.create_index("ix_papers_revision", "papers", ["revision"], unique=True)
    op.create_table(
        "titles",
        sa.Column("title_key", sa.String(20), primary_key=True),
        sa.Column(
            "paper_id",
            sa.BigInteger,
            sa.ForeignKey("papers.id", ondelete="CASCADE"),
            primary_key=True,
            autoincrement=False,
        ),
    )
    op.create_index("ix_titles_paper", "titles", ["paper_id"])
    op.create_table(
        "topics",
        sa.Column("topic", sa.String(200), primary_key=True),
        sa.Column(
            "paper_id",
            sa.BigInteger,
            sa.ForeignKey("papers.id", ondelete="CASCADE"),
            primary_key=True,
            autoincrement=False,
        ),
        sa.Column("feed_day", sa.Date, nullable=False),
    )
    op.create_index("ix_topics_feed", "topics", ["topic", "feed_day", "paper_id"])
    op.create_index("ix_topics_paper", "topics", ["paper_id"])
    op.create_table(
        "removals",
        sa.Column(
            "paper_id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=False
        ),
        sa.Column("key", sa.String(40), nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_removals_revision", "removals", ["revision"])
    op.create_table(
        "counters",
        sa.Column("name", sa.String(20), primary_key=True),
        sa.Column("value", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "ingest_runs",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("source", sa.String(200), nullable=False),
        sa.Column("started", sa.DateTime, nullable=False),
        sa.Column("finished", sa.DateTime),
        sa.Column("added", sa.Integer, nullable=False),
        sa.Column("updated", sa.Integer, nullable=False),
        sa.Column("unchanged", sa.Integer, nullable=False),
        sa.Column("problem_count", sa.Integer, nullable=False),
        sa.Column("problems", sa.JSON, nullable=False),
        sa.Column("error", sa.Text),
    )
    op.create_index("ix_ingest_runs_started", "ingest_runs", ["started"])
    op.create_table(
        "fetch_cursors",
        sa.Column("name", sa.String(300), primary_key=True),
        sa.Column("value", sa.JSON, nullable=False),
        sa.Column("updated", sa.DateTime, nullable=False),
    )
    counters = sa.table("counters", sa.column("name", sa.String), sa.column("value", sa.BigInteger))
    op.bulk_insert(counters, [{"name": name, "value": 0} for name in ("paper_id", "papers", "revision")])


def downgrade() -> None:
    for table in ("fetch_cursors", "ingest_runs", "counters", "removals", "topics", "titles", "papers"):
        op.drop_table(table)
