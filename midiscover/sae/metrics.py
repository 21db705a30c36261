"""Held-out metrics of one SAE, accumulated batch by batch in float64. Definitions: design and README.

All take raw activations and the folded SAE; sums are over every token seen, so batches may have any size. What is
reconstructed is called x here; for a transcoder that is the hook it predicts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from midiscover.errors import CorpusError
from midiscover.sae.pattern import places_of, positive

DENSITY_EDGES = [round(-6 + 0.25 * i, 2) for i in range(25)]
"""Edges of the histogram of log10 firing rates: 10^-6 to 1."""
INACTIVE_RATE = 1e-3
"""A feature firing on at most this share of tokens is 'inactive' in the seed project's sense."""

FOREIGN = ("tokens_foreign", "l0_foreign", "fvu_foreign")
"""What is measured on a foreign text."""


class MetricSums:
    """Sums from which every reconstruction and sparsity metric follows; memory O(d_out + d_sae).

    fvu: residual sum of squares over the sum of squared distances to the global mean.
    explained_variance_legacy: mean over tokens of 1 - |x - x_hat|^2 / |x - mean|^2 (SAELens' older form).
    explained_variance_residual: 1 - var(x - x_hat) / var(x), which forgives a constant error (dictionary_learning).
    mse: squared error per element of the raw activations (the seed project's "reconstruction loss").
    """

    def __init__(self, d_sae: int, mean: Tensor) -> None:
        """mean: [d_out], the global mean about which FVU measures variance (training rows of the harvest)."""
        self.mean = mean.double().cpu()
        self.d_out = self.mean.numel()
        self.tokens = 0
        self.fired = torch.zeros(d_sae, dtype=torch.int64)
        self.l0 = self.residual = self.total = self.cosine = self.legacy = 0.0
        self.sum_x = torch.zeros_like(self.mean)
        self.sum_error = torch.zeros_like(self.mean)
        self.sum_sq = 0.0

    @torch.no_grad()
    def update(self, x: Tensor, x_hat: Tensor, features: Tensor) -> None:
        """Add a batch: x, x_hat [tokens, d_out] raw, features [tokens, d_sae]."""
        self._move(x.device)
        error = (x_hat.float() - x.float()).double()
        x64 = x.double()
        # By their places: a sum of bools takes as long as a product of matrices.
        places = places_of(positive(features))
        self.tokens += len(x)
        self.fired += torch.bincount(places % features.shape[1], minlength=features.shape[1])
        self.l0 += len(places)
        squared, spread = error.pow(2).sum(-1), (x64 - self.mean).pow(2).sum(-1)
        self.residual += float(squared.sum())
        self.total += float(spread.sum())
        self.legacy += float((1 - squared / spread.clamp(min=1e-12)).sum())
        self.cosine += float(torch.cosine_similarity(x64, x64 + error, dim=-1).sum())
        self.sum_x += x64.sum(0)
        self.sum_error += error.sum(0)
        self.sum_sq += float(x64.pow(2).sum())

    def _move(self, device: torch.device) -> None:
        """Keep the sums where the batches are: converting them on the CPU would take longer than the SAE."""
        if self.mean.device != device:
            self.mean, self.fired = self.mean.to(device), self.fired.to(device)
            self.sum_x, self.sum_error = self.sum_x.to(device), self.sum_error.to(device)

    def result(self) -> dict[str, Any]:
        """The metrics of record.json that need no language model. Call once, after the last batch.

        CorpusError where no row was seen: zeros would stand for a perfect SAE.
        """
        if not self.tokens:
            raise CorpusError(
                "The held-out text has no row that SAEs are measured on, only masked ones (first positions, special "
                "tokens, padding); give more text, or a larger corpus.held_out."
            )
        n = self.tokens
        variance_x = self._variance()
        variance_error = self.residual / n - float((self.sum_error / n).pow(2).sum())
        rate = self.fired.cpu().double() / n
        return {
            "tokens": self.tokens,
            "l0": self.l0 / n,
            "fvu": self.residual / max(self.total, 1e-12),
            "explained_variance_legacy": self.legacy / n,
            "explained_variance_residual": 1 - variance_error / max(variance_x, 1e-12),
            "cosine": self.cosine / n,
            "mse": self.residual / n / self.d_out,
            "dead_share": float((self.fired == 0).double().mean()),
            "inactive_share": float((rate <= INACTIVE_RATE).double().mean()),
            "density": density(rate),
        }

    def foreign(self) -> dict[str, float | int | None]:
        """The *_foreign entries of record.json, where the batches were of a foreign text.

        FVU is about the mean of these rows themselves: about the mean of training, far from rows of another text, the
        variance would be larger and any SAE look better. None where no row was usable.
        """
        if not self.tokens:
            return dict.fromkeys(FOREIGN) | {"tokens_foreign": 0}
        fvu = self.residual / self.tokens / max(self._variance(), 1e-12)
        return {"tokens_foreign": self.tokens, "l0_foreign": self.l0 / self.tokens, "fvu_foreign": fvu}

    def _variance(self) -> float:
        """Mean squared distance of the rows seen to their own mean."""
        n = max(self.tokens, 1)
        return self.sum_sq / n - float((self.sum_x / n).pow(2).sum())

    def log_sparsity(self) -> Tensor:
        """[d_sae] float32 log10(firing rate + 1e-10), SAELens' sparsity.safetensors."""
        return torch.log10(self.fired.cpu().double() / max(self.tokens, 1) + 1e-10).float()


def density(rate: Tensor) -> dict[str, Any]:
    """Histogram of log10 firing rates [d_sae]; features that never fired are counted apart."""
    fired = rate[rate > 0].double().log10().clamp(DENSITY_EDGES[0], DENSITY_EDGES[-1])
    counts = torch.histc(fired, bins=len(DENSITY_EDGES) - 1, min=DENSITY_EDGES[0], max=DENSITY_EDGES[-1])
    return {"log10_edges": DENSITY_EDGES, "counts": [int(c) for c in counts], "never": int((rate == 0).sum())}


def recovered(clean: float, ablated: float, spliced: float) -> float | None:
    """(ablated - spliced) / (ablated - clean): 1 is lossless, 0 no better than zeros; None where zeros cost nothing."""
    gap = ablated - clean
    return None if not math.isfinite(gap) or abs(gap) < 1e-9 else (ablated - spliced) / gap


def recovered_error(clean: Sequence[float], ablated: Sequence[float], spliced: Sequence[float]) -> float | None:
    """Standard error of `recovered` of the sums over windows that are given here one by one: that of a ratio of means
    (Cochran 1977, section 6.4). None for fewer than two windows, or where `recovered` is.
    """
    kept, n = recovered(sum(clean), sum(ablated), sum(spliced)), len(clean)
    if kept is None or n < 2:
        return None
    apart = [a - s - kept * (a - c) for c, a, s in zip(clean, ablated, spliced, strict=True)]
    return math.sqrt(n / (n - 1) * sum(value * value for value in apart)) / abs(sum(ablated) - sum(clean))
