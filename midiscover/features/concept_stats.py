"""How well features tell two groups of texts apart: AUROC, effect size, p-values, and how far chance would go.

Scores are [texts, features]; `positive` [texts] says which texts hold the concept. Everything is over all features at
once, in float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_SHUFFLES_AT_ONCE = 128
_SAME = 1e-4
"""Standard deviations within which two U are equal: above the rounding of float32, below half a rank of 1,000 texts."""


class Separation(NamedTuple):
    """Of each feature, all [features] float64."""

    auroc: Tensor
    """Chance that a text with the concept scores higher than one without; ties count half."""
    effect: Tensor
    """Cohen's d: difference of the means over the pooled standard deviation; 0 where nothing varies within a group."""
    p: Tensor
    """Mann-Whitney, one-sided for higher scores with the concept; normal approximation with ties and continuity."""
    q: Tensor
    """Benjamini-Hochberg over all features (Benjamini and Hochberg 1995)."""


class Ranked(NamedTuple):
    """Scores by their order, which is all that AUROC and the shuffles need."""

    ranks: Tensor
    """[texts, features] from 1 down each column, float32, in which halves are exact; equal scores share the mean."""
    ties: Tensor
    """[features] float64, sum of t^3 - t over groups of t equal scores."""


def ranked(scores: Tensor) -> Ranked:
    """The order of scores [texts, features] within each feature."""
    rows = scores.T.contiguous()
    ordered = rows.sort(dim=1).values
    below = torch.searchsorted(ordered, rows, out_int32=True)
    up_to = torch.searchsorted(ordered, rows, right=True, out_int32=True)
    size = (up_to - below).double()
    return Ranked((below + up_to + 1).T.float() / 2, size.square_().sum(1) - len(scores))


def separation(scores: Tensor, positive: Tensor, order: Ranked | None = None) -> Separation:
    """How the texts of `positive` differ from the others in each feature; order: that of the scores, if at hand."""
    ranks, ties = order or ranked(scores)
    n1, n2 = int(positive.sum()), int((~positive).sum())
    u = ranks[positive].sum(0, dtype=torch.float64) - n1 * (n1 + 1) / 2
    deviation = _deviation(ties, n1, n2)
    z = (u - n1 * n2 / 2 - 0.5) / deviation
    p = torch.where(deviation.isfinite(), 0.5 * torch.special.erfc(z / math.sqrt(2)), 1.0)
    return Separation(u / (n1 * n2), _cohen(scores.double(), positive), p, benjamini_hochberg(p))


def _deviation(ties: Tensor, n1: int, n2: int) -> Tensor:
    """Standard deviation of Mann-Whitney's U under chance; infinite where all scores are equal."""
    n = n1 + n2
    variance = n1 * n2 / 12 * ((n + 1) - ties / (n * (n - 1)))
    return torch.where(variance > 1e-9, variance, math.inf).sqrt()


def _cohen(scores: Tensor, positive: Tensor) -> Tensor:
    a, b = scores[positive], scores[~positive]
    pooled = ((len(a) - 1) * a.var(0) + (len(b) - 1) * b.var(0)) / (len(a) + len(b) - 2)
    return torch.where(pooled > 0, (a.mean(0) - b.mean(0)) / pooled.clamp(min=1e-30).sqrt(), 0.0)


def benjamini_hochberg(p: Tensor) -> Tensor:
    """Smallest false discovery rates [features] at which each p-value would be accepted."""
    order = p.argsort(descending=True)
    n = len(p)
    scaled = p[order] * n / torch.arange(n, 0, -1, device=p.device)
    return torch.empty_like(p).scatter_(0, order, scaled.cummin(0).values.clamp(max=1.0))


def family_wise(order: Ranked, positive: Tensor, *, paired: bool, shuffles: int, seed: int) -> Tensor:
    """p of each feature against the most that chance gives to any of them (Westfall and Young 1993).

    The labels are shuffled `shuffles` times, and the highest U among all features is taken each time, in standard
    deviations, so that features that fire in few texts are held against as much as those that fire in all.
    paired: text i with the concept belongs to the i-th without it, and a shuffle swaps within pairs; else all labels
    are permuted.
    """
    ranks, ties = order
    n1, n2 = int(positive.sum()), int((~positive).sum())
    # Sums of these over the texts with the concept are U in standard deviations.
    parts = (ranks - (n1 + n2 + 1) / 2) / _deviation(ties, n1, n2).float()
    observed = parts[positive].sum(0)
    generator = torch.Generator().manual_seed(seed)
    exceeded = torch.zeros(len(ties), dtype=torch.float64)
    for start in range(0, shuffles, _SHUFFLES_AT_ONCE):
        count = min(_SHUFFLES_AT_ONCE, shuffles - start)
        labels = _shuffled(positive, count, paired=paired, generator=generator)
        highest = (labels.float() @ parts).amax(dim=1)
        exceeded += count - torch.searchsorted(highest.sort().values, observed - _SAME)
    return (exceeded + 1) / (shuffles + 1)


def _shuffled(positive: Tensor, count: int, *, paired: bool, generator: torch.Generator) -> Tensor:
    """[count, texts] bool: other labellings with as many positive ones."""
    if not paired:
        order = torch.rand(count, len(positive), generator=generator).argsort(dim=1)
        return positive[order]
    with_concept, without = positive.nonzero().flatten(), (~positive).nonzero().flatten()
    swap = torch.rand(count, len(with_concept), generator=generator) < 0.5
    labels = torch.zeros(count, len(positive), dtype=torch.bool)
    labels[:, with_concept] = ~swap
    labels[:, without] = swap
    return labels


def resampled_auroc(scores: Tensor, positive: Tensor, *, paired: bool, resamples: int, seed: int) -> Tensor:
    """AUROC of each feature over texts drawn with replacement (the bootstrap): [resamples, features].

    The draws depend on the labels, `paired` and `seed` alone, so that two systems scored on the same texts are drawn
    alike and can be subtracted. paired: as in `family_wise`; pairs are drawn as a whole.
    """
    a, b = scores[positive].T.contiguous(), scores[~positive].T.contiguous()
    n1, n2 = a.shape[1], b.shape[1]
    generator = torch.Generator().manual_seed(seed)
    of_a = _draws(n1, resamples, generator)
    of_b = of_a if paired else _draws(n2, resamples, generator)
    found = []
    for mine, others in zip(a, b, strict=True):  # one feature, whose pairs of texts would be too many to hold
        ordered, order = others.sort()
        drawn = torch.nn.functional.pad(of_b[:, order].cumsum(1), (1, 0))
        below, up_to = (drawn[:, torch.searchsorted(ordered, mine, right=right)] for right in (False, True))
        found.append((of_a * (below + up_to)).sum(1) / (2 * n1 * n2))
    return torch.stack(found, dim=1)


def _draws(texts: int, resamples: int, generator: torch.Generator) -> Tensor:
    """[resamples, texts] how often each text is drawn."""
    drawn = torch.randint(texts, (resamples, texts), generator=generator)
    counts = torch.zeros(resamples, texts, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
