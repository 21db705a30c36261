"""The Matryoshka BatchTopK SAE: prefixes of the features that reconstruct by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from midiscover.errors import ConfigError
from midiscover.sae.base import squared_error
from midiscover.sae.batchtopk import BatchTopKSae
from midiscover.sae.code import Code
from midiscover.saeconfig import MatryoshkaConfig


class MatryoshkaSae(BatchTopKSae):
    """A BatchTopK SAE with loss = mean over prefixes p of |f[:p] @ W_dec[:p] + b_dec - x|^2, plus AuxK of the whole.

    Early features must do without the later ones, so that general ones are not absorbed by special ones (Bussmann et
    al. 2025, arXiv 2503.17547, section 3). The code itself is that of BatchTopK.
    """

    kind = "matryoshka_batchtopk"
    sparse_on_gpu = False  # finding the entries of each prefix costs more than the prefixes' dense products

    def __init__(self, config: MatryoshkaConfig, d_in: int, d_sae: int, d_out: int | None = None) -> None:
        super().__init__(config, d_in, d_sae, d_out)
        self.prefixes = prefix_sizes(config.prefixes, d_sae)

    def reconstruction(self, code: Code, y: Tensor) -> tuple[Tensor, Tensor]:
        # Each prefix adds its own slice, so that all of them together cost one decode.
        y_hat, errors = self.b_dec.expand_as(y), []
        for first, end in pairwise([0, *self.prefixes]):
            y_hat = y_hat + code.decode(self.W_dec[first:end], first)
            errors.append(squared_error(y_hat, y))
        return torch.stack(errors).mean(), (y - y_hat).detach()


def prefix_sizes(shares: Sequence[float], d_sae: int) -> list[int]:
    """How many features each prefix holds: rounded shares of d_sae, strictly rising, the last one d_sae."""
    if len(shares) > d_sae:
        raise ConfigError(f"sae.prefixes has {len(shares)} entries, more than the {d_sae} features of the SAE.")
    sizes: list[int] = []
    for i, share in enumerate(shares):
        room = d_sae - (len(shares) - 1 - i)  # one more for each prefix to come
        sizes.append(min(max(round(share * d_sae), sizes[-1] + 1 if sizes else 1), room))
    return sizes
