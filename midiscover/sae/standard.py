"""The ReLU SAE with an L1 penalty."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from midiscover.sae.base import Losses, Sae, StepContext, bias_for_density, squared_error
from midiscover.sae.code import relu_code
from midiscover.saeconfig import StandardConfig


class StandardSae(Sae):
    """f = relu((x - b_dec) @ W_enc + b_enc); loss = |x_hat - x|^2 + l1 * sum_i f_i * norm(W_dec_i).

    Weighting by the decoder's norms makes the penalty independent of how a feature's scale is split between encoder
    and decoder, so the decoder needs no constraint (Anthropic, "Circuits updates: April 2024"). With `decoder:
    unit_norm` the rows keep norm 1 and the penalty is the plain L1 norm (Bricken et al. 2023).
    """

    kind = "standard"
    saelens_architecture = "standard"
    config: StandardConfig

    @property
    def coefficient(self) -> float:
        return self.config.l1_coefficient

    @property
    def unit_decoder(self) -> bool:
        return self.config.decoder == "unit_norm"

    @torch.no_grad()
    def calibrate_(self, x: Tensor) -> None:
        if self.config.initial_density is not None:
            # Biases are 0 here, so these are pre-activations without them.
            self.b_enc.copy_(bias_for_density(self.pre_activations(x), self.config.initial_density))

    def activate(self, pre: Tensor) -> Tensor:
        return torch.relu(pre)

    def loss(self, x: Tensor, y: Tensor, context: StepContext) -> Losses:
        code = relu_code(self.training_pre(x, self.b_enc))
        y_hat, norms = code.decode_with_norms(self.W_dec)
        mse = squared_error(y_hat + self.b_dec, y)
        penalty = code.total(norms)
        return Losses(mse + context.sparsity * penalty, mse.detach(), penalty.detach(), code)

    @classmethod
    def config_of(cls, cfg: Mapping[str, Any]) -> StandardConfig:
        return StandardConfig(d_sae=cfg["d_sae"])
