"""Blocks to training batches: shuffled, resumable at any batch, bounded in memory. Knows no SAE and no device.

The stream is the concatenation of epochs. While the rows of one pool are given out, threads read the next one; which
row comes when is decided by `order` alone, so timing never shows.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from midiscover.errors import ConfigError, StageError
from midiscover.store.blocks import Block, Mask, read_block, read_block_into
from midiscover.store.manifest import BlockRow, HookManifest, Split
from midiscover.store.order import pool_rows, pools, row_order
from midiscover.store.storage import Storage

_S3_READERS = 8  # one connection of an object store gives 50 to 100 MB/s
_LOCAL_READERS = min(4, os.cpu_count() or 1)  # a first read is bound by sha256, 1.8 GB/s a core
NORMALISATION_ROWS, NORMALISATION_BATCH = 65_536, 1024
"""Training rows that the scale is taken from, and how many at a time."""


class MeanAndScale(NamedTuple):
    """Centre and scale of the inputs of an SAE: x' = (x - mean) * scale has mean norm sqrt(d_in)."""

    mean: Tensor
    """[d_in] float32, over all usable training rows."""
    scale: float

    @property
    def mean_norm(self) -> float:
        """Mean norm of centred rows before scaling."""
        return math.sqrt(len(self.mean)) / self.scale


