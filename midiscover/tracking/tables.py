"""The tables of the tracker. `migrations/` builds them; a test holds the two together.

Ids are the content ids of the store. Times are UTC. Numbers that are not finite are stored as NULL, because neither
JSONB nor SQLite keeps a NaN.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    TypeDecorator,
)
from sqlalchemy.dialects.postgresql import JSONB


class UtcTime(TypeDecorator[datetime]):
    """An aware datetime, in UTC on both sides. SQLite keeps no zone, so it is put back on reading.

    The signatures are SQLAlchemy's; the dialect does not matter here.
    """

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """Refuse a naive time, whose zone nobody knows."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value} has no time zone; give an aware datetime")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """PostgreSQL answers in the session's zone, SQLite without one."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


Document = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
    }
)


def _child_of(table: str) -> Any:
    return ForeignKey(f"{table}.id", ondelete="CASCADE")


sweeps = Table(
    "sweeps",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("owner", Text),
    Column("note", Text),
    Column("config", Document),
    Column("evaluation_id", Text),
    Column("corpus_id", Text),
    Column("harvest_id", Text),
    Column("lineage", Document),
    Column("status", Text, nullable=False),
    Column("started_at", UtcTime),
    Column("ended_at", UtcTime),
)

saes = Table(
    "saes",
    metadata,
    Column("id", Text, primary_key=True),
    Column("hook", Text),
    Column("layer", Integer),
    Column("kind", Text),
    Column("d_in", Integer),
    Column("d_sae", Integer),
    Column("l1", Float(53)),
    Column("k", Integer),
    Column("seed", BigInteger),
    Column("settings", Document),
    Column("status", Text, nullable=False),
    Column("reason", Text),
    Column("record", Document),
    Column("created_at", UtcTime),
    Column("seconds", Float(53)),
    Column("owner", Text),
    Column("note", Text),
    Column("evaluation_id", Text),
    Column("model_name", Text),
    Column("model_digest", Text),
    Column("model_revision", Text),
    Column("corpus_id", Text),
    Column("harvest_id", Text),
    Column("code_version", Text),
    Column("code_commit", Text),
    Column("output_hook", Text),
    Column("control", Text),
    Column("sparsity", Text),
    Column("target_l0", Float(53)),
)
"""What was planned (hook to settings, and the last four), then what the record says. NULL until it is known.

`sparsity` is what sets the sparsity, for people: `l1 3`, `k 32`, `L0 60`.
"""

sweep_saes = Table(
    "sweep_saes",
    metadata,
    Column("sweep_id", Text, _child_of("sweeps"), primary_key=True),
    Column("sae_id", Text, _child_of("saes"), primary_key=True),
    Column("position", Integer, nullable=False),
    Index(None, "sae_id"),
)
"""An SAE may belong to many sweeps; `position` keeps the order of the grid."""

sae_metrics = Table(
    "sae_metrics",
    metadata,
    Column("sae_id", Text, _child_of("saes"), primary_key=True),
    Column("evaluation_id", Text, primary_key=True),
    Column("name", Text, primary_key=True),
    Column("value", Float(53)),
)
"""The final scalars. An SAE that two sweeps measure in different ways has both sets."""

steps = Table(
    "steps",
    metadata,
    Column("sae_id", Text, _child_of("saes"), primary_key=True),
    Column("step", BigInteger, primary_key=True),
    Column("name", Text, primary_key=True),
    Column("value", Float(53)),
    sqlite_with_rowid=False,
)

features = Table(
    "features",
    metadata,
    Column("sae_id", Text, _child_of("saes"), primary_key=True),
    Column("features_id", Text, primary_key=True),
    Column("index", Integer, primary_key=True),
    Column("count", BigInteger, nullable=False),
    Column("firing_rate", Float(53), nullable=False),
    Column("mean", Float(53), nullable=False),
    Column("max", Float(53), nullable=False),
    Column("top_tokens", Text, nullable=False),
)
"""The scalars of each feature; `top_tokens` is a JSON list. Everything else about them is in the store's parquet."""

artifacts = Table(
    "artifacts",
    metadata,
    Column("owner_kind", Text, primary_key=True),
    Column("owner_id", Text, primary_key=True),
    Column("name", Text, primary_key=True),
    Column("uri", Text, nullable=False),
    Column("sha256", Text),
    Column("bytes", BigInteger),
)
"""`owner_kind` is `sweep` or `sae`; `uri` is a key of the store, so that a store that moves stays right, or a URI."""

tags = Table(
    "tags",
    metadata,
    Column("kind", Text, primary_key=True),
    Column("id", Text, primary_key=True),
    Column("tag", Text, primary_key=True),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("scopes", Text, nullable=False),
    Column("secret_sha256", Text, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("created_by", Text),
    Column("revoked_at", UtcTime),
)
"""Keys to a deployment's HTTP interface; the only table that the store can't give back. `scopes` has spaces between."""
