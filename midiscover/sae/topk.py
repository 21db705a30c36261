"""The TopK SAE with the AuxK loss against dead features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from midiscover.config import TopKConfig
from midiscover.sae.base import Losses, Sae, StepContext, squared_error


class TopKSae(Sae):
    """f = relu(top-k of pre-activations), zero elsewhere; loss = |x_hat - x|^2 + auxk * AuxK.

    AuxK lets the `k_aux` strongest dead features reconstruct the residual, divided by the residual's variance
    (Gao et al. 2024, section A.2). Decoder rows keep unit norm and their gradients are projected, so that folding
    cannot change which features are selected.
    """

    kind = "topk"
    saelens_architecture = "topk"
    uses_dead = True
    config: TopKConfig

    @property
    def init_norm(self) -> float:
        return 1.0

    def activate(self, pre: Tensor) -> Tensor:
        return _keep_top(pre, min(self.config.k, self.d_sae))

    def loss(self, x: Tensor, context: StepContext) -> Losses:
        pre = self.pre_activations(x)
        features = self.activate(pre)
        x_hat = self.decode(features).to(x.dtype)
        mse = squared_error(x_hat, x)
        total, auxk = mse, torch.zeros_like(mse)
        if context.dead is not None and self.config.auxk_coefficient > 0:
            auxk = self._auxk(pre, (x - x_hat).detach(), context.dead)
            total = mse + self.config.auxk_coefficient * auxk
        return Losses(total, mse.detach(), auxk.detach(), features.detach())

    def _auxk(self, pre: Tensor, residual: Tensor, dead: Tensor) -> Tensor:
        k = min(self.config.k_aux or self.d_in // 2, int(dead.sum()))
        code = _keep_top(pre.masked_fill(~dead, float("-inf")), k)
        variance = (residual - residual.mean(0)).pow(2).sum(-1).mean()
        return squared_error((code @ self.W_dec).to(residual.dtype), residual) / variance.clamp(min=1e-8)

    @torch.no_grad()
    def before_step(self) -> None:
        grad = self.W_dec.grad
        assert grad is not None
        grad -= (grad * self.W_dec).sum(1, keepdim=True) * self.W_dec

    @torch.no_grad()
    def after_step(self) -> None:
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-8))

    def saelens_fields(self) -> dict[str, Any]:
        # With unit decoder rows the rescaling changes nothing, and it makes SAELens' fold_W_dec_norm legal.
        return {"k": self.config.k, "rescale_acts_by_decoder_norm": True}


def _keep_top(pre: Tensor, k: int) -> Tensor:
    """relu of the k largest entries of each row, zero elsewhere (top-k first, as SAELens does)."""
    values, indices = pre.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(pre).scatter(-1, indices, torch.relu(values))
