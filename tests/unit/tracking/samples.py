"""Sweeps, plans, records and curves as the store holds them, made up; and a dump of a whole database."""

from __future__ import annotations

import hashlib
import io
import json
from typing import Any
from zlib import crc32

import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import create_engine, select

from midiscover.store import layout
from midiscover.store.storage import Storage
from midiscover.tracking.engine import parse_url
from midiscover.tracking.tables import metadata

HOOKS = ("model.layers.1.mlp", "model.layers.3.mlp")
EVALUATION = "e.0123456789"
TIMES_OF_WRITE = {"started_at", "ended_at"}


def sae_id(hook: str, l1: float) -> str:
    return f"l{hook.split('.')[2]}.mlp.standard-64.l1-{l1:g}.{crc32(f'{hook} {l1}'.encode()):010x}"


def plan(hook: str, l1: float) -> dict[str, Any]:
    return {
        "sae_id": sae_id(hook, l1),
        "hook": hook,
        "output_hook": hook,
        "layer": int(hook.split(".")[2]),
        "kind": "standard",
        "control": "none",
        "sparsity_label": f"l1 {l1:g}",
        "l1": l1,
        "k": None,
        "target_l0": None,
        "d_in": 16,
        "d_sae": 64,
        "seed": 0,
        "settings": {"sae": {"kind": "standard", "l1_coefficient": l1}, "train": {"lr": 3e-4, "betas": [0.9, 0.999]}},
    }


def sweep(name: str = "demo", l1s: tuple[float, ...] = (1.0, 3.0, 8.0), **changes: Any) -> dict[str, Any]:
    """A sweep.json over both hooks."""
    plans = [plan(hook, l1) for hook in HOOKS for l1 in l1s]
    return {
        "v": 1,
        "id": f"{name}.{len(plans):010x}",
        "name": name,
        "created": "2026-11-23T18:00:00+00:00",
        "owner": "ada",
        "tags": ["first", "small"],
        "note": "a first look",
        "config": {"name": name, "train": {"lr": 3e-4}, "grid": {"sae.l1_coefficient": list(l1s)}},
        "sae_ids": [row["sae_id"] for row in plans],
        "saes": plans,
        "evaluation_id": EVALUATION,
        "corpus": "c.1111111111",
        "harvest": "h.2222222222",
        "lineage": {"code": {"version": "0.1.0", "commit": "abc123"}},
    } | changes


def record(planned: dict[str, Any], *, l0: float = 20.0, fvu: float = 0.3, **changes: Any) -> dict[str, Any]:
    """The record.json of an SAE that was planned so."""
    return {
        "v": 1,
        "id": planned["sae_id"],
        "created": "2026-11-23T19:00:00+01:00",
        "hook": planned["hook"],
        "layer": planned["layer"],
        "d_in": 16,
        "d_sae": 64,
        "kind": "standard",
        "sae": planned["settings"]["sae"],
        "train": planned["settings"]["train"],
        "l1": {"coefficient": planned["l1"], "raw_scale": 0.5, "seed": 77.0},
        "evaluation_id": EVALUATION,
        "metrics": metrics(l0, fvu),
        "lineage": {
            "model": {"name": "tiny", "digest": "d" * 64, "revision": None, "dtype": "float32"},
            "corpus": {"id": "c.1111111111", "source": "builtin", "revision": "r" * 64},
            "harvest": "h.2222222222",
            "code": {"version": "0.1.0", "commit": "abc123"},
            "versions": {"torch": "2.13"},
            "seed": 0,
        },
        "files": {"cfg.json": "a" * 64, "sae_weights.safetensors": "b" * 64},
        "seconds": 12.5,
        "owner": "ada",
    } | changes


def metrics(l0: float, fvu: float) -> dict[str, Any]:
    """Scalars, one that was left out, one that is not finite, and the histogram."""
    density = {"log10_edges": [-3.0, -2.0, -1.0], "counts": [60, 3], "never": 1}
    scalars = {
        "l0": l0,
        "fvu": fvu,
        "mse": 0.01,
        "cosine": 0.9,
        "dead_share": 0.02,
        "inactive_share": 0.25,
        "tokens": 5000,
    }
    return scalars | {"ce_recovered": None, "kl_recovered": float("nan"), "density": density}


def history(points: int = 5) -> dict[str, list[Any]]:
    """The curves of a training.json; the last loss is not finite."""
    at = list(range(10, 10 * points + 10, 10))
    return {
        "step": at,
        "tokens": [step * 64 for step in at],
        "loss": [1 / step for step in at[:-1]] + [float("nan")],
        "l0": [step / 3 for step in at],
    }


def put(storage: Storage, key: str, document: Any) -> None:
    storage.write(key, json.dumps(document).encode())


def put_sae(storage: Storage, found: dict[str, Any]) -> None:
    put(storage, layout.training(found["id"]), {"v": 1, "id": found["id"], "history": history()})
    put(storage, layout.record(found["id"]), found)


def features() -> list[dict[str, Any]]:
    """Scalars of three features, one of them dead; a token that no database takes."""
    alive = {"count": 7, "firing_rate": 0.0014, "mean": 1.5, "max": 4.25, "top_tokens": [" the", "\0", "\n'\\"]}
    dead = {"count": 0, "firing_rate": 0.0, "mean": 0.0, "max": 0.0, "top_tokens": []}
    return [{"index": 0} | alive, {"index": 1} | dead, {"index": 2} | alive | {"count": 9}]


def put_features(storage: Storage, sae_id: str, features_id: str = "f.3333333333") -> None:
    """features.parquet and its manifest."""
    data = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(features()), data)
    storage.write(layout.features_file(sae_id, features_id, "features.parquet"), data.getvalue())
    files = {"features.parquet": {"sha256": hashlib.sha256(data.getvalue()).hexdigest()}}
    manifest = {"v": 1, "sae": sae_id, "features_id": features_id, "files": files}
    put(storage, layout.features_manifest(sae_id, features_id), manifest)


def dump(address: str, leave_out: set[str] = TIMES_OF_WRITE) -> dict[str, list[dict[str, Any]]]:
    """Every row of every table, sorted by key, without the times of writing."""
    engine = create_engine(parse_url(address))
    with engine.connect() as connection:
        found = {
            table.name: sorted(
                (
                    {name: value for name, value in row.items() if name not in leave_out}
                    for row in connection.execute(select(table)).mappings()
                ),
                key=lambda row: [row[column.name] for column in table.primary_key],
            )
            for table in metadata.sorted_tables
        }
    engine.dispose()
    return found
