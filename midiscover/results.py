"""What a sweep found, read from the store as the plain tables that reports, figures and comparisons take."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from midiscover.ids import sparsity_label
from midiscover.resolve import PlannedSae
from midiscover.saes import read_json
from midiscover.store import layout
from midiscover.store.storage import Storage

READERS = 8
ROW_METRICS = ("l0", "fvu", "mse", "cosine", "ce_recovered", "kl_recovered", "dead_share", "inactive_share")
CURVES = ("step", "tokens", "loss", "mse", "l0", "fvu")


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """Plain tables of a sweep; SAEs without a record appear in none of them."""

    rows: list[dict[str, Any]]
    curves: list[dict[str, Any]]
    densities: list[dict[str, Any]]
    records: list[dict[str, Any]]


def sae_results(storage: Storage, planned: Sequence[PlannedSae], evaluation_id: str) -> Results:
    """Results of planned SAEs, in their order, with the metrics of one evaluation."""
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(lambda p: _read(storage, p.id, evaluation_id), planned))
    rows, curves, densities, records = [], [], [], []
    for p, (record, training, metrics) in zip(planned, found, strict=True):
        if record is None or training is None or metrics is None:
            continue
        sparsity = sparsity_label(p.point.sae)
        label = {"sae_id": p.id, "hook": p.point.hook, "label": sparsity}
        rows.append(
            p.row()
            | {"sparsity_label": sparsity}
            | {name: metrics[name] for name in ROW_METRICS}
            | {"seconds": record["seconds"]}
        )
        curves += _curves(label, training["history"])
        densities += _densities(label, metrics["density"])
        records.append(record)
    return Results(rows=rows, curves=curves, densities=densities, records=records)


def _read(storage: Storage, sae_id: str, evaluation_id: str) -> tuple[Any, Any, Any]:
    record = read_json(storage, layout.record(sae_id))
    training = read_json(storage, layout.training(sae_id))
    evaluation = read_json(storage, layout.evaluation(sae_id, evaluation_id))
    return record, training, evaluation["metrics"] if evaluation else None


def _curves(label: Mapping[str, Any], history: Mapping[str, Sequence[float]]) -> Iterable[dict[str, Any]]:
    points = zip(*(history[name] for name in CURVES), strict=True)
    return [dict(label) | dict(zip(CURVES, point, strict=True)) for point in points]


def _densities(label: Mapping[str, Any], density: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    bins = itertools.pairwise(density["log10_edges"])
    return [
        dict(label) | {"log10_low": low, "log10_high": high, "count": count}
        for (low, high), count in zip(bins, density["counts"], strict=True)
    ]
