"""What fires together: correlations of each feature with other features and with the inputs, on a sample of rows.

Others are taken in blocks of columns, each block dense and without its means, so that neither [d_sae, d_sae] numbers
nor the means of inputs, which may be far larger than what changes from row to row, are in the way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from midiscover.features.sample import Sample

_SLICE, _BLOCK = 512, 1024
"""Features, and others, whose products are in memory at once; a block's dense code takes 67 MB at 16,384 rows."""
_DENSE = 1 / 16
"""Share of the code that is not 0 from which dense products are faster than sums over entries."""
_LEAST_FEATURE, _LEAST_INPUT = 1e-4, 1e-12
"""Of the squares about 0 that those about the mean must be; what hardly moves is rounding, and correlates with none."""


class Related(NamedTuple):
    """For each of n features the most correlated others; all [n, k], highest first, on the CPU."""

    indices: Tensor
    """-1 where there are fewer."""
    pearson: Tensor
    """NaN where there are fewer, as `cosine`."""
    cosine: Tensor


class _Others(NamedTuple):
    """Columns [rows, m] that features are correlated with."""

    unit: Tensor
    """[rows, m] float32, without their means and divided by their spread; 0 where that is 0."""
    mean: Tensor
    """[m] float64, as the rest."""
    norm: Tensor
    """Root of the squares about 0."""
    spread: Tensor
    """Root of the squares about the mean; 0 for a column that correlates with nothing."""


class Relations:
    """Correlations of one SAE's features on a sample."""

    def __init__(self, sample: Sample, d_sae: int, device: torch.device | str = "cpu") -> None:
        self.d_sae, self.n = d_sae, len(sample)
        order = sample.feature.argsort(stable=True)
        self._feature, self._row = (of[order].long().to(device) for of in (sample.feature, sample.row))
        self._value, self._inputs = sample.value[order].to(device), sample.inputs.to(device)
        ends = torch.bincount(self._feature, minlength=d_sae).cumsum(0)
        self._starts = torch.cat([ends.new_zeros(1), ends])
        self._at: list[int] = self._starts.tolist()
        exact = self._value.double()
        self._total = torch.bincount(self._feature, weights=exact, minlength=d_sae)
        squares = torch.bincount(self._feature, weights=exact * exact, minlength=d_sae)
        self._norm = squares.sqrt()
        self._spread = _spread(squares - self._total**2 / max(1, self.n), squares, _LEAST_FEATURE)

    def features(self, k: int) -> Related:
        """The k features most correlated with each one, itself left out."""
        return self._related(self.d_sae, self._features_between, k, but_itself=True)

    def inputs(self, k: int) -> Related:
        """The k input dimensions most correlated with each feature."""
        return self._related(self._inputs.shape[1], self._inputs_between, k, but_itself=False)

    def _related(self, count: int, between: Callable[[int, int], _Others], k: int, *, but_itself: bool) -> Related:
        device, k = self._value.device, min(k, count - but_itself) if self.n else 0
        best = torch.full((self.d_sae, k), -torch.inf, device=device)
        indices = torch.zeros_like(best, dtype=torch.int64)
        seen: list[_Others] = []
        for block in slices(count, _BLOCK) if k else ():
            others = between(*block)
            flat = (others.spread == 0).nonzero().flatten()
            for start, stop in slices(self.d_sae, _SLICE):
                here = slice(start, stop)
                # The order within a line needs no division by the feature's own spread.
                products = self._products(start, stop, others.unit).index_fill_(1, flat, -torch.inf)
                for feature in range(max(start, block[0]), min(stop, block[1])) if but_itself else ():
                    products[feature - start, feature - block[0]] = -torch.inf
                found = products.topk(min(k, products.shape[1]), dim=1)
                values = torch.cat([best[here], found.values], 1)
                order = values.argsort(dim=1, descending=True, stable=True)[:, :k]
                best[here] = values.gather(1, order)
                indices[here] = torch.cat([indices[here], found.indices + block[0]], 1).gather(1, order)
            seen.append(others._replace(unit=torch.empty(0)))
        if not seen:
            return Related(indices.cpu(), best.cpu(), best.cpu())
        mean, norm, spread = (torch.cat([getattr(of, name) for of in seen])[indices] for name in _Others._fields[1:])
        pearson = best / self._spread[:, None]
        cosine = (best * spread + self._total[:, None] * mean) / (self._norm[:, None] * norm)
        none = ~pearson.isfinite()
        floats = (of.masked_fill(none, torch.nan).float() for of in (pearson, cosine))
        return Related(*(tensor.cpu() for tensor in (indices.masked_fill(none, -1), *floats)))

    def _products(self, start: int, stop: int, columns: Tensor) -> Tensor:
        """[stop - start, m]: features [start, stop) times columns [rows, m], summed over the rows."""
        if len(self._value) > _DENSE * self.n * self.d_sae:
            return self._codes(start, stop).T @ columns
        entries = slice(self._at[start], self._at[stop])
        offsets = self._starts[start:stop] - self._at[start]
        return embedding_bag(self._row[entries], columns, offsets, mode="sum", per_sample_weights=self._value[entries])

    def _codes(self, start: int, stop: int) -> Tensor:
        """[rows, stop - start] float32: the dense code of features [start, stop)."""
        entries = slice(self._at[start], self._at[stop])
        dense = self._value.new_zeros(self.n, stop - start)
        dense[self._row[entries], self._feature[entries] - start] = self._value[entries]
        return dense

    def _features_between(self, start: int, stop: int) -> _Others:
        here = slice(start, stop)
        mean, spread = self._total[here] / self.n, self._spread[here]
        unit = _unit(self._codes(start, stop).sub_(mean.float()), spread)
        return _Others(unit, mean, self._norm[here], spread)

    def _inputs_between(self, start: int, stop: int) -> _Others:
        x = self._inputs[:, start:stop].float()
        mean = x.mean(0, dtype=torch.float64)
        norm = torch.linalg.vector_norm(x, dim=0, dtype=torch.float64)
        centred = x - mean.float()
        squares = torch.linalg.vector_norm(centred, dim=0, dtype=torch.float64) ** 2
        spread = _spread(squares, norm**2, _LEAST_INPUT)
        return _Others(_unit(centred, spread), mean, norm, spread)


def slices(count: int, size: int) -> list[tuple[int, int]]:
    """[start, stop) of all in pieces of `size`, the last one shorter."""
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def _spread(about_mean: Tensor, about_zero: Tensor, least: float) -> Tensor:
    """Root of the squares about the mean; 0 where they are less than a share `least` of those about 0."""
    return torch.where(about_mean > least * about_zero, about_mean, 0.0).sqrt()


def _unit(centred: Tensor, spread: Tensor) -> Tensor:
    """Columns [rows, m] divided by their spread, in place; those of spread 0 become 0."""
    return centred.mul_(torch.where(spread > 0, 1 / spread, 0.0).float())
