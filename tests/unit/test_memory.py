"""A pack is cut into as few parts as fit, in order; the reckoning against sums written out."""

from __future__ import annotations

import itertools

import pytest

from midiscover.memory import FIXED_BYTES, Sizes, fit_together, training_bytes


def test_the_reckoning_written_out() -> None:
    """phi-2's width and 20,480 features: two weights of d_in x d_sae and their biases, four float32 copies of each."""
    sae = Sizes(2560, 20480, 2560, 4096)
    kept = 4 * 4 * (2 * 2560 * 20480 + 2 * 20480)
    step = 4 * 4096 * (6 * 20480 + 8 * 5120)
    assert training_bytes([sae]) == FIXED_BYTES + kept + step
    assert training_bytes([sae] * 5) == FIXED_BYTES + 5 * kept + step
    assert training_bytes([]) == FIXED_BYTES


@pytest.mark.parametrize("widths", [(64,), (64, 64, 64), (64, 512, 64, 64), (512, 512), (64, 128, 256, 512, 1024)])
@pytest.mark.parametrize("room", [1, 300, 700, 10_000])
def test_parts_are_in_order_fit_and_are_as_few_as_can_be(widths: tuple[int, ...], room: int) -> None:
    saes = [Sizes(32, width, 32, 16) for width in widths]
    limit = training_bytes([Sizes(32, room, 32, 16)])
    parts = fit_together(saes, limit)
    assert [i for part in parts for i in part] == list(range(len(saes)))
    for part in parts:
        assert len(part) == 1 or training_bytes([saes[i] for i in part]) <= limit

    def fits(cuts: tuple[int, ...]) -> bool:
        edges = [0, *cuts, len(saes)]
        pieces = [saes[a:b] for a, b in itertools.pairwise(edges)]
        return all(len(piece) == 1 or training_bytes(piece) <= limit for piece in pieces)

    fewest = min(
        n + 1 for n in range(len(saes)) for cuts in itertools.combinations(range(1, len(saes)), n) if fits(cuts)
    )
    assert len(parts) == fewest
