"""A language model with its weights shuffled: the control that shows what an SAE finds without anything learned.

As in Heap et al. 2025 (arXiv 2501.17727), who find SAEs on random transformers hard to tell from those on trained ones
by automatic scores.
"""

from __future__ import annotations

import torch
from torch import nn

SEED = 0


@torch.no_grad()
def shuffle_weights_(model: nn.Module) -> None:
    """Put the entries of each weight matrix in random order, the same on every machine; vectors stay.

    Each matrix keeps its distribution of values, so that activations keep about their scale; tied matrices stay tied.
    """
    generator = torch.Generator().manual_seed(SEED)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            order = torch.randperm(parameter.numel(), generator=generator)
            parameter.copy_(parameter.flatten()[order.to(parameter.device)].view_as(parameter))
