"""The TopK SAE with the AuxK loss against dead features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from midiscover.sae.base import Losses, Sae, StepContext, squared_error
from midiscover.sae.code import Code, DenseCode, PreActivations, SparseCode
from midiscover.saeconfig import TopKConfig

LEAST_VARIANCE = 1e-8
"""Of what is left over; below it, as in a batch of a single row, nothing is left for dead features to explain."""


class TopKSae(Sae):
    """f = relu(top-k of pre-activations), zero elsewhere; loss = |x_hat - x|^2 + auxk * AuxK.

    AuxK lets the `k_aux` strongest dead features reconstruct the residual, divided by the residual's variance
    (Gao et al. 2024, section A.2). Its weight there is for a loss of about 1; ours is summed over d_out inputs of mean
    square 1, so it counts d_out times. Decoder rows keep unit norm and their gradients are projected, so that folding
    cannot change which features are selected.

    It begins with an encoder of a tenth of the decoder's norm, which then turns quickly, and with three quarters of the
    inputs' mean left in, or less of a large one, so that some features can stay on and write what varies about it; both
    by measurement, see tests/bench/RESULTS.md.
    """

    kind = "topk"
    saelens_architecture = "topk"
    uses_dead = True
    encoder_norm = 0.1
    initial_centring = 0.25
    resampled_norm = 1.0  # a weaker one is never among the k largest
    config: TopKConfig

    @property
    def unit_decoder(self) -> bool:
        return True

    def activate(self, pre: Tensor) -> Tensor:
        return keep_top(pre, min(self.config.k, self.d_sae))

    def loss(self, x: Tensor, y: Tensor, context: StepContext) -> Losses:
        pre = self.training_pre(x, self.b_enc)
        code = self.select(pre)
        reconstruction, residual = self.reconstruction(code, y)
        mse = residual.pow(2).sum(-1).mean()
        auxk = self.auxk(pre, residual, context)
        total = reconstruction + self.config.auxk_coefficient * self.d_out * auxk
        return Losses(total, mse, auxk.detach(), code)

    def select(self, pre: PreActivations) -> Code:
        """The code of a training batch."""
        return top_code(pre, min(self.config.k, self.d_sae))

    def reconstruction(self, code: Code, y: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of the reconstruction of y [tokens, d_out], a scalar, and the residual, detached, like y."""
        y_hat = (code.decode(self.W_dec) + self.b_dec).to(y.dtype)
        return squared_error(y_hat, y), (y - y_hat).detach()

    def auxk(self, pre: PreActivations, residual: Tensor, context: StepContext) -> Tensor:
        """The dead features' squared error on the residual [tokens, d_out] over the residual's variance."""
        if context.dead is None or self.config.auxk_coefficient == 0:
            return residual.new_zeros(())
        # Only the dead columns: with all of them AuxK would cost three more of a step's five large products, however
        # few are dead.
        columns, dead = context.dead.columns()
        code = top_code(pre.columns(columns, dead), min(self.config.k_aux or max(1, self.d_in // 2), len(columns)))
        centre = residual.mean(0)
        variance = (residual - (context.mean(centre) if context.mean else centre)).pow(2).sum(-1).mean()
        if context.mean:
            variance = context.mean(variance)
        error = squared_error(code.decode(self.W_dec.index_select(0, columns)), residual)
        return torch.where(dead.any() & (variance > LEAST_VARIANCE), error / variance.clamp(min=LEAST_VARIANCE), 0)

    def saelens_fields(self) -> dict[str, Any]:
        # With unit decoder rows the rescaling changes nothing, and it makes SAELens' fold_W_dec_norm legal.
        return {"k": self.config.k, "rescale_acts_by_decoder_norm": True}

    @classmethod
    def config_of(cls, cfg: Mapping[str, Any]) -> TopKConfig:
        return TopKConfig(d_sae=cfg["d_sae"], k=cfg["k"])


def top_code(pre: PreActivations, k: int) -> Code:
    """relu of the k largest pre-activations of each token."""
    width = pre.values.shape[1]
    if k == width:
        return pre.relu()
    if pre.prefers_sparse(k):
        pattern = pre.top(k)
        return SparseCode(torch.relu(pre.at(pattern)), pattern)
    if pre.kernels and width <= pre.kernels.WIDEST:  # `topk` takes several times as long there
        return DenseCode(pre.relu_at(pre.top(k)))
    return DenseCode(keep_top(pre.whole(), k))


def keep_top(pre: Tensor, k: int) -> Tensor:
    """relu of the k largest entries of each row, zero elsewhere (top-k first, as SAELens does)."""
    values, indices = pre.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(pre).scatter(-1, indices, torch.relu(values))
