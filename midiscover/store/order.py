"""The order in which the loader gives rows, as a pure function of (manifest, seed, epoch), and how well it shuffles.

An epoch permutes the blocks, cuts them into pools, and permutes the rows of each pool. Nothing is read here, so the
quality of a shuffle is known before a harvest is loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from midiscover.store.manifest import BlockRow, HookManifest, Split


class ShuffleQuality(NamedTuple):
    """Mean number of rows from a row's own window among the other rows of its batch: 0 is the best."""

    mates: float
    """Measured from the order of the loader."""
    ideal_pool: float
    """Expected where the rows of a pool are drawn at random: reached when the permutation is sound."""
    ideal_all: float
    """Expected where the rows of the whole split are drawn at random: the price of a bounded pool is the difference."""


class HasRows(Protocol):
    """A block, read or not."""

    @property
    def rows(self) -> int:
        """Tokens in it."""
        ...


Some = TypeVar("Some", bound=HasRows)


def pools(blocks: Sequence[Some], *, shuffle_tokens: int, seed: int, epoch: int) -> tuple[tuple[Some, ...], ...]:
    """The blocks of an epoch in pools of at most `shuffle_tokens` rows, or of one block where that is larger.

    Pools are as even as whole blocks allow: a small last pool would be badly shuffled. Where everything fits in one
    pool, it is the same for all epochs and may stay in memory.
    """
    count, _ = pool_rows(blocks, shuffle_tokens=shuffle_tokens)
    if count == 1:
        return (tuple(blocks),)
    order = torch.randperm(len(blocks), generator=_generator(seed, epoch)).tolist()
    ends = [len(blocks) * i // count for i in range(count + 1)]
    return tuple(tuple(blocks[i] for i in order[start:stop]) for start, stop in pairwise(ends))


def pool_rows(blocks: Sequence[HasRows], *, shuffle_tokens: int) -> tuple[int, int]:
    """How many pools an epoch has, and how many rows the largest of any epoch may have."""
    total, largest = sum(row.rows for row in blocks), max(row.rows for row in blocks)
    if total <= shuffle_tokens:
        return 1, total
    count = -(-len(blocks) // max(1, shuffle_tokens // largest))
    return count, -(-len(blocks) // count) * largest


def row_order(rows: int, *, seed: int, epoch: int, pool: int) -> Tensor:
    """The permutation [rows] of the usable rows of one pool."""
    return torch.randperm(rows, generator=_generator(seed, epoch, pool))


def ideal_mates(batch_size: int, window_rows: float, pool_rows: int) -> float:
    """Expected same-window batch-mates of a row whose batch is drawn at random from a pool: (B-1)(t-1)/(pool-1)."""
    return (batch_size - 1) * (window_rows - 1) / max(1, pool_rows - 1)


def shuffle_quality(
    manifest: HookManifest,
    *,
    batch_size: int,
    shuffle_tokens: int,
    seed: int = 0,
    split: Split = "train",
    batches: int = 256,
) -> ShuffleQuality:
    """Follow the first `batches` batches of the first epoch.

    Only the number of masked rows of a block is known here, not their places, so they are taken as evenly spread;
    exact where nothing is masked.
    """
    blocks = manifest.split(split)
    total = sum(row.usable for row in blocks)
    window_rows = total / sum(row.stop_window - row.start_window for row in blocks)
    windows, ideal = [], 0.0
    for number, pool in enumerate(pools(blocks, shuffle_tokens=shuffle_tokens, seed=seed, epoch=0)):
        ids = torch.cat([_window_ids(row) for row in pool])
        windows.append(ids[row_order(len(ids), seed=seed, epoch=0, pool=number)])
        ideal += len(ids) * ideal_mates(min(batch_size, len(ids)), window_rows, len(ids))
        if sum(map(len, windows)) >= batches * batch_size:
            break
    stream = torch.cat(windows)
    count = min(batches, len(stream) // batch_size)
    return ShuffleQuality(
        mates=same_window_mates(stream[: count * batch_size].view(count, batch_size)),
        ideal_pool=ideal / len(stream),
        ideal_all=ideal_mates(batch_size, window_rows, total),
    )


def same_window_mates(windows: Tensor) -> float:
    """Mean number of other entries of the same row with the same value; windows: [batches, batch_size] integers."""
    ordered = windows.sort(dim=1).values.flatten()
    batch = torch.arange(len(windows)).repeat_interleave(windows.shape[1])
    starts = torch.ones(len(ordered), dtype=torch.bool)
    starts[1:] = (ordered[1:] != ordered[:-1]) | (batch[1:] != batch[:-1])
    sizes = torch.bincount(starts.cumsum(0) - 1).double()
    return float((sizes * (sizes - 1)).sum() / len(ordered))


def _window_ids(row: BlockRow) -> Tensor:
    """Window of each usable row of a block, masked rows taken as evenly spread."""
    place = torch.arange(row.usable) * row.rows // max(1, row.usable)
    return row.start_window + place // row.context_size


def _generator(*parts: int) -> torch.Generator:
    """Independent streams for neighbouring numbers: seed + epoch would give (1, 2) the order of (2, 1)."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
