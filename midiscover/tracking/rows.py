"""JSON documents of the store (sweep.json, record.json, training.json) as rows of the tables. No database, no files.

Numbers that are not finite become None; of text that no database takes, a person's is refused and what others wrote is
escaped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from math import isfinite
from typing import Any, TypedDict

from midiscover.errors import TrackingError
from midiscover.ids import compared_settings, recorded_settings
from midiscover.store import layout

Row = dict[str, Any]

MOST_IN_TAG = 200
"""Characters; PostgreSQL's index takes 2,704 bytes."""


class PlannedRow(TypedDict, total=False):
    """An SAE of a sweep as the grid knows it, before training. Only `sae_id` is required."""

    sae_id: str
    hook: str
    output_hook: str
    layer: int | None
    kind: str
    control: str
    sparsity_label: str
    l1: float | None
    k: int | None
    target_l0: float | None
    d_in: int
    d_sae: int
    seed: int
    settings: Mapping[str, Any]


PLANNED = tuple(name for name in PlannedRow.__annotations__ if name != "sae_id")
PLANNED_COLUMNS = tuple("sparsity" if name == "sparsity_label" else name for name in PLANNED)
"""The same names as columns, in the same order."""


def sweep_row(sweep: Mapping[str, Any]) -> Row:
    """The row of a sweep.json."""
    row = {
        "id": sweep["id"],
        "name": sweep["name"],
        "created_at": parse_time(sweep["created"]),
        "owner": sweep.get("owner"),
        "note": sweep.get("note"),
        "config": sweep.get("config"),
        "evaluation_id": sweep.get("evaluation_id"),
        "corpus_id": sweep.get("corpus"),
        "harvest_id": sweep.get("harvest"),
        "lineage": sweep.get("lineage"),
    }
    return storable(row)


def planned_row(planned: Mapping[str, Any], owner: str | None) -> Row:
    """The row of an SAE that is only planned; a key that is no column is a mistake of the caller."""
    unknown = planned.keys() - {"sae_id", *PLANNED}
    if unknown:
        raise ValueError(f"a planned SAE has no {', '.join(sorted(unknown))}; it has sae_id, {', '.join(PLANNED)}")
    planned = whole_planned(planned)
    row = {column: storable(planned.get(name)) for name, column in zip(PLANNED, PLANNED_COLUMNS, strict=True)}
    return row | {"id": planned["sae_id"], "owner": owner, "status": "planned"}


def whole_planned(planned: Mapping[str, Any]) -> Mapping[str, Any]:
    """With what a sweep.json of 0.1.0 lacks: it knew one l1 or k for each SAE, and neither controls nor transcoders."""
    if "sparsity_label" in planned or "kind" not in planned:
        return planned
    setting = next((f"{name} {planned[name]:g}" for name in ("l1", "k") if planned.get(name) is not None), None)
    return {**planned, "sparsity_label": setting, "control": "none", "output_hook": planned.get("hook")}


def recorded_row(record: Mapping[str, Any]) -> Row:
    """The row of an SAE with its record.json."""
    lineage = record.get("lineage") or {}
    model, code, corpus = (lineage.get(name) or {} for name in ("model", "code", "corpus"))
    compared = compared_settings(recorded_settings(record["sae"]))
    row = {
        "id": record["id"],
        "hook": record["hook"],
        "layer": record.get("layer"),
        "kind": record["kind"],
        "d_in": record["d_in"],
        "d_sae": record["d_sae"],
        "l1": compared["l1"],
        "k": compared["k"],
        "seed": lineage.get("seed"),
        "settings": {"sae": record["sae"], "train": record["train"]},
        "status": "done",
        "reason": None,
        "record": record,
        "created_at": parse_time(record["created"]),
        "seconds": record.get("seconds"),
        "owner": record.get("owner"),
        "evaluation_id": record["evaluation_id"],
        "model_name": model.get("name"),
        "model_digest": model.get("digest"),
        "model_revision": model.get("revision"),
        "corpus_id": corpus.get("id"),
        "harvest_id": lineage.get("harvest"),
        "code_version": code.get("version"),
        "code_commit": code.get("commit"),
        "output_hook": record.get("output_hook") or record["hook"],
        "control": compared["control"],
        "sparsity": compared["sparsity_label"],
        "target_l0": compared["target_l0"],
    }
    return storable(row)


