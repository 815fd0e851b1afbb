"""Letters counted by the network that caused them; evidence, and when this service first had it."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_table(
        "letter_counts",
        sa.Column("network", sa.String(64), primary_key=True),
        sa.Column("hour", sa.DateTime, primary_key=True),
        sa.Column("letters", sa.Integer, nullable=False),
    )
    op.create_table(
        "evidence_seen",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("slug", sa.String(80), nullable=False),
        sa.Column("first_seen", sa.DateTime, nullable=False),
    )


def downgrade() -> None:
    op.drop_table("evidence_seen")
    op.drop_table("letter_counts")
