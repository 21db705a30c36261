"""What a pack says of itself while it trains. Passes through processes that have no use for torch, so imports none."""

from __future__ import annotations

from typing import NamedTuple


class Progress(NamedTuple):
    """How far a pack is."""

    step: int
    steps: int
    tokens_per_second: float
    latest: dict[str, dict[str, float]]
    """SAE id -> the newest point of its history."""
