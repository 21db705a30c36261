"""A table of features: the scalars of each feature of an SAE."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "features",
        sa.Column("sae_id", sa.Text, sa.ForeignKey("saes.id", ondelete="CASCADE", name="fk_features_sae_id")),
        sa.Column("features_id", sa.Text),
        sa.Column("index", sa.Integer),
        sa.Column("count", sa.BigInteger, nullable=False),
        sa.Column("firing_rate", sa.Float(53), nullable=False),
        sa.Column("mean", sa.Float(53), nullable=False),
        sa.Column("max", sa.Float(53), nullable=False),
        sa.Column("top_tokens", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("sae_id", "features_id", "index", name="pk_features"),
    )


def downgrade() -> None:
    """Drop it."""
    op.drop_table("features")
