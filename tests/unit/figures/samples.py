"""Made-up features and contexts, in the shape of `features.records`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

WEIRD = [
    "<script>alert('x')</script>",
    " &amp; &",
    "\n\n",
    " 中文字",
    "שלום",
    " مرحبا",
    "\t",
    "\x08\x00\x0c\x1b\uffff",
    "\u202e",
    "e\u0301",
    "\ufffd",
    "   ",
    '"',
    "\\",
    "{{x}}",
    "datum.value",
    " " + "long" * 40,
]
"""Tokens that markup, right-to-left text, wide characters or sheer length could break."""


class SampleContext(NamedTuple):
    kind: str
    bin_min: float | None
    value: float
    tokens: list[str]
    values: list[float]
    peak: int
    window: int
    position: int
    document: int | None


def context(
    kind: str = "top",
    tokens: Sequence[str] = ("The", " dog", " ran"),
    peak: int = 2,
    value: float = 8.0,
    document: int | None = 3,
    bin_min: float | None = -1.0,
) -> SampleContext:
    """Values fall off to both sides of the peak."""
    values = [round(value / (1 + abs(place - peak)) ** 2, 4) for place in range(len(tokens))]
    return SampleContext(kind, bin_min, value, list(tokens), values, peak, 12, 40, document)


def feature_row(
    index: int = 17, *, tokens: Sequence[str] = (), dead: bool = False, logits: bool = True
) -> dict[str, Any]:
    """A row of features.parquet; 16 bins over (0, 8]."""
    heights = [] if dead else [4000 // (bin + 1) ** 2 for bin in range(16)]
    named = [*tokens, *(f" token{place}" for place in range(10))][:10] if logits else []
    return {
        "index": index,
        "count": sum(heights),
        "firing_rate": sum(heights) / 1_000_000,
        "mean": 0.0 if dead else 0.7,
        "max": 0.0 if dead else 8.0,
        "std": 0.0 if dead else 0.9,
        "quantiles": [] if dead else [0.2, 0.4, 1.0, 2.0, 3.5, 6.0],
        "hist_heights": heights,
        "hist_values": [] if dead else [0.25 + 0.5 * bin for bin in range(16)],
        "pos_tokens": named,
        "pos_values": [1.5 - 0.1 * place for place in range(len(named))],
        "neg_tokens": named[::-1],
        "neg_values": [-0.9 + 0.05 * place for place in range(len(named))],
        "neighbour_index": [1, 2, 3],
        "neighbour_cosine": [0.5, 0.4, 0.3],
        "coactive_index": [] if dead else [9, 8],
        "coactive_pearson": [] if dead else [0.6, 0.55],
        "top_tokens": [] if dead else [*tokens, " ran", " walked"][:5],
    }
