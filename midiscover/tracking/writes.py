"""Every INSERT, UPDATE and DELETE of the tracker, as functions of an open transaction.

Each one can be run twice to the same end, because a connection that is lost at COMMIT does not tell whether it counted.
Rows are sorted by key, so that two writers take their locks in one order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Table, case, delete, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError

from midiscover.errors import TrackingRefusedError
from midiscover.tracking import rows
from midiscover.tracking.rows import Row
from midiscover.tracking.tables import artifacts, features, sae_metrics, saes, steps, sweep_saes, sweeps, tags

INSERT: dict[str, Callable[[Table], Any]] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
"""Of each kind of database the INSERT that knows ON CONFLICT."""

_ROWS_AT_ONCE = 5000
"""Rows of one INSERT into SQLite."""

OWNERS = {"sweep": sweeps, "sae": saes}
"""The table of each kind that can own tags and artifacts."""

SILENT = {"sweep": ("interrupted", "running"), "sae": ("planned", "training")}
"""What a store is read as that says nothing of how far a sweep or SAE is, and the only state that this takes back."""


def start_sweep(connection: Connection, sweep: Mapping[str, Any], planned: Iterable[Mapping[str, Any]]) -> None:
    """A sweep begins, or begins again: its row, its SAEs in order, and, the first time, its note and tags."""
    begins = {"status": "running", "started_at": datetime.now(UTC), "ended_at": None}
    _put_sweep(connection, sweep, planned, begins, keep=("note",), again=True)


def found_sweep(connection: Connection, sweep: Mapping[str, Any], planned: Iterable[Mapping[str, Any]]) -> None:
    """A sweep stands in a store. Nothing of what is known of its runs changes; where nothing is, it was interrupted."""
    state = {"status": SILENT["sweep"][0], "started_at": rows.parse_time(sweep["created"]), "ended_at": None}
    _put_sweep(connection, sweep, planned, state, keep=("note", *state), again=False)


def _put_sweep(
    connection: Connection,
    sweep: Mapping[str, Any],
    planned: Iterable[Mapping[str, Any]],
    state: Row,
    *,
    keep: Sequence[str],
    again: bool,
) -> None:
    settings = {row["sae_id"]: row for row in planned}
    strangers = settings.keys() - set(sweep["sae_ids"])
    if strangers:
        raise ValueError(f"not in the sweep's sae_ids: {', '.join(sorted(strangers))}")
    row = rows.sweep_row(sweep)
    known = connection.execute(select(sweeps.c.id).where(sweeps.c.id == row["id"])).scalar()
    planned_rows = [rows.planned_row(settings.get(i, {"sae_id": i}), row["owner"]) for i in sweep["sae_ids"]]
    _plan(connection, planned_rows, again=again)
    _upsert(connection, sweeps, [row | state], keep=keep)
    places = [{"sweep_id": row["id"], "sae_id": sae, "position": n} for n, sae in enumerate(sweep["sae_ids"])]
    _upsert(connection, sweep_saes, places)
    if known is None:
        born_with = [rows.storable(tag) for tag in sweep.get("tags", ())]
        _upsert(connection, tags, [{"kind": "sweep", "id": row["id"], "tag": tag} for tag in born_with])


def finish_sweep(connection: Connection, sweep_id: str, status: str) -> None:
    """A sweep ends."""
    change = update(sweeps).where(sweeps.c.id == sweep_id).values(status=status, ended_at=datetime.now(UTC))
    if connection.execute(change).rowcount == 0:
        raise _unknown("sweep", sweep_id)


def sae_status(connection: Connection, sae_id: str, status: str, reason: str | None) -> None:
    """An SAE moves on."""
    change = update(saes).where(saes.c.id == sae_id).values(status=status, reason=rows.storable(reason))
    if connection.execute(change).rowcount == 0:
        raise _unknown("SAE", sae_id)


def found_status(connection: Connection, kind: str, name: str, status: str, reason: str | None = None) -> None:
    """How a sweep, or an SAE without a record, stands in a store.

    Another store may know more: what is done stays done, and of `SILENT` the first only takes the place of the second.
    """
    table, (silent, busy) = OWNERS[kind], SILENT[kind]
    gives_way = table.c.status == busy if status == silent else table.c.status != "done"
    values = {"status": status} | ({"reason": rows.storable(reason)} if kind == "sae" else {})
    connection.execute(update(table).where(table.c.id == name, gives_way).values(values))


def record_sae(connection: Connection, record: Mapping[str, Any]) -> None:
    """An SAE is done: its settings, lineage, scalars and files, over whatever was planned."""
    sae_id = record["id"]
    _upsert(connection, saes, [rows.recorded_row(record)])
    record_metrics(connection, sae_id, record["evaluation_id"], record["metrics"])
    _upsert(connection, artifacts, rows.file_rows(sae_id, record.get("files") or {}))


def record_metrics(connection: Connection, sae_id: str, evaluation_id: str, metrics: Mapping[str, Any]) -> None:
    """One evaluation's scalars, in place of what the tracker had of it."""
    _require_sae(connection, sae_id)
    old = (sae_metrics.c.sae_id == sae_id) & (sae_metrics.c.evaluation_id == evaluation_id)
    connection.execute(delete(sae_metrics).where(old))
    _upsert(connection, sae_metrics, rows.metric_rows(sae_id, evaluation_id, metrics))


