"""PostgreSQL: the vectors of papers, which all machines of a service share. SQLite keeps them in files."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


class Codes(sa.types.UserDefinedType):  # type: ignore[type-arg]
    cache_ok = True

    def get_col_spec(self, **_: object) -> str:
        return "halfvec(384)"


def upgrade() -> None:
    if op.get_bind().dialect.name != "postgresql":
        return
    op.execute("CREATE EXTENSION IF NOT EXISTS vector")
    op.create_table(
        "paper_vectors",
        sa.Column(
            "paper_id",
            sa.BigInteger,
            sa.ForeignKey("papers.id", ondelete="CASCADE"),
            primary_key=True,
            autoincrement=False,
        ),
        sa.Column("encoder", sa.String(200), nullable=False),
        sa.Column("digest", sa.BigInteger, nullable=False),
        sa.Column("codes", Codes(), nullable=False),
    )
    op.create_index(
        "ix_paper_vectors_codes",
        "paper_vectors",
        ["codes"],
        postgresql_using="hnsw",
        postgresql_with={"m": 16, "ef_construction": 64},
        postgresql_ops={"codes": "halfvec_cosine_ops"},
    )


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.drop_table("paper_vectors")
