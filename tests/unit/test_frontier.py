"""The frontier against its definition, tried on every pair of points."""

from __future__ import annotations

import random
from math import inf, nan

import pytest

from midiscover.frontier import frontier_of_hooks, frontier_of_kinds, on_frontier


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


def test_each_architecture_has_a_frontier_of_its_own() -> None:
    rows = [
        {"hook": "a", "kind": "topk", "l0": 10.0, "fvu": 0.1},
        {"hook": "a", "kind": "standard", "l0": 12.0, "fvu": 0.2},
        {"hook": "a", "kind": "standard", "l0": 13.0, "fvu": 0.3},
    ]
    assert frontier_of_hooks(rows) == [True, False, False]
    assert frontier_of_kinds(rows) == [True, True, False]


def test_controls_neither_lie_on_a_frontier_nor_beat_anybody() -> None:
    rows = [
        {"hook": "a", "kind": "topk", "control": "untrained", "l0": 1.0, "fvu": 0.0},
        {"hook": "a", "kind": "topk", "control": "none", "l0": 10.0, "fvu": 0.1},
    ]
    assert frontier_of_hooks(rows) == frontier_of_kinds(rows) == [False, True]


def test_transcoders_compete_only_with_those_of_the_same_output() -> None:
    rows = [
        {"hook": "a:in", "output_hook": "a", "l0": 10.0, "fvu": 0.2},
        {"hook": "a:in", "output_hook": "b", "l0": 5.0, "fvu": 0.1},
        {"hook": "a:in", "output_hook": "a:in", "l0": 1.0, "fvu": 0.01},
    ]
    assert frontier_of_hooks(rows) == [True, True, True]
