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


class Separation(NamedTuple):
    """Of each feature, all [features] float64."""

    auroc: Tensor
    """Chance that a text with the concept scores higher than one without; ties count half."""
    effect: Tensor
    """Cohen's d: difference of the means over the pooled standard deviation; 0 where nothing varies."""
    p: Tensor
    """Mann-Whitney, one-sided for higher scores with the concept; normal approximation with ties and continuity."""
    q: Tensor
    """Benjamini-Hochberg over all features (Benjamini and Hochberg 1995)."""


def separation(scores: Tensor, positive: Tensor) -> Separation:
    """How the texts of `positive` differ from the others in each feature."""
    scores = scores.double()
    ranks = midranks(scores)
    n1, n2 = int(positive.sum()), int((~positive).sum())
    u = ranks[positive].sum(0) - n1 * (n1 + 1) / 2
    p = _mann_whitney(scores, u, n1, n2)
    return Separation(u / (n1 * n2), _cohen(scores, positive), p, benjamini_hochberg(p))


def auroc(scores: Tensor, positive: Tensor) -> Tensor:
    """[features] the area under the ROC curve alone."""
    n1, n2 = int(positive.sum()), int((~positive).sum())
    return (midranks(scores.double())[positive].sum(0) - n1 * (n1 + 1) / 2) / (n1 * n2)


def midranks(scores: Tensor) -> Tensor:
    """Ranks from 1 down each column [texts, features]; equal scores share the mean of their ranks."""
    order = scores.argsort(dim=0, stable=True)
    ordered = scores.gather(0, order)
    n = len(scores)
    place = torch.arange(n, device=scores.device, dtype=torch.float64)[:, None].expand_as(ordered)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    first = torch.where(new, place, -1.0).cummax(dim=0).values
    ends = torch.ones_like(new)
    ends[:-1] = new[1:]
    last = torch.where(ends, place, float(n)).flip(0).cummin(dim=0).values.flip(0)
    return torch.empty_like(ordered).scatter_(0, order, (first + last) / 2 + 1)


def _tie_term(scores: Tensor) -> Tensor:
    """sum of t^3 - t over groups of equal scores, for each feature."""
    ordered = scores.sort(dim=0).values
    n = len(scores)
    place = torch.arange(n, device=scores.device, dtype=torch.float64)[:, None].expand_as(ordered)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    first = torch.where(new, place, -1.0).cummax(dim=0).values
    ends = torch.ones_like(new)
    ends[:-1] = new[1:]
    size = torch.where(ends, place - first + 1, 0.0)
    return (size**3 - size).sum(0)


def _mann_whitney(scores: Tensor, u: Tensor, n1: int, n2: int) -> Tensor:
    n = n1 + n2
    variance = n1 * n2 / 12 * ((n + 1) - _tie_term(scores) / (n * (n - 1)))
    z = (u - n1 * n2 / 2 - 0.5) / variance.clamp(min=1e-30).sqrt()
    p = 0.5 * torch.special.erfc(z / math.sqrt(2))
    return torch.where(variance > 0, p, 1.0)


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


def family_wise(
    scores: Tensor, positive: Tensor, *, paired: bool, shuffles: int, seed: int, features: Tensor | None = None
) -> Tensor:
    """p of each of `features` (all of them where None) against the highest AUROC that chance gives to any of them.

    The labels are shuffled `shuffles` times (Westfall and Young 1993). paired: text i with the concept belongs to the
    i-th without it, and a shuffle swaps within pairs; else all labels are permuted.
    """
    chosen = scores.double() if features is None else scores[:, features].double()
    ranks = midranks(chosen)
    observed = ranks[positive].sum(0)
    generator = torch.Generator().manual_seed(seed)
    exceeded = torch.zeros(chosen.shape[1], dtype=torch.float64)
    for start in range(0, shuffles, _SHUFFLES_AT_ONCE):
        count = min(_SHUFFLES_AT_ONCE, shuffles - start)
        labels = _shuffled(positive, count, paired=paired, generator=generator)
        highest = (labels.double() @ ranks).amax(dim=1)  # the rank sum orders as AUROC does: n1 and n2 stay
        exceeded += (highest[:, None] >= observed - 1e-9).sum(0)
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
