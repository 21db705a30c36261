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

    Hooks are kept apart: an SAE of one layer can't stand in for one of another, whose variance is different. Controls
    are neither on a frontier nor beat what is: they are no SAEs that anybody would choose.
    """
    return _frontiers(rows, ())


def frontier_of_kinds(rows: Sequence[Mapping[str, Any]]) -> list[bool]:
    """The same among the SAEs of one hook and one architecture (`kind`): whether each is the best of its kind."""
    return _frontiers(rows, ("kind",))


def is_control(row: Mapping[str, Any]) -> bool:
    """Whether an SAE stands in a sweep to be compared with, and not to be used; rows without the key are none."""
    return (row.get("control") or "none") != "none"


def place(row: Mapping[str, Any]) -> tuple[str, str]:
    """What an SAE reads and what it reconstructs, which differ for transcoders: only one place's FVU compare."""
    return row["hook"], row.get("output_hook") or row["hook"]


def _frontiers(rows: Sequence[Mapping[str, Any]], within: Sequence[str]) -> list[bool]:
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, row in enumerate(rows):
        if not is_control(row):
            groups.setdefault((*place(row), *(row.get(key) for key in within)), []).append(index)
    found = [False] * len(rows)
    for here in groups.values():
        for index, mark in zip(here, on_frontier([(rows[i]["l0"], rows[i]["fvu"]) for i in here]), strict=True):
            found[index] = mark
    return found
