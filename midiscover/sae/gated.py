"""The gated SAE: which features fire, and how strongly, are decided apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from midiscover.sae.base import Losses, Normalisation, Sae, StepContext, bias_for_density, squared_error
from midiscover.sae.code import Code, DenseCode, PreActivations, SparseCode
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
        gate, code = self.codes(self.training_pre(x, torch.zeros_like(self.b_gate)))
        mse = squared_error(code.decode(self.W_dec) + self.b_dec, y)
        auxiliary = squared_error(gate.decode(self.W_dec.detach()) + self.b_dec.detach(), y)
        penalty = gate.total()
        total = mse + context.sparsity * penalty + auxiliary
        return Losses(total, mse.detach(), penalty.detach(), code)

    def codes(self, pre: PreActivations) -> tuple[Code, Code]:
        """relu of the gate, and the features."""
        pattern = pre.pattern(lambda values: values > -self.b_gate)
        if pattern is None:
            whole = pre.whole()
            gate = torch.relu(whole + self.b_gate.to(whole.dtype))
            return DenseCode(gate), DenseCode(torch.where(gate > 0, self.magnitudes(whole), 0))
        values = pre.at(pattern)
        gate = torch.relu(values + pattern.spread(self.b_gate))
        scaled = values * pattern.spread(self.r_mag.exp())
        magnitudes = torch.relu(scaled + pattern.spread(self.b_mag))
        return SparseCode(gate, pattern), SparseCode(magnitudes, pattern)

    @torch.no_grad()
    def make_rarer_(self, shift: Tensor) -> None:
        self.b_gate.sub_(shift)

    def folded(self, w: Mapping[str, Tensor], inputs: Normalisation, outputs: Normalisation) -> dict[str, Tensor]:
        return super().folded(w, inputs, outputs) | {"r_mag": w["r_mag"]}  # a log of a ratio, without a unit

    @classmethod
    def config_of(cls, cfg: Mapping[str, Any]) -> GatedConfig:
        return GatedConfig(d_sae=cfg["d_sae"])
