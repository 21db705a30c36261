"""Distributions against numpy's histogram."""

from __future__ import annotations

import numpy as np
import pytest

from midiscover import figures
from midiscover.figures.norms import BINS, RATES, bin_edges, counted, rate_class


def test_histogram_is_numpys() -> None:
    values = np.random.default_rng(0).normal(1, 0.3, 5000).tolist()
    rows = figures.data(figures.histogram_chart([{"value": v} for v in values], "Norms", "Norm"))["histogram"]
    counts, edges = np.histogram(values, bins=BINS)
    assert [row["count"] for row in rows] == counts.tolist()
    np.testing.assert_allclose([row["low"] for row in rows], edges[:-1], rtol=1e-3)


def test_norms_that_are_all_one_stand_in_one_bar() -> None:
    values = [1.0, 1.0 - 6e-8, 1.0 + 1.2e-7] * 100
    counts = counted(values, bin_edges(values))
    assert max(counts) == 300
    assert counts.index(300) == len(counts) // 2


def test_groups_share_their_bins_and_what_is_no_number_is_told() -> None:
    rows = [{"value": v, "group": g} for g in ("encoder", "decoder") for v in (0.0, 1.0, 4.0)]
    chart = figures.histogram_chart([*rows, {"value": float("nan"), "group": "encoder"}], "Norms", "Norm")
    table = figures.data(chart)["histogram"]
    for group in ("encoder", "decoder"):
        assert sum(row["count"] for row in table if row["group"] == group) == 3
    assert chart.to_dict()["title"]["subtitle"] == ["1 values that are no numbers are left out"]


@pytest.mark.parametrize(
    ("rate", "name"), [(0.0, "never"), (1e-5, "up to 0.001%"), (2e-5, "to 0.01%"), (0.5, RATES[-1][0])]
)
def test_rates_fall_into_the_class_whose_highest_they_do_not_pass(rate: float, name: str) -> None:
    assert rate_class(rate) == name


def test_dead_features_are_counted() -> None:
    rates = [0.0] * 30 + [5e-4] * 50 + [0.02] * 20
    table = figures.data(figures.dead_chart([{"value": rate} for rate in rates]))["rates"]
    assert {row["rate"]: row["count_text"] for row in table if row["count"]} == {
        "never": "30 (30.0%)",
        "to 0.1%": "50 (50.0%)",
        "to 10%": "20 (20.0%)",
    }


def test_empty_and_grouped_tables_draw() -> None:
    groups = [{"value": 0.01 * place, "group": f"SAE {place % 3}"} for place in range(30)]
    for chart in (
        figures.histogram_chart([], "Norms", "Norm"),
        figures.histogram_chart(groups, "Norms", "Norm"),
        figures.histogram_chart([{"value": 0.0}], "Norms", "Norm"),
        figures.dead_chart([]),
        figures.dead_chart(groups),
    ):
        assert figures.png(chart, scale=1).startswith(b"\x89PNG")
