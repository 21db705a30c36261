"""Every SELECT that people see, as functions of an open transaction. Answers are plain: JSON could hold all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from difflib import get_close_matches
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, func, select

from midiscover.errors import NotFoundError
from midiscover.frontier import frontier_of_hooks, frontier_of_kinds
from midiscover.ids import variants
from midiscover.tracking.annotations import Annotations
from midiscover.tracking.rows import Row
from midiscover.tracking.tables import artifacts, sae_metrics, saes, steps, sweep_saes, sweeps, tags
from midiscover.tracking.writes import OWNERS

SETTINGS = ("hook", "output_hook", "layer", "kind", "control", "l1", "k", "target_l0", "d_in", "d_sae", "seed")
"""Columns of an SAE that a row of `compare` has under the same names."""

MEASURES = (
    *("l0", "fvu", "mse", "cosine", "ce_recovered", "kl_recovered", "dead_share", "inactive_share"),
    *("fvu_foreign", "l0_foreign"),
)
"""Measures that a row of `compare` always has; None where one was left out."""

COUNTED = ("done", "failed", "retired")
"""States of SAEs that `list_runs` counts."""

SHOWN = 5
"""Ids named in an error."""


def resolve(connection: Connection, text: str, kinds: Sequence[str] = ("sweep", "sae")) -> tuple[str, str]:
    """(kind, id) for an id or a unique prefix. NotFoundError, with the nearest ids, for none or several."""
    found: list[tuple[str, str]] = []
    for kind in kinds:
        column = OWNERS[kind].c.id
        ids = _sorted(connection, select(column).where(column.startswith(text, autoescape=True)))
        # SQLite's LIKE takes no account of case; ids do.
        found += [(kind, name) for name in ids if name.startswith(text)]
    exact = [pair for pair in found if pair[1] == text]
    if len(exact or found) == 1:
        return (exact or found)[0]
    what = " or ".join({"sweep": "sweep", "sae": "SAE"}[kind] for kind in kinds)
    if found:
        names = [name for _, name in found]
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        raise NotFoundError(
            f"{text!r} is the start of {', '.join(names[:SHOWN])}{more}; give enough of the id to mean one."
        )
    raise NotFoundError(f"No {what} {text!r}; {_nearest(connection, text, kinds)}.")


def list_runs(connection: Connection) -> list[Row]:
    """All sweeps, newest first, with how many of their SAEs stand where."""
    counts: dict[str, dict[str, int]] = {}
    grouped = select(sweep_saes.c.sweep_id, saes.c.status, func.count()).join(saes, saes.c.id == sweep_saes.c.sae_id)
    for sweep_id, status, count in connection.execute(grouped.group_by(sweep_saes.c.sweep_id, saes.c.status)):
        counts.setdefault(sweep_id, {})[status] = count
    tagged: dict[str, list[str]] = {}
    for name, tag in connection.execute(select(tags.c.id, tags.c.tag).where(tags.c.kind == "sweep")):
        tagged.setdefault(name, []).append(tag)
    wanted = ("id", "name", "status", "created_at", "started_at", "ended_at", "owner", "note")
    newest = select(*(sweeps.c[name] for name in wanted)).order_by(sweeps.c.created_at.desc(), sweeps.c.id)
    result = []
    for row in connection.execute(newest).mappings():
        found = counts.get(row["id"], {})
        numbers = {"saes": sum(found.values())} | {status: found.get(status, 0) for status in COUNTED}
        result.append(_plain(row) | {"tags": sorted(tagged.get(row["id"], []))} | numbers)
    return result


def show(connection: Connection, text: str) -> Row:
    """Everything about one sweep or SAE, told apart by `type`."""
    kind, name = resolve(connection, text)
    table = OWNERS[kind]
    row = _plain(connection.execute(select(table).where(table.c.id == name)).mappings().one())
    row = {
        "type": kind,
        **row,
        "tags": annotations_of(connection, kind, name).tags,
        "artifacts": _artifacts(connection, kind, name),
    }
    if kind == "sweep":
        wanted = ("id", "hook", "kind", "control", "sparsity", "d_sae", "seed", "status", "reason", "seconds")
        return row | {"saes": _members(connection, name, wanted)}
    scalars = _scalars(connection, sae_metrics.c.sae_id == name)
    evaluations = {evaluation: found for (_, evaluation), found in sorted(scalars.items())}
    return row | {
        "sweeps": sweeps_of(connection, name),
        "metrics": evaluations.get(row["evaluation_id"], {}),
        "evaluations": evaluations,
    }


def annotations_of(connection: Connection, kind: str, name: str) -> Annotations:
    """The note and tags of a sweep or SAE."""
    table = OWNERS[kind]
    note = connection.execute(select(table.c.note).where(table.c.id == name)).scalar()
    return Annotations(note, _sorted(connection, select(tags.c.tag).where(tags.c.kind == kind, tags.c.id == name)))


def sweeps_of(connection: Connection, sae_id: str) -> list[str]:
    """The sweeps that an SAE belongs to."""
    return _sorted(connection, select(sweep_saes.c.sweep_id).where(sweep_saes.c.sae_id == sae_id))


def compare(connection: Connection, text: str) -> list[Row]:
    """One row per SAE of a sweep that is done and measured as the sweep asks, in grid order; see Tracker.compare."""
    _, sweep_id = resolve(connection, text, kinds=("sweep",))
    evaluation = connection.execute(select(sweeps.c.evaluation_id).where(sweeps.c.id == sweep_id)).scalar()
    members = select(sweep_saes.c.sae_id).where(sweep_saes.c.sweep_id == sweep_id)
    scalars = _scalars(connection, sae_metrics.c.sae_id.in_(members), sae_metrics.c.evaluation_id == evaluation)
    result, settings = [], []
    for sae in _members(connection, sweep_id, ("id", *SETTINGS, "sparsity", "seconds", "status", "settings")):
        measured = scalars.get((sae["id"], evaluation or ""))
        given = sae.pop("settings")
        if sae.pop("status") == "done" and measured is not None:
            row = {"sae_id": sae.pop("id"), "sparsity_label": sae.pop("sparsity"), **sae}
            result.append(row | dict.fromkeys(MEASURES) | measured)
            settings.append(row | (given or {}))
    for row, variant in zip(result, variants(settings), strict=True):
        row["variant"] = variant
    marks = zip(result, frontier_of_hooks(result), frontier_of_kinds(result), strict=True)
    for row, of_hook, of_kind in marks:
        row |= {"frontier": of_hook, "best_of_kind": of_kind}
    return result


def curve(connection: Connection, text: str) -> dict[str, list[Any]]:
    """The columns of an SAE's curve, `step` first; None where a name has no value at a step."""
    _, sae_id = resolve(connection, text, kinds=("sae",))
    lines = connection.execute(select(steps.c.step, steps.c.name, steps.c.value).where(steps.c.sae_id == sae_id)).all()
    values = {(step, name): value for step, name, value in lines}
    every_step = sorted({step for step, _ in values})
    names = sorted({name for _, name in values})
    return {"step": every_step} | {name: [values.get((step, name)) for step in every_step] for name in names}


