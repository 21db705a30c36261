"""The JumpReLU SAE: a threshold of its own for each feature, trained by straight-through gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from midiscover.sae.base import Losses, Sae, StepContext, bias_for_density, squared_error
from midiscover.sae.code import Code, DenseCode, PreActivations, SparseCode
from midiscover.saeconfig import JumpReluConfig

INITIAL_THRESHOLD = 0.5
"""Where `initial_density` does not set it, in units of pre-activations, whose standard deviation is about 1."""


class JumpReluSae(Sae):
    """f = pre where pre > threshold, zero elsewhere; loss = |x_hat - x|^2 + l0 * count(f > 0).

    Both terms move the threshold by straight-through estimates with a rectangle kernel (Rajamanoharan et al. 2024,
    arXiv 2407.14435, section 3 and equations 11 and 12): see `JumpReluStep`. Decoder rows keep unit norm.

    The threshold itself is the parameter, put back to 0 where a step takes it below. The paper's log(threshold) moves
    by a share of itself per step of Adam, hence hardly from a small beginning: on the planted dictionary of the tests,
    400 steps at lr 2e-3 from 0.1, L0 54 against 13, and 14 against 6 at lr 5e-3; from 0.5 the two are equal.
    """

    kind = "jumprelu"
    saelens_architecture = "jumprelu"
    per_feature = ("b_enc", "threshold")
    config: JumpReluConfig
    threshold: nn.Parameter

    @property
    def coefficient(self) -> float:
        return self.config.l0_coefficient

    @property
    def unit_decoder(self) -> bool:
        return True

    @torch.no_grad()
    def initialise_(self, seed: int) -> None:
        super().initialise_(seed)
        self.threshold.fill_(INITIAL_THRESHOLD)

    @torch.no_grad()
    def initialise_neurons_(self) -> None:
        super().initialise_neurons_()
        self.threshold.zero_()

    @torch.no_grad()
    def calibrate_(self, x: Tensor) -> None:
        if self.config.initial_density is not None:
            # By the threshold, which cuts nothing off what passes it; a bias does and has to be unlearned (planted
            # dictionary, 400 steps at lr 2e-3, density 0.1: FVU 0.16 at L0 12, against 0.12 at L0 7). The bias serves
            # only where more is to fire than what is positive.
            bias = bias_for_density(self.pre_activations(x), self.config.initial_density)
            self.threshold.copy_((-bias).clamp(min=0))
            self.b_enc.copy_(bias.clamp(min=0))

    def activate(self, pre: Tensor) -> Tensor:
        return torch.where(pre > self.threshold, torch.relu(pre), 0)

    def loss(self, x: Tensor, y: Tensor, context: StepContext) -> Losses:
        code, count = self.code(self.training_pre(x, self.b_enc))
        mse = squared_error(code.decode(self.W_dec) + self.b_dec, y)
        return Losses(mse + context.sparsity * count, mse.detach(), count.detach(), code)

    def code(self, pre: PreActivations) -> tuple[Code, Tensor]:
        """The features, and how many of them fire, mean over tokens."""
        width = self.config.bandwidth
        if pre.kernels:
            return pre.jump(self.threshold, width)
        # What is near the threshold moves it, whether or not it fires.
        pattern = pre.pattern(lambda values: values > self.threshold - width / 2)
        if pattern is None:
            features, count = JumpReluStep.apply(pre.whole(), self.threshold, width, len(pre.x))
            return DenseCode(features), count
        values, count = JumpReluStep.apply(pre.at(pattern), pattern.spread(self.threshold), width, len(pre.x))
        return SparseCode(values, pattern), count

    @torch.no_grad()
    def make_rarer_(self, shift: Tensor) -> None:
        self.threshold.add_(shift).clamp_(min=0)

    @torch.no_grad()
    def restart_(self, dead: Tensor, alive: Tensor) -> None:
        super().restart_(dead, alive)
        # As short as the encoder's columns: it fires where one of the living's norm and threshold would.
        self.threshold[dead] = self.threshold[alive].mean() * self.resampled_norm

    @torch.no_grad()
    def constrain_(self) -> None:
        self.threshold.clamp_(min=0)

    @classmethod
    def config_of(cls, cfg: Mapping[str, Any]) -> JumpReluConfig:
        return JumpReluConfig(d_sae=cfg["d_sae"])


class JumpReluStep(torch.autograd.Function):
    """(pre [tokens, d_sae], threshold [d_sae] >= 0, bandwidth, tokens) -> features [tokens, d_sae], their mean count.

    Of single entries as well: pre and threshold [n]. Backward, with K = 1 where |pre - threshold| < bandwidth / 2:
    d features / d threshold = -threshold / bandwidth * K, d count / d threshold = -1 / bandwidth * K, and
    d features / d pre = 1 where the feature fires. Feature and count in one function: they share the mask, and what is
    kept for the backward pass is `pre` alone.
    """

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float, tokens: int) -> tuple[Tensor, Tensor]:
        fires = pre > threshold.to(pre.dtype)
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth, ctx.tokens = bandwidth, tokens
        return torch.where(fires, pre, 0), fires.sum().to(threshold.dtype) / tokens

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_features, grad_count = grads
        pre, threshold = ctx.saved_tensors
        bandwidth, cut = ctx.bandwidth, threshold.to(pre.dtype)
        near = (pre - cut).abs_() < bandwidth / 2
        by_features = torch.where(near, grad_features, 0)
        if pre.ndim == 2:
            by_features, near = by_features.sum(0, dtype=threshold.dtype), near.sum(0)
        grad_threshold = -(threshold * by_features + near * (grad_count / ctx.tokens)) / bandwidth
        return torch.where(pre > cut, grad_features, 0), grad_threshold, None, None
