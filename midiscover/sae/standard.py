"""The ReLU SAE with a decoder-weighted L1 penalty."""

from __future__ import annotations

import torch
from torch import Tensor

from midiscover.config import StandardConfig
from midiscover.sae.base import Losses, Sae, StepContext, squared_error


class StandardSae(Sae):
    """f = relu((x - b_dec) @ W_enc + b_enc); loss = |x_hat - x|^2 + l1 * sum_i f_i * norm(W_dec_i).

    Weighting by the decoder's norms makes the penalty independent of how a feature's scale is split between encoder
    and decoder, so the decoder needs no constraint (Anthropic, "Circuits updates: April 2024").
    """

    kind = "standard"
    saelens_architecture = "standard"
    config: StandardConfig

    def activate(self, pre: Tensor) -> Tensor:
        return torch.relu(pre)

    def loss(self, x: Tensor, context: StepContext) -> Losses:
        features = self.encode(x)
        mse = squared_error(self.decode(features).to(x.dtype), x)
        # Outside autocast: the penalty is a sum over thousands of features, too many for bfloat16's 8 bits.
        # (f @ norms) instead of (f * norms).sum(): one pass over the code and no [tokens, d_sae] intermediate.
        with torch.autocast(x.device.type, enabled=False):
            penalty = (features.to(x.dtype) @ self.W_dec.norm(dim=1)).mean()
        total = mse + self.config.l1_coefficient * context.l1_scale * penalty
        return Losses(total, mse.detach(), penalty.detach(), features.detach())
