"""Numbers behind the axes of charts: ranges, round ticks, fewer points and fewer digits. Draws nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from midiscover.summary import Row, is_missing

LOG_RATIO = 20
"""A measure whose largest value is more than this many times its smallest is drawn on a log axis."""


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, closer where there are few decades: at most 1, 2, 3, 5, 7 of each."""
    span = math.log10(high / low)
    digits = (1, 2, 3, 5, 7) if span < 1.5 else (1, 2, 5) if span < 4 else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [float(f"{digit}e{decade}") for decade in decades for digit in digits]
    return [tick for tick in ticks if low <= tick <= high]


def thinned(curves: Sequence[Row], points: int) -> list[Row]:
    """Every n-th point of each curve and its last one, so that all together have about `points` at most."""
    step = max(1, math.ceil(len(curves) / points))
    by_sae: dict[Any, list[Row]] = {}
    for row in curves:
        by_sae.setdefault(row["sae_id"], []).append(row)
    return [
        row
        for curve in by_sae.values()
        for index, row in enumerate(curve)
        if index % step == 0 or index == len(curve) - 1
    ]


def wants_log(values: Sequence[float]) -> bool:
    """Whether a log axis helps: the values are positive and span more than LOG_RATIO."""
    return bool(values) and min(values) > 0 and max(values) > LOG_RATIO * min(values)


def padded(values: Sequence[float], factor: float = 1.25) -> tuple[float, float]:
    """The range of positive values, widened by `factor` at both ends of a log axis; 1 to 100 where there are none."""
    return (rounded(min(values) / factor), rounded(max(values) * factor)) if values else (1.0, 100.0)


def rounded(value: Any) -> Any:
    """Five significant digits, which no chart can show and a small file can hold; None for what is not a number."""
    return None if is_missing(value) else float(f"{value:.5g}")