def metric_rows(sae_id: str, evaluation_id: str, metrics: Mapping[str, Any]) -> list[Row]:
    """One row per scalar; None (not measured) and nested values (the density histogram) stay in the record."""
    key = {"sae_id": sae_id, "evaluation_id": evaluation_id}
    return [
        key | {"name": name, "value": storable(float(value))}
        for name, value in sorted(metrics.items())
        if _is_number(value)
    ]


def file_rows(sae_id: str, files: Mapping[str, str]) -> list[Row]:
    """One row per file that a record names with its sha256; the uri is the key in the store."""
    return [
        {
            "owner_kind": "sae",
            "owner_id": sae_id,
            "name": name,
            "uri": layout.sae_file(sae_id, name),
            "sha256": sha256,
            "bytes": None,
        }
        for name, sha256 in sorted(files.items())
    ]


def step_rows(sae_id: str, history: Mapping[str, Sequence[Any]]) -> list[Row]:
    """The rows of a curve given by columns of equal length, one of them `step`; sorted by key. None is left out."""
    if len({len(column) for column in history.values()}) > 1 or "step" not in history:
        raise ValueError("a history is columns of equal length, one of them `step`")
    rows = [
        {"sae_id": sae_id, "step": int(step), "name": name, "value": storable(float(value))}
        for name, column in history.items()
        if name != "step"
        for step, value in zip(history["step"], column, strict=True)
        if value is not None
    ]
    return sorted(rows, key=lambda row: (row["step"], row["name"]))


FEATURE_COLUMNS = ("index", "count", "firing_rate", "mean", "max", "top_tokens")
"""Columns of features.parquet that the tracker keeps."""


def feature_rows(sae_id: str, features_id: str, found: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The rows of features that are given with `FEATURE_COLUMNS`; `top_tokens`, a list, becomes JSON.

    Escaped, because a token may hold what no database takes, such as NUL.
    """
    key = {"sae_id": sae_id, "features_id": features_id}
    return [
        key
        | {name: storable(row[name]) for name in FEATURE_COLUMNS[:-1]}
        | {"top_tokens": json.dumps(row["top_tokens"])}
        for row in found
    ]


def storable(value: Any) -> Any:
    """`value` as every database takes it, at any depth: a float that is not finite becomes None, tuples become lists.

    Half a surrogate pair, as of a file name that is no UTF-8, is escaped, and so is NUL.
    """
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode().replace("\0", "\\x00")
    if isinstance(value, Mapping):
        return {storable(str(key)): storable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [storable(inner) for inner in value]
    return value


def parse_time(text: str) -> datetime:
    """An ISO 8601 time, in UTC; one without a zone is taken to be UTC already."""
    time = datetime.fromisoformat(text)
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


def checked_text(what: str, text: str) -> str:
    """`text` itself. TrackingError where a database would refuse it: a NUL, half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise TrackingError(f"{what} holds half a character (a lone surrogate); write it as plain Unicode.") from None
    if "\0" in text:
        raise TrackingError(f"{what} holds a NUL character, which no database stores; leave it out.")
    return text


def checked_tag(tag: str) -> str:
    """`tag` itself. TrackingError for one that is empty, too long for an index, or that `checked_text` refuses."""
    if not tag.strip() or len(tag) > MOST_IN_TAG:
        raise TrackingError(
            f"A tag of {len(tag)} characters can't be kept; give 1 to {MOST_IN_TAG}, not all of them blank."
        )
    return checked_text("A tag", tag)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