class ActivationStream:
    """Shuffled batches [batch_size, d_in] bfloat16 of the usable rows of one hook.

    `len(stream)` counts the batches of the whole stream, whatever `start` is. An incomplete batch at the end of the
    stream is left out; batches may span two pools and two epochs. Each iteration begins at `start` and is
    independent of others. Batches are new tensors: the caller may keep and change them.

    Memory: two pools of at most `shuffle_tokens` rows (see `buffer_bytes`) plus the batch, or one pool where that
    holds everything, which is then read once for all epochs.
    """

    def __init__(
        self,
        storage: Storage,
        manifest: HookManifest,
        *,
        split: Split = "train",
        batch_size: int,
        epochs: int = 1,
        seed: int = 0,
        shuffle_tokens: int = 1_000_000,
        start: int = 0,
        masks: Mapping[int, Tensor] | None = None,
    ) -> None:
        """ConfigError where all epochs together do not fill one batch.

        masks: block index -> [rows] uint8, 0 where a row may be used; leaves out what the blocks mask, and more.
        """
        self.storage, self.manifest, self.masks = storage, manifest, masks
        self.blocks = manifest.split(split)
        if masks is not None:
            # The order is made of the numbers of usable rows, so streams of other hooks under these masks share it.
            counts = {index: int((mask == Mask.USABLE).sum()) for index, mask in masks.items()}
            self.blocks = tuple(replace(row, usable=counts[row.index]) for row in self.blocks)
        self.batch_size, self.epochs, self.seed, self.shuffle_tokens = batch_size, epochs, seed, shuffle_tokens
        self.start = start
        self.rows_per_epoch = sum(row.usable for row in self.blocks)
        if not len(self):
            raise ConfigError(
                f"train.batch_size {batch_size} is more than the {self.rows_per_epoch} usable {split} rows of "
                f"{manifest.hook} give in {epochs} epochs: lower it, or harvest more text."
            )
        assert 0 <= start <= len(self), f"batch {start} of {len(self)}"

    def __len__(self) -> int:
        """Batches in the whole stream, all epochs together."""
        return self.rows_per_epoch * self.epochs // self.batch_size

    def __iter__(self) -> Iterator[Tensor]:
        """Batches from `start` on."""
        return self.batches(self.start)

    @property
    def buffer_bytes(self) -> int:
        """Memory of the pools while the stream runs."""
        count, rows = pool_rows(self.blocks, shuffle_tokens=self.shuffle_tokens)
        return min(2, count) * rows * self.manifest.d_in * torch.bfloat16.itemsize

    def batches(self, start: int) -> Generator[Tensor, None, None]:
        """Batches from number `start` on, exactly as an uninterrupted stream gives them."""
        position, end = start * self.batch_size, len(self) * self.batch_size
        with closing(self._loaded(position, end)) as loaded:
            for (batch,) in assemble((((rows,), order) for rows, order in loaded), self.batch_size):
                yield batch

    def _pools(self, epoch: int) -> tuple[tuple[BlockRow, ...], ...]:
        return pools(self.blocks, shuffle_tokens=self.shuffle_tokens, seed=self.seed, epoch=epoch)

    def _visits(self, position: int, end: int) -> Iterator[_Visit]:
        """The pools that hold rows [position, end) of the stream, and which of their rows those are."""
        if position >= end:
            return
        epoch, offset = divmod(position, self.rows_per_epoch)
        left = end - position
        while True:
            for number, blocks in enumerate(self._pools(epoch)):
                usable = sum(row.usable for row in blocks)
                if offset < usable:
                    yield _Visit(blocks, epoch, number, offset, min(usable, offset + left))
                    left -= usable - offset
                    if left <= 0:
                        return
                offset = max(0, offset - usable)
            epoch += 1

    def _loaded(self, position: int, end: int) -> Generator[tuple[Tensor, Tensor], None, None]:
        """(rows [n, d_in] of a pool, which of them to give out in which order), one pool ahead of the consumer."""
        readers = ThreadPoolExecutor(_LOCAL_READERS if self.storage.is_local else _S3_READERS, "block-reader")
        _, largest = pool_rows(self.blocks, shuffle_tokens=self.shuffle_tokens)
        buffers = _Buffers(largest, self.manifest.d_in)
        try:
            current = None
            for visit in chain(self._visits(position, end), [None]):
                # What was given out last is used up, so its memory is free, and the readers need not wait for us.
                ahead = visit and self._request(readers, visit, buffers, current)
                if current is not None:
                    masks = torch.cat([block.result() for block in current.blocks])
                    yield current.rows, (masks == Mask.USABLE).nonzero().flatten()[current.order.result()]
                current = ahead
        finally:
            readers.shutdown(wait=True, cancel_futures=True)

    def _request(
        self, readers: ThreadPoolExecutor, visit: _Visit, buffers: _Buffers, previous: _Request | None
    ) -> _Request:
        """Begin to read a pool, into memory that is not being given out; nothing where it is there already."""
        order = readers.submit(self._order, visit)
        if previous is not None and previous.visit.blocks == visit.blocks:
            return previous._replace(visit=visit, order=order)
        rows = buffers.take(sum(row.rows for row in visit.blocks))
        blocks, start = [], 0
        for row in visit.blocks:
            place = rows[start : start + row.rows]
            blocks.append(readers.submit(self._read, row, place))
            start += row.rows
        return _Request(visit, rows, blocks, order)

    def _read(self, row: BlockRow, place: Tensor) -> Tensor:
        mask = read_block_into(self.storage, self.manifest.harvest_id, self.manifest.hook, row, place)
        if self.masks is None:
            return mask
        assert bool((mask <= self.masks[row.index]).all()), f"the given mask of block {row.index} lacks rows of its own"
        return self.masks[row.index]

    def _order(self, visit: _Visit) -> Tensor:
        usable = sum(row.usable for row in visit.blocks)
        order = row_order(usable, seed=self.seed, epoch=visit.epoch, pool=visit.pool)
        return order[visit.start : visit.stop]


class _Visit(NamedTuple):
    """One use of a pool: its rows [start, stop) in the order of this epoch."""

    blocks: tuple[BlockRow, ...]
    epoch: int
    pool: int
    start: int
    stop: int


class _Request(NamedTuple):
    """A pool on its way."""

    visit: _Visit
    rows: Tensor
    blocks: list[Future[Tensor]]
    """Masks, when the blocks have arrived in `rows`."""
    order: Future[Tensor]


class _Buffers:
    """Memory for two pools, taken in turn and reused: new memory costs more than a read from the page cache."""

    def __init__(self, rows: int, d_in: int) -> None:
        self._shape = rows, d_in
        self._tensors: deque[Tensor] = deque()

    def take(self, rows: int) -> Tensor:
        """[rows, d_in] bfloat16 in the memory that was taken the time before last."""
        full = len(self._tensors) == 2
        buffer = self._tensors.popleft() if full else torch.empty(self._shape, dtype=torch.bfloat16)
        self._tensors.append(buffer)
        return buffer[:rows]