def record_steps(connection: Connection, sae_id: str, history: Mapping[str, Sequence[Any]]) -> None:
    """A curve, or its next piece: replaces what there is from the first step given on."""
    found = rows.step_rows(sae_id, history)
    _require_sae(connection, sae_id)
    if found:
        first = found[0]["step"]
        connection.execute(delete(steps).where(steps.c.sae_id == sae_id, steps.c.step >= first))
        _upsert(connection, steps, found)


def record_features(connection: Connection, sae_id: str, features_id: str, found: Sequence[Row]) -> None:
    """The scalars of all features of an SAE, in place of what the tracker had under these settings.

    By COPY on PostgreSQL: a hundred thousand rows take a second.
    """
    _require_sae(connection, sae_id)
    old = (features.c.sae_id == sae_id) & (features.c.features_id == features_id)
    connection.execute(delete(features).where(old))
    new = rows.feature_rows(sae_id, features_id, found)
    if connection.dialect.name != "postgresql":
        for start in range(0, len(new), _ROWS_AT_ONCE):
            connection.execute(insert(features), new[start : start + _ROWS_AT_ONCE])
        return
    _copy(connection, features, new)


def add_artifact(connection: Connection, row: Row) -> None:
    """A file that belongs to a sweep or an SAE."""
    _upsert(connection, artifacts, [row])


def set_annotations(connection: Connection, kind: str, name: str, note: str | None, new_tags: Iterable[str]) -> None:
    """Exactly this note and these tags."""
    table = OWNERS[kind]
    connection.execute(update(table).where(table.c.id == name).values(note=note))
    connection.execute(delete(tags).where(tags.c.kind == kind, tags.c.id == name))
    _upsert(connection, tags, [{"kind": kind, "id": name, "tag": tag} for tag in new_tags])


def _plan(connection: Connection, planned: list[Row], *, again: bool) -> None:
    """New SAEs as planned; of known ones only gaps are filled. again: those that failed are planned once more."""
    new = INSERT[connection.dialect.name](saes)
    failed = saes.c.status == "failed"
    filled = {name: func.coalesce(saes.c[name], new.excluded[name]) for name in (*rows.PLANNED_COLUMNS, "owner")}
    if again:
        filled |= {
            "status": case((failed, "planned"), else_=saes.c.status),
            "reason": case((failed, None), else_=saes.c.reason),
        }
    statement = new.on_conflict_do_update(index_elements=["id"], set_=filled)
    connection.execute(statement, sorted(planned, key=lambda row: row["id"]))


def _upsert(connection: Connection, table: Table, new: Sequence[Row], keep: Sequence[str] = ()) -> None:
    """INSERT, or UPDATE of all given columns but `keep` where the key is there."""
    if not new:
        return
    keys = [column.name for column in table.primary_key]
    upsert = INSERT[connection.dialect.name](table)
    changed = {name: upsert.excluded[name] for name in new[0] if name not in (*keys, *keep)}
    if changed:
        statement = upsert.on_conflict_do_update(index_elements=keys, set_=changed)
    else:
        statement = upsert.on_conflict_do_nothing(index_elements=keys)
    connection.execute(statement, sorted(new, key=lambda row: [row[key] for key in keys]))


def _copy(connection: Connection, table: Table, new: Sequence[Row]) -> None:
    """INSERT by COPY, on PostgreSQL."""
    names = [column.name for column in table.columns]
    quoted = ", ".join(f'"{name}"' for name in names)
    statement = f"COPY {table.name} ({quoted}) FROM STDIN"
    cursor: Any = connection.connection.cursor()
    base: Any = connection.dialect.loaded_dbapi.Error
    try:
        with cursor, cursor.copy(statement) as copy:
            for row in new:
                copy.write_row([row[name] for name in names])
    except base as error:
        # The cursor is the driver's own; the engine knows SQLAlchemy's errors only.
        raise DBAPIError.instance(statement, None, error, base, dialect=connection.dialect) from error


def _require_sae(connection: Connection, sae_id: str) -> None:
    if connection.execute(select(saes.c.id).where(saes.c.id == sae_id)).scalar() is None:
        raise _unknown("SAE", sae_id)


def _unknown(what: str, name: str) -> TrackingRefusedError:
    return TrackingRefusedError(
        f"The tracker has no {what} {name!r}; `midiscover runs reindex` reads it from the store."
    )
