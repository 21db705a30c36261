"""Resampling: dead features start anew where the reconstruction is worst (Bricken et al. 2023, "Neuron resampling")."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize

from midiscover.sae.base import Sae


@torch.no_grad()
def resample_(
    sae: Sae,
    moments: Mapping[Tensor, Mapping[str, Tensor]],
    since_fired: Tensor,
    x: Tensor,
    y: Tensor,
    *,
    window: int,
    seed: int,
) -> int:
    """Point features that were silent for `window` tokens at rows drawn by squared loss; returns how many there were.

    x [tokens, d_in] and y [tokens, d_out] are a normalised batch. A drawn row's residual gives the decoder row its
    direction, the row itself the encoder column, at `resampled_norm` of the living columns'; the feature's other
    parameters are as at initialisation, or follow the living's mean (`Sae.restart_`), and Adam forgets it.
    `since_fired` is set to 0 where a feature starts anew.

    No row serves twice: twins would get the same gradients for ever. Where more features are dead than there are rows,
    the first of them start anew; where all are dead, the dead stand for the living. A decoder that is frozen has no
    feature that could be pointed elsewhere.
    """
    silent = since_fired >= window
    dead = silent.nonzero().flatten()[: len(x)]
    if len(dead) == 0 or not sae.W_dec.requires_grad:
        return 0
    alive = ~silent if not bool(silent.all()) else silent
    residual = y - sae(x)
    loss = residual.pow(2).sum(1).cpu().double()
    if not bool(loss.isfinite().all()):
        return 0  # this SAE has diverged, which its next point will say
    loss = loss / loss.max().clamp(min=1e-12)
    generator = torch.Generator().manual_seed(seed)
    # The floor lets rows of no loss be drawn last, where there are too few others.
    rows = torch.multinomial(loss**2 + 1e-12, len(dead), replacement=False, generator=generator).to(x.device)
    sae.W_dec[dead] = normalize(residual[rows], dim=1) * sae.W_dec[alive].norm(dim=1).mean()
    sae.W_enc[:, dead] = normalize(x[rows], dim=1).T * sae.W_enc[:, alive].norm(dim=0).mean() * sae.resampled_norm
    sae.restart_(dead, alive)
    forgotten = [(sae.W_dec, 0), (sae.W_enc, 1)] + [(sae.get_parameter(name), 0) for name in sae.per_feature]
    for parameter, dim in forgotten:
        for value in moments.get(parameter, {}).values():
            if value.shape == parameter.shape:  # the moments, not the count of steps
                value.index_fill_(dim, dead, 0)
    since_fired[dead] = 0
    return len(dead)