def iterate_rows(
    storage: Storage, manifest: HookManifest, split: Split, batch_size: int, max_rows: int | None = None
) -> Iterator[Tensor]:
    """Usable rows of a split in their order, [at most batch_size, d_in] bfloat16; the last batch may be shorter."""
    left = manifest.usable[split] if max_rows is None else min(max_rows, manifest.usable[split])
    with closing(iterate_blocks(storage, manifest, split)) as blocks:
        yield from rebatch((block.acts[block.mask == Mask.USABLE] for block in blocks), batch_size, left)


def rebatch(pieces: Iterable[Tensor], batch_size: int, limit: int) -> Iterator[Tensor]:
    """The first `limit` rows of pieces [n, d], end to end, `batch_size` at a time; the last batch may be shorter."""
    left, rest = limit, None
    for piece in pieces:
        rows = (piece if rest is None else torch.cat([rest, piece]))[:left]
        full = len(rows) if len(rows) == left else len(rows) // batch_size * batch_size
        if full:
            yield from rows[:full].split(batch_size)
        left -= full
        rest = rows[full:]
        if left == 0:
            return
    if rest is not None and len(rest):
        yield rest


def normalisation(storage: Storage, manifest: HookManifest, *, sample_rows: int = NORMALISATION_ROWS) -> MeanAndScale:
    """The mean of the manifest, and the scale from the first `sample_rows` usable training rows.

    StageError where the sampled rows are all equal.
    """
    mean = torch.tensor(manifest.mean, dtype=torch.float32)
    rows = iterate_rows(storage, manifest, "train", NORMALISATION_BATCH, sample_rows)
    return MeanAndScale(mean, scale_of(rows, mean, manifest.hook))


def scale_of(batches: Iterable[Tensor], mean: Tensor, hook: str) -> float:
    """What gives the centred rows of `batches` [n, d_in] the mean norm sqrt(d_in). StageError where all are equal."""
    total, count = 0.0, 0
    for rows in batches:
        total += float(torch.linalg.vector_norm(rows.float() - mean, dim=1).sum(dtype=torch.float64))
        count += len(rows)
    if not total > 0:
        raise StageError(f"All activations of {hook} are equal: there is nothing to learn from this hook.")
    return math.sqrt(len(mean)) * count / total


def iterate_blocks(storage: Storage, manifest: HookManifest, split: Split) -> Generator[Block, None, None]:
    """Blocks of a split in order; one is read while the last one is used."""
    ahead = None
    reader = ThreadPoolExecutor(1, "block-reader")
    try:
        for row in (*manifest.split(split), None):
            current, ahead = ahead, None
            if row is not None:
                ahead = reader.submit(read_block, storage, manifest.harvest_id, manifest.hook, row)
            if current is not None:
                yield current.result()
    finally:
        reader.shutdown(wait=True, cancel_futures=True)


def assemble(
    loaded: Iterable[tuple[Sequence[Tensor], Tensor]], batch_size: int
) -> Generator[tuple[Tensor, ...], None, None]:
    """Whole batches of the rows that are picked, one after another: a tensor [batch_size, d] for each column.

    loaded: columns [n, d] bfloat16 on the CPU, such as the two hooks of pairs, and which of their rows to give out in
    which order. What does not fill a batch at the end is left out.
    """
    batch: tuple[Tensor, ...] = ()
    filled = 0
    for columns, order in loaded:
        taken = 0
        while taken < len(order):
            if not batch:
                batch = tuple(torch.empty(batch_size, rows.shape[1], dtype=torch.bfloat16) for rows in columns)
            count = min(batch_size - filled, len(order) - taken)
            for rows, place in zip(columns, batch, strict=True):
                _gather(rows, order[taken : taken + count], place[filled : filled + count])
            filled, taken = filled + count, taken + count
            if filled == batch_size:
                full, batch, filled = batch, (), 0
                yield full


def _gather(rows: Tensor, order: Tensor, out: Tensor) -> None:
    """out[i] = rows[order[i]], all contiguous.

    numpy's take needs one thread and half the CPU time of torch's index_select, whose threads wait for each other
    where the readers keep the cores busy: 2.6 against 1.2 GB/s on two loaded cores. `clip` spares it a buffer.
    """
    element = torch.int64 if rows.shape[1] % 4 == 0 else torch.int16  # wide elements copy 1.3 times faster
    np.take(rows.view(element).numpy(), order.numpy(), axis=0, out=out.view(element).numpy(), mode="clip")
