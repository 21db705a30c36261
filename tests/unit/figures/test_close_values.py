"""Values that differ by less than the digits that a chart keeps: it draws, and what it draws has an extent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from midiscover import figures
from midiscover.figures.norms import BINS
from midiscover.summary import Row
from tests.unit.grid_tables import sae_row

Draw = Callable[[Sequence[Row]], figures.Chart]


@pytest.mark.parametrize(
    "draw", [figures.map_chart, figures.frontier_chart, figures.foreign_chart, figures.share_chart]
)
@pytest.mark.parametrize(
    ("measure", "values"),
    [
        ("l0", (32.0, 31.99995)),  # k 32, and one token with fewer features above 0
        ("fvu", (0.3000001, 0.3000002)),
        ("ce_recovered", (-0.5, -0.5000001)),
        ("dead_share", (0.25, 0.25000001)),
        ("fvu", (1e-300, 2e-300)),
        ("fvu", (0.0, 0.0)),
    ],
)
def test_close_values_are_drawn(draw: Draw, measure: str, values: tuple[float, float]) -> None:
    rows = [sae_row(layer, "topk", "k", 32, 0) | {measure: value} for layer, value in enumerate(values, 1)]
    assert figures.png(draw(rows), scale=1).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("low", "high"), [(0.99998, 1.0), (0.9998, 1.0), (-1.0, -0.9998), (1.0, 40.0), (-1e-9, 2e-9), (1e6, 1e6 + 101)]
)
def test_every_bar_of_a_histogram_has_the_same_width(low: float, high: float) -> None:
    rows = [{"value": low + (high - low) * place / 100} for place in range(101)]
    chart = figures.histogram_chart(rows, "Norms", "Norm")
    bars = figures.data(chart)["histogram"]
    widths = [bar["high"] - bar["low"] for bar in bars]
    mean = sum(widths) / len(widths)
    assert widths == pytest.approx([mean] * len(bars), rel=0.02)
    assert sum(bar["count"] for bar in bars) == len(rows)
    if len(bars) == BINS:  # from the smallest value to the largest
        assert (bars[0]["low"], bars[-1]["high"]) == pytest.approx((low, high), abs=mean / 50)
    spec: dict[str, Any] = chart.to_dict()
    assert [bars[0]["low"], bars[-1]["high"]] == spec["layer"][0]["encoding"]["x"]["scale"]["domain"]
