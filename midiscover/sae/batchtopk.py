"""The BatchTopK SAE: k features per token in the mean over a batch, and a threshold outside training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from midiscover.sae.base import Normalisation, feature_norms
from midiscover.sae.code import Code, DenseCode, PreActivations, SparseCode, some_tokens
from midiscover.sae.pattern import Pattern, places_of
from midiscover.sae.topk import TopKSae
from midiscover.saeconfig import BatchTopKConfig

ROOM = 2
"""How many times as many entries as are kept lie above the floor among which they are selected."""


class BatchTopKSae(TopKSae):
    """In training, f = the k * tokens largest of relu(pre) in the batch; the loss is that of TopK, with AuxK.

    Outside training a token's features must not depend on the others of its batch: f = pre where pre > threshold, the
    running mean of the smallest pre-activation that was kept (Bussmann et al. 2024, arXiv 2412.06410, section 3). So
    it is saved as a JumpReLU SAE, as which SAELens saves its own.
    """

    kind = "batchtopk"
    saelens_architecture = "jumprelu"
    sparse_on_gpu = True
    threshold: Tensor
    """Scalar, at least 0."""

    def __init__(self, config: BatchTopKConfig, d_in: int, d_sae: int, d_out: int | None = None) -> None:
        super().__init__(config, d_in, d_sae, d_out)
        self.decay = config.threshold_decay
        self.register_buffer("threshold", torch.zeros(()))

    @torch.no_grad()
    def calibrate_(self, x: Tensor) -> None:
        # The threshold at which this batch has L0 = k: an SAE that is never trained needs one too.
        _, smallest = keep_top_of_batch(self.pre_activations(x), self.config.k)
        self.threshold.copy_(torch.where(smallest.isfinite(), smallest, 0))

    def activate(self, pre: Tensor) -> Tensor:
        if self.training:
            return keep_top_of_batch(pre, self.config.k)[0]
        return torch.where(pre > self.threshold, pre, 0)

    def select(self, pre: PreActivations) -> Code:
        code, smallest = top_of_batch(pre, self.config.k, sparse=self.sparse_on_gpu)
        with torch.no_grad():
            moved = self.threshold.lerp(smallest.to(self.threshold), 1 - self.decay)
            self.threshold.copy_(torch.where(smallest.isfinite(), moved, self.threshold))
        return code

    def folded(self, w: Mapping[str, Tensor], inputs: Normalisation, outputs: Normalisation) -> dict[str, Tensor]:
        norms = feature_norms(w["W_dec"], outputs.scale)
        return super().folded(w, inputs, outputs) | {"threshold": w["threshold"] * norms}

    def saelens_fields(self) -> dict[str, Any]:
        return {}


def top_of_batch(pre: PreActivations, k: int, *, sparse: bool = True) -> tuple[Code, Tensor]:
    """What `keep_top_of_batch` gives, of pre-activations in training; `sparse`: whether a GPU's code may be."""
    if pre.kernels:
        return _by_kernels(pre, k, sparse=sparse and pre.prefers_sparse(k))
    if not pre.prefers_sparse(k):
        features, smallest = keep_top_of_batch(pre.whole(), k)
        return DenseCode(features), smallest
    values, places = largest(pre.values, k)
    pattern = Pattern.of_places(places.sort().values, *pre.values.shape)
    return SparseCode(torch.relu(pre.at(pattern)), pattern), smallest_kept(values)


def _by_kernels(pre: PreActivations, k: int, *, sparse: bool) -> tuple[Code, Tensor]:
    pattern = pre.top_of_batch(min(k, pre.values.shape[1]))
    found = pre.at(pattern)
    smallest = smallest_kept(found.detach())
    if sparse:
        return SparseCode(torch.relu(found), pattern), smallest
    return DenseCode(pre.relu_at(pattern)), smallest


def largest(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k * tokens largest of pre [tokens, d_sae], on a CPU: their values, and token * d_sae + feature of each.

    Selected among those above a floor that some tokens give, since selecting among all of them takes longer than the
    product that they come from; among all where the floor was too high.
    """
    flat, count = pre.flatten(), k * len(pre)
    sample = some_tokens(pre)
    floor = sample.flatten().topk(min(ROOM * k * len(sample), sample.numel()), sorted=False).values.amin()
    candidates = places_of(pre > floor)
    if len(candidates) < count:
        found = flat.topk(count, sorted=False)
        return found.values, found.indices
    found = _wide(flat[candidates]).topk(count, sorted=False)
    return found.values, candidates[found.indices]


def keep_top_of_batch(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """relu of the k * tokens largest entries of [tokens, d_sae], zero elsewhere; and the smallest positive one kept.

    Exactly so many are kept, however many are equal. The second is infinite where nothing is positive.
    """
    flat = pre.flatten()
    values, indices = _wide(flat).topk(min(k * len(pre), flat.numel()), sorted=False)
    features = torch.zeros_like(flat).scatter(0, indices, torch.relu(values).to(flat.dtype)).view_as(pre)
    return features, smallest_kept(values.detach())


def _wide(values: Tensor) -> Tensor:
    """In float32 at least: in bfloat16 the CPU's top-k takes more than twice as long."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def smallest_kept(values: Tensor) -> Tensor:
    """The smallest positive one, a scalar; infinite where there is none."""
    return torch.where(values > 0, values, float("inf")).amin()