def _members(connection: Connection, sweep_id: str, wanted: Sequence[str]) -> list[Row]:
    of_sweep = select(*(saes.c[name] for name in wanted)).join(sweep_saes, sweep_saes.c.sae_id == saes.c.id)
    ordered = of_sweep.where(sweep_saes.c.sweep_id == sweep_id).order_by(sweep_saes.c.position)
    return [dict(row) for row in connection.execute(ordered).mappings()]


def _scalars(connection: Connection, *conditions: ColumnElement[bool]) -> dict[tuple[str, str], Row]:
    """(SAE, evaluation) -> name -> value."""
    found: dict[tuple[str, str], Row] = {}
    for line in connection.execute(select(sae_metrics).where(*conditions)):
        found.setdefault((line.sae_id, line.evaluation_id), {})[line.name] = line.value
    return found


def _artifacts(connection: Connection, kind: str, name: str) -> list[Row]:
    columns = [artifacts.c[column] for column in ("name", "uri", "sha256", "bytes")]
    mine = select(*columns).where(artifacts.c.owner_kind == kind, artifacts.c.owner_id == name)
    return sorted((dict(row) for row in connection.execute(mine).mappings()), key=lambda row: row["name"])


def _nearest(connection: Connection, text: str, kinds: Sequence[str]) -> str:
    ids = [name for kind in kinds for name in _sorted(connection, select(OWNERS[kind].c.id))]
    if not ids:
        return "the tracker is empty. `midiscover runs reindex` rebuilds it from the store"
    inside = [name for name in ids if text in name]
    near = list(dict.fromkeys([*inside, *get_close_matches(text, ids, n=SHOWN, cutoff=0.3)]))[:SHOWN]
    return f"the nearest: {', '.join(near)}" if near else "`midiscover runs list` names all sweeps"


def _sorted(connection: Connection, statement: Select[Any]) -> list[str]:
    """One column of text, in Python's order: that of a database depends on its collation."""
    return sorted(connection.execute(statement).scalars())


def _plain(row: Mapping[Any, Any]) -> Row:
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in row.items()}
