"""What decoder directions say by themselves: the logits they push, the directions next to them, the neurons in them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LENS_TOKENS = 10
LENS_BINS = 50
NEIGHBOURS = 10
NEURONS = 3


class Lens(NamedTuple):
    """Logits of n decoder rows, W_dec @ W_U without the final norm (as Neuronpedia and SAEDashboard have them)."""

    top_ids: Tensor
    """[n, 10] ids of the highest logits, highest first."""
    top: Tensor
    bottom_ids: Tensor
    """[n, 10] ids of the lowest logits, lowest first."""
    bottom: Tensor
    heights: Tensor
    """[n, 50] how many ids have their logit in each of 50 equal bins between lowest and highest."""
    centres: Tensor
    """[n, 50] the middle of each bin."""


class Nearest(NamedTuple):
    """Other entries, [n, k], with what makes them near."""

    indices: Tensor
    value: Tensor


def lens(directions: Tensor, unembedding: Tensor) -> Lens:
    """directions: [n, d_model]; unembedding: [vocabulary, d_model], both float32 on one device. Results on the CPU."""
    logits = directions @ unembedding.T
    k = min(LENS_TOKENS, logits.shape[1])
    top, bottom = logits.topk(k, dim=1), logits.topk(k, dim=1, largest=False)
    low, high = bottom.values[:, :1], top.values[:, :1]
    width = ((high - low) / LENS_BINS).clamp(min=1e-30)
    place = ((logits - low) / width).int().clamp_(0, LENS_BINS - 1)
    place += LENS_BINS * torch.arange(len(logits), dtype=torch.int32, device=logits.device)[:, None]
    heights = torch.bincount(place.flatten(), minlength=LENS_BINS * len(logits)).view(-1, LENS_BINS)
    centres = low + (torch.arange(LENS_BINS, device=logits.device) + 0.5) * width
    found = (top.indices, top.values, bottom.indices, bottom.values, heights, centres)
    return Lens(*(tensor.cpu() for tensor in found))


def unit_rows(decoder: Tensor) -> Tensor:
    """The rows [d_sae, d_out] brought to norm 1; rows of zeros stay."""
    return decoder / decoder.norm(dim=1, keepdim=True).clamp(min=1e-12)


def neighbours(unit: Tensor, start: int, stop: int) -> Nearest:
    """The features whose rows of `unit_rows` have the highest cosine with those of [start, stop), but themselves."""
    cosine = unit[start:stop] @ unit.T
    here = torch.arange(stop - start, device=cosine.device)
    cosine[here, here + start] = -torch.inf
    best = cosine.topk(min(NEIGHBOURS, len(unit) - 1), dim=1)
    return Nearest(best.indices.cpu(), best.values.cpu())


def neurons(decoder: Tensor) -> tuple[Nearest, Tensor]:
    """The largest entries of each decoder row [n, d_out] by size, with their sign, and their share of its L1 norm."""
    rows = decoder.float()
    index = rows.abs().topk(min(NEURONS, rows.shape[1]), dim=1).indices
    value = rows.gather(1, index)
    share = value.abs() / rows.abs().sum(dim=1, keepdim=True).clamp(min=1e-30)
    return Nearest(index.cpu(), value.cpu()), share.cpu()
