"""The Pareto frontier of two costs: which points nobody beats. Pure Python; what the costs mean is the caller's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any


def on_frontier(points: Sequence[tuple[float | None, float | None]]) -> list[bool]:
    """Whether each point lies on the frontier of two costs (less is better), such as L0 and FVU.

    A point is beaten by one that is at most as high in both costs and lower in one; equal points stay together.
    A point with a missing, infinite or NaN cost was not measured: it neither lies on the frontier nor beats others.
    Sorting makes it O(n log n).
    """
    found = [False] * len(points)
    measured = [
        (first, second, index)
        for index, (first, second) in enumerate(points)
        if first is not None and second is not None and isfinite(first) and isfinite(second)
    ]
    best: tuple[float, float] | None = None
    for first, second, index in sorted(measured):
        if best is None or second < best[1]:
            best = (first, second)
        found[index] = (first, second) == best
    return found


def frontier_of_hooks(rows: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Whether each SAE (a row with `hook`, `l0`, `fvu`) lies on the L0-FVU frontier of its own hook.

    Hooks are kept apart: an SAE of one layer can't stand in for one of another, whose variance is different.
    """
    found = [False] * len(rows)
    for hook in {row["hook"] for row in rows}:
        here = [index for index, row in enumerate(rows) if row["hook"] == hook]
        for index, mark in zip(here, on_frontier([(rows[i]["l0"], rows[i]["fvu"]) for i in here]), strict=True):
            found[index] = mark
    return found
