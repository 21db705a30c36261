"""A made-up sweep over everything: layers x architectures x sparsities x seeds, with controls and foreign text.

The numbers are such as real ones are: FVU falls with L0, later layers are harder, TopK is better than L1.
"""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

from tests.unit.plain_tables import Rows

LAYERS = (10, 15, 20)
SETTINGS: dict[str, tuple[tuple[str, float], ...]] = {
    "standard": (("l1", 2.2), ("l1", 5.0), ("l1", 15.0)),
    "gated": (("L0", 20.0), ("L0", 60.0), ("L0", 150.0)),
    "topk": (("k", 16), ("k", 48), ("k", 128)),
    "batchtopk": (("k", 16), ("k", 48), ("k", 128)),
}
SEEDS = {"standard": (0, 1), "gated": (0,), "topk": (0, 1), "batchtopk": (0,)}
CONTROLS = (("standard", "untrained"), ("topk", "frozen_decoder"), ("standard", "neurons"), ("topk", "random_model"))
GAIN = {"standard": 1.0, "gated": 0.9, "topk": 0.84, "batchtopk": 0.8}


def grid_tables() -> tuple[Rows, Rows, Rows]:
    """(rows, curves, densities) of 54 SAEs and 12 controls."""
    rows = [
        sae_row(layer, kind, name, value, seed)
        for layer, (kind, settings) in itertools.product(LAYERS, SETTINGS.items())
        for (name, value), seed in itertools.product(settings, SEEDS[kind])
    ]
    rows += [
        sae_row(layer, kind, *SETTINGS[kind][1], seed=0, control=control)
        for layer, (kind, control) in itertools.product(LAYERS, CONTROLS)
    ]
    curves = [point for row in rows if row["control"] not in ("untrained", "neurons") for point in _curve(row)]
    return rows, curves, [bin for row in rows for bin in _density(row)]


def sae_row(layer: int, kind: str, name: str, value: float, seed: int, control: str = "none") -> dict[str, Any]:
    """One SAE as `results.sae_results` gives it."""
    draw = random.Random(f"{layer} {kind} {value} {seed} {control}")
    l0 = value * (1 + 0.05 * draw.random()) if name != "l1" else 310 / value**0.95 * (1 + 0.1 * draw.random())
    fvu = GAIN[kind] * (0.95 - 0.165 * math.log(l0 + 3)) + 0.012 * (layer - 10) + 0.01 * draw.random()
    dead = {"standard": 0.02 * value, "gated": 0.06, "topk": 0.12 - 0.0008 * value, "batchtopk": 0.05}[kind]
    match control:
        case "untrained":
            l0, fvu, dead = 2304.0, 1.9, 0.0
        case "frozen_decoder":
            fvu, dead = fvu + 0.25, 0.3
        case "neurons":
            l0, fvu, dead = 288.0, 0.0, 0.0
        case "random_model":
            fvu, dead = fvu - 0.12, 0.2
    label = f"{name} {value:g}"
    parts = [f"l{layer}.mlp-down_proj.{kind}-4608", label.replace(" ", "-").lower(), control.replace("_", "-")]
    return {
        "sae_id": ".".join([*(part for part in parts if part != "none"), f"{draw.getrandbits(40):010x}"]),
        "hook": f"model.layers.{layer}.mlp.down_proj",
        "output_hook": f"model.layers.{layer}.mlp.down_proj",
        "layer": layer,
        "kind": kind,
        "control": control,
        "sparsity_label": label,
        "l1": value if name == "l1" else None,
        "k": int(value) if name == "k" else None,
        "target_l0": value if name == "L0" else None,
        "d_in": 576,
        "d_sae": 1152 if control == "neurons" else 4608,
        "seed": seed,
        "l0": l0,
        "fvu": fvu,
        "mse": 0.02 * fvu,
        "cosine": 1 - fvu / 2,
        "ce_recovered": 1 - 0.4 * fvu,
        "kl_recovered": 1 - 0.42 * fvu,
        "dead_share": dead,
        "inactive_share": min(1.0, 2 * dead + 0.02),
        "fvu_foreign": fvu * (1.3 + 0.2 * draw.random()) + 0.03,
        "l0_foreign": 1.1 * l0,
        "seconds": 40 + 20 * draw.random(),
    }


def _described(row: dict[str, Any]) -> dict[str, Any]:
    names = ("sae_id", "hook", "layer", "kind", "control", "d_sae", "seed")
    return {name: row[name] for name in names} | {"label": row["sparsity_label"]}


def _curve(row: dict[str, Any]) -> Rows:
    return [
        _described(row)
        | {"step": step, "tokens": step * 1024, "loss": 300 * row["fvu"] + 500 * rest, "mse": 280 * row["fvu"]}
        | {"l0": row["l0"] * (1 + 20 * rest), "fvu": row["fvu"] + 0.5 * rest}
        for step in range(0, 300, 30)
        for rest in [math.exp(-step / 60)]
    ]


def _density(row: dict[str, Any]) -> Rows:
    middle = math.log10(row["l0"] / row["d_sae"]) - 0.6 + 0.02 * (row["layer"] - 15)
    alive = row["d_sae"] * (1 - row["dead_share"]) / 5
    return [
        _described(row)
        | {"log10_low": low, "log10_high": low + 0.25, "count": int(alive * math.exp(-(((low - middle) / 0.8) ** 2)))}
        for low in (-6 + 0.25 * bin for bin in range(24))
    ]


def stability_rows(rows: Rows) -> Rows:
    """Made-up agreement of every pair of neighbours."""
    from midiscover.neighbours import neighbours
    from midiscover.stability import Agreement, pair_row

    base = {"seed": 0.62, "sparsity": 0.48, "control": 0.01, "kind": 0.35, "width": 0.4}
    found = []
    for pair in neighbours(rows):
        draw = random.Random(pair.a["sae_id"] + pair.b["sae_id"])
        share = base[pair.axis] * (0.8 + 0.3 * draw.random()) * GAIN[pair.a["kind"]]
        agreement = Agreement(share, 0.95 * share, 0.4 + share / 2, 0.4 + share / 2)
        found.append(pair_row(pair, agreement, (4000, 4100)))
    return found
