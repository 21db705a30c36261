"""The frontier against its definition, tried on every pair of points."""

from __future__ import annotations

import random
from math import inf, nan

import pytest

from midiscover.frontier import frontier_of_hooks, on_frontier


def by_definition(points: list[tuple[float, float]]) -> list[bool]:
    return [not any(a <= x and b <= y and (a < x or b < y) for a, b in points) for x, y in points]


@pytest.mark.parametrize("seed", range(50))
def test_equals_the_definition(seed: int) -> None:
    draw = random.Random(seed)
    # Few distinct values, so that ties and equal points are common.
    points = [(float(draw.randint(0, 6)), float(draw.randint(0, 6))) for _ in range(draw.randint(0, 30))]
    assert on_frontier(points) == by_definition(points)


def test_points_without_a_number_stand_aside() -> None:
    points = [(1.0, 1.0), (nan, 0.0), (0.0, None), (inf, 0.0), (None, None), (2.0, 0.5)]
    assert on_frontier(points) == [True, False, False, False, False, True]


def test_hooks_do_not_compete() -> None:
    rows = [
        {"hook": "a", "l0": 10.0, "fvu": 0.1},
        {"hook": "a", "l0": 20.0, "fvu": 0.2},
        {"hook": "b", "l0": 30.0, "fvu": 0.9},
    ]
    assert frontier_of_hooks(rows) == [True, False, True]
