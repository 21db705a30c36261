"""The first tables: sweeps, SAEs, their metrics and curves, artifacts, tags."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def _text(name: str, *, nullable: bool = True) -> sa.Column[str]:
    return sa.Column(name, sa.Text, nullable=nullable)


def _document(name: str) -> sa.Column:
    return sa.Column(name, sa.JSON().with_variant(JSONB(), "postgresql"))


def _time(name: str, *, nullable: bool = True) -> sa.Column:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)


def _key(table: str, *columns: str) -> sa.PrimaryKeyConstraint:
    return sa.PrimaryKeyConstraint(*columns, name=f"pk_{table}")


def _child(table: str, column: str, parent: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint([column], [f"{parent}.id"], name=f"fk_{table}_{column}", ondelete="CASCADE")


def upgrade() -> None:
    """Make all tables."""
    _make_runs()
    _make_numbers()
    op.create_table(
        "artifacts",
        _text("owner_kind", nullable=False),
        _text("owner_id", nullable=False),
        _text("name", nullable=False),
        _text("uri", nullable=False),
        _text("sha256"),
        sa.Column("bytes", sa.BigInteger),
        _key("artifacts", "owner_kind", "owner_id", "name"),
    )
    op.create_table(
        "tags",
        *(_text(name, nullable=False) for name in ("kind", "id", "tag")),
        _key("tags", "kind", "id", "tag"),
    )


def _make_runs() -> None:
    op.create_table(
        "sweeps",
        _text("id", nullable=False),
        _text("name", nullable=False),
        _time("created_at", nullable=False),
        _text("owner"),
        _text("note"),
        _document("config"),
        _text("evaluation_id"),
        _text("corpus_id"),
        _text("harvest_id"),
        _document("lineage"),
        _text("status", nullable=False),
        _time("started_at"),
        _time("ended_at"),
        _key("sweeps", "id"),
    )
    op.create_table(
        "saes",
        _text("id", nullable=False),
        _text("hook"),
        sa.Column("layer", sa.Integer),
        _text("kind"),
        sa.Column("d_in", sa.Integer),
        sa.Column("d_sae", sa.Integer),
        sa.Column("l1", sa.Float(53)),
        sa.Column("k", sa.Integer),
        sa.Column("seed", sa.BigInteger),
        _document("settings"),
        _text("status", nullable=False),
        _text("reason"),
        _document("record"),
        _time("created_at"),
        sa.Column("seconds", sa.Float(53)),
        *(_text(name) for name in ("owner", "note", "evaluation_id", "model_name", "model_digest", "model_revision")),
        *(_text(name) for name in ("corpus_id", "harvest_id", "code_version", "code_commit")),
        _key("saes", "id"),
    )
    op.create_table(
        "sweep_saes",
        _text("sweep_id", nullable=False),
        _text("sae_id", nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        _key("sweep_saes", "sweep_id", "sae_id"),
        _child("sweep_saes", "sweep_id", "sweeps"),
        _child("sweep_saes", "sae_id", "saes"),
    )
    op.create_index("ix_sweep_saes_sae_id", "sweep_saes", ["sae_id"])


def _make_numbers() -> None:
    op.create_table(
        "sae_metrics",
        *(_text(name, nullable=False) for name in ("sae_id", "evaluation_id", "name")),
        sa.Column("value", sa.Float(53)),
        _key("sae_metrics", "sae_id", "evaluation_id", "name"),
        _child("sae_metrics", "sae_id", "saes"),
    )
    op.create_table(
        "steps",
        _text("sae_id", nullable=False),
        sa.Column("step", sa.BigInteger, nullable=False),
        _text("name", nullable=False),
        sa.Column("value", sa.Float(53)),
        _key("steps", "sae_id", "step", "name"),
        _child("steps", "sae_id", "saes"),
        sqlite_with_rowid=False,
    )


def downgrade() -> None:
    """Drop all tables, children first."""
    for name in ("tags", "artifacts", "steps", "sae_metrics", "sweep_saes", "saes", "sweeps"):
        op.drop_table(name)
