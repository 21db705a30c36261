"""What fires together: correlations of a feature with other features and with the inputs, from a sample of rows.

Sums over all tokens would need [d_sae, d_sae] numbers. The sample holds its rows' sparse codes and inputs instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

_SLICE = 512
"""Features whose products with all others are in memory at once: 42 MB at 20,480 features."""
_LEAST_SPREAD = 1e-4
"""Of the squares about 0 that those about the mean must be."""


class Related(NamedTuple):
    """For each feature of a slice the most correlated others; all [n, k], highest first, NaN where there is none."""

    indices: Tensor
    pearson: Tensor
    cosine: Tensor


class Sample:
    """Rows with their codes, as (row, feature, value), and their inputs."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.numbers, self.inputs = state["numbers"], state["inputs"]
        self.row, self.feature, self.value = state["row"], state["feature"], state["value"]

    @classmethod
    def empty(cls, d_in: int) -> Self:
        """No row."""
        return cls(
            {
                "numbers": torch.empty(0, dtype=torch.int64),
                "inputs": torch.empty(0, d_in, dtype=torch.bfloat16),
                "row": torch.empty(0, dtype=torch.int32),
                "feature": torch.empty(0, dtype=torch.int32),
                "value": torch.empty(0),
            }
        )

    def state(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {name: getattr(self, name) for name in ("numbers", "inputs", "row", "feature", "value")}

    def __len__(self) -> int:
        return len(self.numbers)

    @classmethod
    def joined(cls, samples: Sequence[Self]) -> Self:
        """Several samples as one, in the order of their rows' numbers."""
        starts = torch.tensor([0, *map(len, samples)]).cumsum(0)
        numbers = torch.cat([sample.numbers for sample in samples])
        order = numbers.argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        moved = [place[sample.row.long() + int(start)] for sample, start in zip(samples, starts, strict=False)]
        row = torch.cat(moved) if moved else torch.empty(0, dtype=torch.int64)
        feature = torch.cat([sample.feature for sample in samples]).long()
        by_row = (row * (1 << 32) + feature).argsort()
        return cls(
            {
                "numbers": numbers[order],
                "inputs": torch.cat([sample.inputs for sample in samples])[order],
                "row": row[by_row].int(),
                "feature": feature[by_row].int(),
                "value": torch.cat([sample.value for sample in samples])[by_row],
            }
        )

    def codes(self, start: int, stop: int) -> Tensor:
        """[rows, stop - start] float32: the dense code of features [start, stop)."""
        dense = torch.zeros(len(self), stop - start)
        wanted = (self.feature >= start) & (self.feature < stop)
        dense[self.row[wanted].long(), self.feature[wanted].long() - start] = self.value[wanted]
        return dense


class Relations:
    """Correlations of one SAE's features on a sample."""

    def __init__(self, sample: Sample, d_sae: int) -> None:
        self.sample, self.d_sae, n = sample, d_sae, max(1, len(sample))
        feature, value = sample.feature.long(), sample.value.double()
        total = torch.bincount(feature, weights=value, minlength=d_sae)
        squares = torch.bincount(feature, weights=value * value, minlength=d_sae)
        self.mean, self.norm = total / n, squares.sqrt()
        self.spread = _spread(squares - n * self.mean**2, squares)
        # [d_sae, rows], so that a product with a dense slice costs only the entries; COO's takes several times as long.
        entries = torch.stack([sample.feature.long(), sample.row.long()])
        by_entry = torch.sparse_coo_tensor(entries, sample.value, (d_sae, len(sample)), check_invariants=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
            self.transposed = by_entry.coalesce().to_sparse_csr()
        x = sample.inputs.float()
        self.x_mean, self.x_norm = x.mean(0).double(), x.norm(dim=0).double()
        self.x_spread = _spread(((x.double() - self.x_mean) ** 2).sum(0), self.x_norm**2)

    def features(self, start: int, stop: int, k: int) -> Related:
        """The k features most correlated with each of [start, stop), itself left out."""
        if not len(self.sample):
            return _none(stop - start)
        products = (self.transposed @ self.sample.codes(start, stop)).T.double()  # [n, d_sae]
        here = torch.arange(start, stop)
        pearson = self._pearson(products, here, self.mean, self.spread)
        pearson[torch.arange(stop - start), here] = -torch.inf
        cosine = products / (self.norm[here, None] * self.norm).clamp(min=1e-30)
        return _best(pearson, cosine, k)

    def inputs(self, start: int, stop: int, k: int) -> Related:
        """The k input dimensions most correlated with each of [start, stop)."""
        if not len(self.sample):
            return _none(stop - start)
        products = (self.sample.codes(start, stop).T @ self.sample.inputs.float()).double()  # [n, d_in]
        here = torch.arange(start, stop)
        pearson = self._pearson(products, here, self.x_mean, self.x_spread)
        cosine = products / (self.norm[here, None] * self.x_norm).clamp(min=1e-30)
        return _best(pearson, cosine, k)

    def _pearson(self, products: Tensor, here: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
        covariance = products - len(self.sample) * self.mean[here, None] * mean
        scale = self.spread[here, None] * spread
        return torch.where(scale > 0, covariance / scale.clamp(min=1e-30), -torch.inf)


def slices(d_sae: int, size: int = _SLICE) -> list[tuple[int, int]]:
    """[start, stop) of all features in pieces."""
    return [(start, min(start + size, d_sae)) for start in range(0, d_sae, size)]


def _spread(squares: Tensor, about_zero: Tensor) -> Tensor:
    """Root of the squared distances to the mean; 0, so that nothing correlates, where float32 products hide them."""
    return torch.where(squares > _LEAST_SPREAD * about_zero, squares, 0.0).sqrt()


def _best(pearson: Tensor, cosine: Tensor, k: int) -> Related:
    order = pearson.argsort(dim=1, descending=True, stable=True)[:, :k]
    best = pearson.gather(1, order)
    known = best.isfinite()
    return Related(
        torch.where(known, order, -1),
        torch.where(known, best, torch.nan).float(),
        torch.where(known, cosine.gather(1, order), torch.nan).float(),
    )


def _none(count: int) -> Related:
    empty = torch.empty(count, 0)
    return Related(empty.long(), empty, empty)
