"""A made-up sweep as plain tables: hooks x l1 values, with curves and densities of the right shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Rows = list[dict[str, Any]]


def plain_tables(layers: Sequence[int] = (10, 15, 20), l1s: Sequence[float] = (3, 8, 20)) -> tuple[Rows, Rows, Rows]:
    """(rows, curves, densities) of len(layers) x len(l1s) SAEs."""
    rows, curves, densities = [], [], []
    for layer in layers:
        for l1 in l1s:
            row = _row(layer, float(l1))
            rows.append(row)
            common = {"sae_id": row["sae_id"], "hook": row["hook"], "label": row["sparsity_label"]}
            for step in range(0, 300, 30):
                rest = math.exp(-step / 60)
                measures = {"loss": 300 + 500 * rest, "mse": 200 + 400 * rest, "fvu": row["fvu"] + 0.5 * rest}
                curves.append(
                    common | measures | {"step": step, "tokens": step * 1024, "l0": row["l0"] * (1 + 30 * rest)}
                )
            for bin in range(24):
                low = -6 + 0.25 * bin
                count = int(900 * math.exp(-((low + 3) ** 2)))
                densities.append(common | {"log10_low": low, "log10_high": low + 0.25, "count": count})
    return rows, curves, densities


def _row(layer: int, l1: float) -> dict[str, Any]:
    strength = math.log(l1)
    return {
        "sae_id": f"l{layer}.mlp-down_proj.standard-4608.l1-{l1:g}.0123456789",
        "hook": f"model.layers.{layer}.mlp.down_proj",
        "layer": layer,
        "kind": "standard",
        "l1": l1,
        "k": None,
        "d_in": 576,
        "d_sae": 4608,
        "seed": 0,
        "l0": 400 / l1 + layer,
        "fvu": 0.16 * strength + 0.01 * layer,
        "mse": 0.001 * strength,
        "cosine": 0.8,
        "ce_recovered": 1 - 0.05 * strength,
        "kl_recovered": 1 - 0.06 * strength,
        "dead_share": 0.02 * strength,
        "inactive_share": 0.2 * strength,
        "tokens": 11_932,
        "seconds": 66.3,
        "sparsity_label": f"l1 {l1:g}",
    }
