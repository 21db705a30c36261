"""How much of what one SAE found another one finds too: matched decoder directions.

Pure torch on weights and plain rows; `results.sae_stability` loads the SAEs. Paulo and Belrose (2025, arXiv 2501.16615)
give two SAEs' features to one another with the Hungarian algorithm. Here each feature takes its best partner, which
costs one matrix product; the share of matched features is the same unless several take one partner, and never lower.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from midiscover.frontier import is_control
from midiscover.neighbours import Pair

MATCH = 0.7
"""Cosine from which two directions count as one feature."""
BLOCK_ELEMENTS = 1 << 24
"""Cosines held at a time, 64 MB: all of 20,480 x 20,480 would be 1.7 GB."""


class Agreement(NamedTuple):
    """Of two SAEs, A and B; each value is a share or a cosine, None where one has no live feature."""

    matched_a: float | None
    """Share of A's live features whose best cosine with B's live features is at least MATCH."""
    matched_b: float | None
    cosine_a: float | None
    """Mean over A's live features of that best cosine."""
    cosine_b: float | None

    @property
    def matched(self) -> float | None:
        """Mean of both directions."""
        return None if self.matched_a is None or self.matched_b is None else (self.matched_a + self.matched_b) / 2

    @property
    def cosine(self) -> float | None:
        """Mean of both directions."""
        return None if self.cosine_a is None or self.cosine_b is None else (self.cosine_a + self.cosine_b) / 2


def agreement(a: Tensor, b: Tensor, live_a: Tensor | None = None, live_b: Tensor | None = None) -> Agreement:
    """Compare the decoders of two SAEs that reconstruct the same hook.

    a: [n_a, d], b: [n_b, d], rows of unit norm, on one device; live: [n] bool, features that count (None: all).
    """
    a, b = (rows if live is None else rows[live] for rows, live in ((a, live_a), (b, live_b)))
    if not len(a) or not len(b):
        return Agreement(None, None, None, None)
    best_a, best_b = best_cosines(a, b)
    means = [float((best >= MATCH).double().mean()) for best in (best_a, best_b)]
    return Agreement(*means, *(float(best.double().mean()) for best in (best_a, best_b)))


def best_cosines(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """For unit rows a [n_a, d] and b [n_b, d]: each row's highest cosine with any row of the other, [n_a] and [n_b].

    Both come from one pass over the n_a x n_b cosines, of which BLOCK_ELEMENTS at most are held at a time.
    """
    a, b = a.float(), b.float()
    best_a = a.new_empty(len(a))
    best_b = b.new_full((len(b),), -1.0)
    rows = max(1, BLOCK_ELEMENTS // len(b))
    for start in range(0, len(a), rows):
        cosines = a[start : start + rows] @ b.T
        best_a[start : start + rows] = cosines.amax(1)
        best_b = torch.maximum(best_b, cosines.amax(0))
    return best_a, best_b


def pair_row(pair: Pair, found: Agreement, live: tuple[int, int]) -> dict[str, Any]:
    """A pair as a plain row: what the SAEs share, what they differ in, and how far they agree; JSON can hold it.

    live: how many features of A and of B counted.
    """
    a, b = pair.a, pair.b
    return {
        "axis": pair.axis,
        "hook": a["hook"],
        "layer": a.get("layer"),
        "kind": a["kind"],
        "a": a["sae_id"],
        "b": b["sae_id"],
        "a_value": axis_value(pair.axis, a),
        "b_value": axis_value(pair.axis, b),
        "setting": _shared(pair),
        "matched": found.matched,
        "cosine": found.cosine,
        **found._asdict(),
        "live_a": live[0],
        "live_b": live[1],
    }


def axis_value(axis: str, row: Mapping[str, Any]) -> str:
    """A row's value on an axis, for people: `seed 1`, `l1 3`, `topk`, `4,608 features`, `untrained`."""
    match axis:
        case "seed":
            return f"seed {row.get('seed')}"
        case "sparsity":
            return str(row.get("sparsity_label"))
        case "kind":
            return str(row["kind"])
        case "width":
            return f"{row['d_sae']:,} features"
        case _:
            return str(row["control"]) if is_control(row) else "trained"


def _shared(pair: Pair) -> str:
    """The settings that both SAEs of a pair have, the hook apart: `topk 4,608 k 32 seed 0 lr 0.001`.

    Of two variants the one that says more, for the other architecture has no such settings; of a control, the trained
    SAE's.
    """
    row, told = pair.a, [str(one.get("variant") or "") for one in (pair.a, pair.b)]
    parts = {
        "kind": row["kind"],
        "width": f"{row['d_sae']:,}",
        "sparsity": row.get("sparsity_label"),
        "seed": f"seed {row.get('seed')}",
        "variant": told[0] if pair.axis == "control" else max(told, key=len),
    }
    return " ".join(str(text) for axis, text in parts.items() if axis != pair.axis and text)
