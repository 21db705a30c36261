"""What a sweep found, read from the store as the plain tables that reports, figures and comparisons take."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from safetensors.torch import load
from torch import Tensor

from midiscover.errors import CorruptError
from midiscover.ids import variants
from midiscover.neighbours import MOST_PAIRS, chosen, neighbours
from midiscover.resolve import PlannedSae
from midiscover.saes import SPARSITY, load_trained
from midiscover.stability import agreement, pair_row
from midiscover.store import layout
from midiscover.store.documents import read_json
from midiscover.store.storage import Storage
from midiscover.summary import Row
from midiscover.tracking.rows import whole_planned

READERS = 8
ROW_METRICS = ("l0", "fvu", "mse", "cosine", "ce_recovered", "kl_recovered", "dead_share", "inactive_share")
FOREIGN_METRICS = ("fvu_foreign", "l0_foreign")
"""Measures that an evaluation has only where it was given a second corpus."""
DESCRIBED = ("hook", "output_hook", "layer", "kind", "control", "d_sae", "seed", "variant")
"""What curves and densities say of their SAE."""
CURVES = ("step", "tokens", "loss", "mse", "l0", "fvu")

DECODERS_HELD = 8
"""Decoders in memory at once: 210 MB each at 20,480 features of d 2,560."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """Plain tables of a sweep; SAEs without a record appear in none of them.

    A row has what its SAE was planned with, `variant` as `ids.variants` has it, and the measures of the sweep's own
    evaluation, `tokens` of them held out.
    """

    rows: list[dict[str, Any]]
    curves: list[dict[str, Any]]
    densities: list[dict[str, Any]]
    records: list[dict[str, Any]]


def sae_results(storage: Storage, planned: Sequence[PlannedSae], evaluation_id: str) -> Results:
    """Results of planned SAEs, in their order, with the metrics of one evaluation."""
    return _results(storage, [p.row() for p in planned], evaluation_id)


def sweep_results(storage: Storage, sweep: Mapping[str, Any]) -> Results:
    """Results of a sweep as its sweep.json tells them, which needs neither its model nor its text.

    CorruptError where sweep.json does not name its SAEs.
    """
    rows, evaluation_id = sweep.get("saes"), sweep.get("evaluation_id")
    if not isinstance(rows, list) or not isinstance(evaluation_id, str):
        raise CorruptError(f"The sweep.json of {sweep.get('id')} lacks 'saes' or 'evaluation_id'.")
    return _results(storage, [whole_planned(row) for row in rows], evaluation_id)


def _results(storage: Storage, planned: Sequence[Row], evaluation_id: str) -> Results:
    """planned: `resolve.PlannedSae.row` of each SAE."""
    with ThreadPoolExecutor(READERS) as pool:
        read = pool.map(lambda row: _read(storage, row["sae_id"], evaluation_id), planned)
        found = [(row, *parts) for row, parts in zip(planned, read, strict=True) if None not in parts]
    rows, curves, densities = [], [], []
    records = [record for _, record, _, _ in found]
    for (planned_row, record, training, metrics), variant in zip(found, variants(records), strict=True):
        row = dict(planned_row) | {"variant": variant}
        label = {"sae_id": row["sae_id"], "label": row["sparsity_label"]} | {name: row[name] for name in DESCRIBED}
        rows.append(
            row
            | {name: metrics[name] for name in ROW_METRICS}
            | {name: metrics.get(name) for name in ("ce_recovered_error", *FOREIGN_METRICS)}
            | {"tokens": metrics.get("tokens"), "seconds": record["seconds"]}
        )
        curves += _curves(label, training["history"])
        densities += _densities(label, metrics["density"])
    return Results(rows=rows, curves=curves, densities=densities, records=records)


def sae_stability(
    storage: Storage, rows: Sequence[Row], *, device: str = "cpu", most: int = MOST_PAIRS
) -> list[dict[str, Any]]:
    """Feature stability of a sweep: one plain row per pair of neighbours on its grid, as `stability.pair_row` has it.

    rows: those of `sae_results`. Only features that fired on held-out tokens count. Of more than `most` pairs, seeds go
    first; see `neighbours.chosen`.
    """

    @lru_cache(maxsize=DECODERS_HELD)
    def directions(sae_id: str) -> tuple[Tensor, Tensor]:
        decoder = load_trained(storage, sae_id, device=device).W_dec.detach()
        log_rate = load(storage.read(layout.sae_file(sae_id, SPARSITY)))["sparsity"].to(device)
        # log10(rate + 1e-10): a feature that never fired has -10, one that did at least -9.
        return decoder, log_rate > -9.5

    pairs = sorted(chosen(neighbours(rows), most), key=lambda pair: str(pair.a["hook"]))
    result = []
    for pair in pairs:
        (a, live_a), (b, live_b) = directions(pair.a["sae_id"]), directions(pair.b["sae_id"])
        found = agreement(a, b, live_a, live_b)
        result.append(pair_row(pair, found, (int(live_a.sum()), int(live_b.sum()))))
    return result


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
