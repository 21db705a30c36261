"""Small harvests without a model, whose activations say which row of the corpus they are."""

from __future__ import annotations

import torch
from torch import Tensor

from midiscover.store.blocks import HookManifest, Mask, block_plan, commit_block, write_manifest
from midiscover.store.storage import Storage

HARVEST = "h.0123456789"
HOOK = "model.layers.1.mlp:in"


def numbered_rows(count: int, d_in: int) -> Tensor:
    """[count, d_in] bfloat16; the first three columns are the digits of the row number to base 128, the rest noise."""
    rows = torch.randn(count, d_in, generator=torch.Generator().manual_seed(7)).bfloat16()
    number = torch.arange(count)
    for column, place in enumerate((128 * 128, 128, 1)):
        rows[:, column] = (number // place % 128).bfloat16()
    return rows


def row_numbers(rows: Tensor) -> Tensor:
    """The inverse of `numbered_rows`, [count] int64."""
    return (rows[:, :3].long() * torch.tensor([128 * 128, 128, 1])).sum(1)


def usual_mask(count: int, context_size: int, outlier: int = 5) -> Tensor:
    """[count] uint8: the first position of each window, every 41st row from `outlier` on, and one more in 41."""
    mask = torch.zeros(count, dtype=torch.uint8)
    mask[::context_size] = Mask.SPECIAL
    mask[outlier::41] = Mask.OUTLIER
    mask[7::41] = Mask.NONFINITE
    return mask


def write_harvest(
    storage: Storage,
    *,
    train_windows: int = 20,
    held_out_windows: int = 4,
    context_size: int = 8,
    block_tokens: int = 24,
    d_in: int = 6,
    masked: bool = True,
    outlier: int = 5,
    harvest_id: str = HARVEST,
    hook: str = HOOK,
) -> tuple[HookManifest, Tensor, Tensor]:
    """A whole harvested hook; also its activations [rows, d_in] and mask [rows], for comparison.

    Hooks of one harvest differ in d_in and in `outlier`.
    """
    count = (train_windows + held_out_windows) * context_size
    acts = numbered_rows(count, d_in)
    mask = usual_mask(count, context_size, outlier) if masked else torch.zeros(count, dtype=torch.uint8)
    norm = acts.float().norm(dim=1)
    plan = block_plan(train_windows, held_out_windows, context_size=context_size, block_tokens=block_tokens)
    rows = {}
    for span in plan:
        at = slice(span.start_window * context_size, span.stop_window * context_size)
        rows[span.index] = commit_block(storage, harvest_id, hook, span, acts[at], norm[at], mask[at])
    return write_manifest(storage, harvest_id, hook, plan, rows, lineage={"made by": "test"}), acts, mask
