"""The gated SAE: which features fire, and how strongly, are decided apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from midiscover.sae.base import Losses, Normalisation, Sae, StepContext, bias_for_density, squared_error
from midiscover.saeconfig import GatedConfig


class GatedSae(Sae):
    """f = (z @ W_enc + b_gate > 0) * relu((z @ W_enc) * exp(r_mag) + b_mag), where z = x - b_dec.

    loss = |x_hat - x|^2 + l1 * sum_i relu(gate_i) + |relu(gate) @ W_dec + b_dec - x|^2, where the gradient of the last
    term does not reach the decoder. The L1 penalty thus acts on the gate alone and does not shrink magnitudes
    (Rajamanoharan et al. 2024, arXiv 2404.16014, section 3.2 and the pseudo-code of its appendix). Decoder rows keep
    unit norm.
    """

    kind = "gated"
    saelens_architecture = "gated"
    per_feature = ("b_gate", "b_mag", "r_mag")
    config: GatedConfig
    b_gate: nn.Parameter
    b_mag: nn.Parameter
    r_mag: nn.Parameter

    @property
    def coefficient(self) -> float:
        return self.config.l1_coefficient

    @property
    def unit_decoder(self) -> bool:
        return True

    @torch.no_grad()
    def calibrate_(self, x: Tensor) -> None:
        if self.config.initial_density is not None:
            self.b_gate.copy_(bias_for_density(self.pre_activations(x), self.config.initial_density))

    def pre_activations(self, x: Tensor) -> Tensor:
        """[tokens, d_sae] what both paths share, without their biases."""
        return (x - self.b_dec) @ self.W_enc

    def activate(self, pre: Tensor) -> Tensor:
        return torch.where(pre + self.b_gate > 0, self.magnitudes(pre), 0)

    def magnitudes(self, pre: Tensor) -> Tensor:
        """[tokens, d_sae] of the magnitude path, whether or not the gate is open."""
        # In the precision of `pre`: under autocast the float32 parameters would make float32 of every intermediate.
        return torch.relu(torch.addcmul(self.b_mag.to(pre.dtype), pre, self.r_mag.exp().to(pre.dtype)))

    def loss(self, x: Tensor, y: Tensor, context: StepContext) -> Losses:
        pre = self.training_pre(x, torch.zeros_like(self.b_gate))
        gate = torch.relu(pre + self.b_gate.to(pre.dtype))
        features = torch.where(gate > 0, self.magnitudes(pre), 0)
        mse = squared_error(self.decode(features), y)
        auxiliary = squared_error(gate @ self.W_dec.detach() + self.b_dec.detach(), y)
        penalty = gate.sum(-1, dtype=y.dtype).mean()
        total = mse + context.sparsity * penalty + auxiliary
        return Losses(total, mse.detach(), penalty.detach(), features.detach())

    def folded(self, inputs: Normalisation, outputs: Normalisation) -> dict[str, Tensor]:
        return super().folded(inputs, outputs) | {"r_mag": self.doubles()["r_mag"]}  # a log of a ratio, without a unit

    @classmethod
    def config_of(cls, cfg: Mapping[str, Any]) -> GatedConfig:
        return GatedConfig(d_sae=cfg["d_sae"])
