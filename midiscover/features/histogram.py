"""Counts, moments and an exact histogram of each feature's activations, in memory of the features alone.

A feature's histogram has 128 equal bins over (0, R], where R is the smallest power of two that is not below its
highest activation. When that grows, R doubles and neighbouring bins are added up: bins nest, so counts stay exact and
the outcome depends neither on the order of rows nor on how they were cut into batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

BINS = 128
_LOG_BINS = 7
NEVER = -127
"""Exponent of R of a feature that has not fired."""


class Histogram:
    """Statistics of `d_sae` features; all tensors on one device."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.count, self.total, self.squares = state["count"], state["total"], state["squares"]
        self.max, self.exponent, self.bins = state["max"], state["exponent"], state["bins"]

    @classmethod
    def empty(cls, d_sae: int, device: torch.device | str = "cpu") -> Self:
        """Of features that nothing is known of."""
        return cls(
            {
                "count": torch.zeros(d_sae, dtype=torch.int64, device=device),
                "total": torch.zeros(d_sae, dtype=torch.float64, device=device),
                "squares": torch.zeros(d_sae, dtype=torch.float64, device=device),
                "max": torch.zeros(d_sae, device=device),
                "exponent": torch.full((d_sae,), NEVER, dtype=torch.int32, device=device),
                "bins": torch.zeros(d_sae, BINS, dtype=torch.int64, device=device),
            }
        )

    def state(self) -> dict[str, Tensor]:
        """All tensors by name."""
        names = ("count", "total", "squares", "max", "exponent", "bins")
        return {name: getattr(self, name) for name in names}

    def add(self, features: Tensor, values: Tensor) -> None:
        """Activations above 0: values [n] float32 of features [n]. `grow` must have been told of their maxima."""
        d_sae = len(self.count)
        exact = values.double()
        self.count += torch.bincount(features, minlength=d_sae)
        self.total += torch.bincount(features, weights=exact, minlength=d_sae)
        self.squares += torch.bincount(features, weights=exact * exact, minlength=d_sae)
        place = features * BINS + bin_of(values, self.exponent[features])
        self.bins.view(-1).add_(torch.bincount(place, minlength=d_sae * BINS))

    def grow(self, maxima: Tensor) -> Tensor:
        """Make room for activations up to `maxima` [d_sae]; returns how many times each R doubled, int32 [d_sae]."""
        self.max = torch.maximum(self.max, maxima)
        exponent = range_exponent(self.max)
        doublings = exponent - self.exponent
        growing = (doublings > 0).nonzero().flatten()
        if len(growing):
            self.bins[growing] = merged_bins(self.bins[growing], doublings[growing])
        self.exponent = exponent
        return doublings

    def merge(self, other: Self) -> None:
        """Add what another histogram has seen."""
        self.grow(other.max)
        shift = self.exponent - other.exponent
        self.bins += merged_bins(other.bins, shift)
        self.count += other.count
        self.total += other.total
        self.squares += other.squares


def range_exponent(maxima: Tensor) -> Tensor:
    """int32: e of the smallest 2^e that is not below each of `maxima`; `NEVER` where that is 0."""
    mantissa, exponent = torch.frexp(maxima)  # maxima = mantissa * 2^exponent with mantissa in [0.5, 1)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return torch.where(maxima > 0, exponent.clamp(min=NEVER), NEVER).int()


def bin_of(values: Tensor, exponent: Tensor) -> Tensor:
    """The bin [n] of values [n] above 0 in a range (0, 2^exponent]; a power of two scales without rounding."""
    scaled = torch.ldexp(values.double(), _LOG_BINS - exponent.double())
    return (scaled.ceil().long() - 1).clamp(0, BINS - 1)


def merged_bins(bins: Tensor, doublings: Tensor) -> Tensor:
    """bins [n, BINS] in ranges that are 2^doublings as wide, int [n]."""
    place = torch.arange(BINS, device=bins.device)[None, :] >> doublings.clamp(0, _LOG_BINS)[:, None].long()
    return torch.zeros_like(bins).scatter_add_(1, place, bins)
