"""Activations that are never stored: a language model in the training process fills one pool of rows after another.

The order is the loader's. Its pools are computed instead of read, so the rows are those that a harvest would store, to
the rounding of bfloat16; on a CPU with as many threads they are the same bits. What a manifest knows is taken from the
first pool: mean, variance and scale are those of its rows, a random part of the text, and how many rows will be usable
is reckoned from it. Where all rows fit into one pool, both are exact, and training equals that from the store.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import torch
from torch import Tensor

from midiscover.config import TrainConfig
from midiscover.corpus import Corpus
from midiscover.errors import ConfigError, StageError
from midiscover.packing import Windows
from midiscover.reading import Reader
from midiscover.sae.base import Normalisation
from midiscover.store.blocks import Mask, block_plan, mean_and_variance, row_moments
from midiscover.store.loader import NORMALISATION_BATCH, NORMALISATION_ROWS, assemble, rebatch, scale_of
from midiscover.store.manifest import Split
from midiscover.store.order import pools, row_order
from midiscover.train import Pair

Hooks = tuple[str, str]
"""The hook that is read and the one that is reconstructed; the same but for transcoders."""


class Piece(NamedTuple):
    """Windows [start, stop) of a corpus, of which a harvest would make a block."""

    start_window: int
    stop_window: int
    rows: int


class Pool(NamedTuple):
    """Rows of several hooks that are shuffled together."""

    acts: dict[str, Tensor]
    """Hook -> [rows, d_in] bfloat16 on the CPU."""
    masks: dict[str, Tensor]
    """Hook -> [rows] uint8."""
    moments: dict[str, list[tuple[Tensor, float]]]
    """Hook -> of each block the sum and the sum of squares of its usable rows."""

    def of(self, hooks: Hooks) -> Pool:
        """Some of the hooks alone."""
        acts, masks = ({hook: part[hook] for hook in hooks} for part in (self.acts, self.masks))
        return Pool(acts, masks, {hook: self.moments[hook] for hook in hooks})

    def usable(self, hooks: Hooks) -> Tensor:
        """Numbers of the rows that both hooks may use."""
        return (torch.maximum(*(self.masks[hook] for hook in hooks)) == Mask.USABLE).nonzero().flatten()

    def normalisation(self, hook: str) -> Normalisation:
        """Of the usable rows of a hook, as `loader.normalisation` has it of all training rows."""
        rows = self.acts[hook][self.masks[hook] == Mask.USABLE]
        if not len(rows):
            raise ConfigError(f"None of the first {len(self.acts[hook])} rows of {hook} is usable.")
        mean, variance = mean_and_variance(self.moments[hook], len(rows))
        mean = mean.float()
        sample = rows[:NORMALISATION_ROWS].split(NORMALISATION_BATCH)
        return Normalisation(mean, scale_of(sample, mean, hook), variance)


class LivePools:
    """The pools of a corpus, each computed once for all the sources that read it, when the first of them needs it."""

    def __init__(
        self,
        reader: Reader,
        corpus: Corpus,
        hooks: Mapping[str, Hooks],
        *,
        shuffle_tokens: int,
        seed: int,
        epochs: int,
    ) -> None:
        """hooks: of each source, by its name. ConfigError where several epochs would run the model anew."""
        self.reader, self.corpus, self.hooks = reader, corpus, hooks
        self.reading = set(hooks)
        """Names of the sources that will still ask for pools."""
        pieces = _pieces(corpus, "train", reader.config.block_tokens)
        self.order = pools(pieces, shuffle_tokens=shuffle_tokens, seed=seed, epoch=0)
        if epochs > 1 and len(self.order) > 1:
            raise ConfigError(
                f"resources.activations stream runs the model once, and train.epochs is {epochs}: its {self.rows:,} "
                f"rows do not fit into train.shuffle_tokens {shuffle_tokens:,}. Store them, or train for one epoch."
            )
        self.kept: dict[int, Pool] = {}
        self.awaited: dict[int, set[str]] = {}

    @property
    def rows(self) -> int:
        """Rows of an epoch, masked ones among them."""
        return sum(row.rows for pool in self.order for row in pool)

    def take(self, source: str, number: int) -> Pool:
        """Pool `number` for a source, which asks for no earlier one again.

        Each is forgotten here once all sources have taken it or gone by.
        """
        self.reading.add(source)
        if number not in self.kept:
            self.awaited[number] = set(self.reading)
            self.kept[number] = self._compute(self.order[number])
        pool = self.kept[number]
        self._let_go(source, number)
        return pool.of(self.hooks[source])

    def leave(self, source: str) -> None:
        """This source needs no more pools."""
        self.reading.discard(source)
        self._let_go(source, len(self.order))

    def _let_go(self, source: str, last: int) -> None:
        for number in [one for one in self.kept if one <= last]:
            self.awaited[number].discard(source)
            if not self.awaited[number]:
                del self.kept[number], self.awaited[number]

    def _compute(self, blocks: Sequence[Piece]) -> Pool:
        names = sorted({hook for source in self.reading for hook in self.hooks[source]})
        rows, widths = sum(row.rows for row in blocks), self.reader.hooks
        acts = {hook: torch.empty(rows, widths[hook], dtype=torch.bfloat16) for hook in names}
        masks = {hook: torch.empty(rows, dtype=torch.uint8) for hook in names}
        moments: dict[str, list[tuple[Tensor, float]]] = {hook: [] for hook in names}
        start = 0
        for block in blocks:
            place = slice(start, start + block.rows)
            computed = self.reader.read(self.corpus.windows(block.start_window, block.stop_window), names)
            for hook in names:
                masks[hook][place] = self.reader.mask(computed, hook, computed.norms[hook].cpu(), block.start_window)
                moments[hook].append(row_moments(computed.acts[hook], masks[hook][place] == Mask.USABLE))
                acts[hook][place].copy_(computed.acts[hook])
            start = place.stop
        return Pool(acts, masks, moments)


class LiveSource:
    """Shuffled training rows from a live model, resumable at any batch; see `midiscover.train.Source`."""

    def __init__(self, live: LivePools, name: str, train: TrainConfig) -> None:
        """name: of this source among those that `live` was made for. Runs nothing yet."""
        self.live, self.name, self.hooks, self.train = live, name, live.hooks[name], train
        self.batch_size = train.batch_size
        self._pool: tuple[int, Pool] | None = None
        self._usable: dict[int, int] = {}
        self._norms: tuple[Normalisation, Normalisation] | None = None

    @property
    def inputs(self) -> Normalisation:
        """Of the hook that is read; computes the first pool."""
        return self._normalisations()[0]

    @property
    def outputs(self) -> Normalisation:
        """Of the hook that is reconstructed."""
        return self._normalisations()[1]

    @property
    def rows_per_epoch(self) -> int:
        """Usable rows; where there are several pools, as many of all as of the first."""
        self._normalisations()
        first = sum(row.rows for row in self.live.order[0])
        return round(self.live.rows * self._usable[0] / first)

    def __len__(self) -> int:
        return self.rows_per_epoch * self.train.epochs // self.batch_size

    def state(self) -> dict[str, Any]:
        """What a later process can't know without running the model again; JSON."""
        norms = [
            {"mean": one.mean.tolist(), "scale": one.scale, "variance": one.variance} for one in self._normalisations()
        ]
        return {"usable": sorted(self._usable.items()), "norms": norms}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, before anything is asked of this source."""
        self._usable = dict(state["usable"])
        first, second = (
            Normalisation(torch.tensor(one["mean"]), one["scale"], one["variance"]) for one in state["norms"]
        )
        self._norms = first, second

    def batches(self, start: int) -> Generator[Tensor | Pair, None, None]:
        """Batches [batch_size, d_in] bfloat16, or pairs, from number `start` on."""
        same = self.hooks[0] == self.hooks[1]
        try:
            with closing(self._loaded(start * self.batch_size, len(self) * self.batch_size)) as loaded:
                for batch in assemble(loaded, self.batch_size):
                    yield batch[0] if same else Pair(*batch)
        finally:
            self.live.leave(self.name)

    def _normalisations(self) -> tuple[Normalisation, Normalisation]:
        if self._norms is None:
            pool = self._take(0)
            first = pool.normalisation(self.hooks[0])
            second = first if self.hooks[0] == self.hooks[1] else pool.normalisation(self.hooks[1])
            self._norms = first, second
            if not len(self):
                raise ConfigError(
                    f"train.batch_size {self.batch_size} is more than the {self.rows_per_epoch} usable rows of "
                    f"{self.hooks[0]} give in {self.train.epochs} epochs: lower it, or give more text."
                )
        return self._norms

    def _take(self, number: int) -> Pool:
        if self._pool is None or self._pool[0] != number:
            self._pool = None  # its memory is free before the next pool takes some
            pool = self.live.take(self.name, number)
            self._pool = number, pool
            self._usable[number] = len(pool.usable(self.hooks))
        return self._pool[1]

    def _loaded(self, position: int, end: int) -> Generator[tuple[list[Tensor], Tensor], None, None]:
        """Columns of a pool and which of their rows come next, until `end`.

        Pools before `position` are skipped by the counts that are known of them.
        """
        names, left = list(dict.fromkeys(self.hooks)), end - position
        count, visit = len(self.live.order), 0
        while left > 0:
            # Where outliers were fewer at first than later the text ends early: its last pool is gone through again.
            number, epoch = min(visit, count - 1), visit // count
            if visit >= count > 1 and not self._usable[number]:
                raise StageError(f"None of the last {len(self.live.order[number])} blocks of {names[0]} is usable.")
            if number not in self._usable or position < self._usable[number]:
                pool = self._take(number)
                usable = pool.usable(self.hooks)
                order = row_order(len(usable), seed=self.train.seed, epoch=epoch, pool=number)
                order = order[position : position + left]
                yield [pool.acts[hook] for hook in names], usable[order]
                left -= len(order)
                position = max(0, position - len(usable))
            else:
                position -= self._usable[number]
            visit += 1


def usable_rows(
    reader: Reader, pieces: Iterable[tuple[int, Windows]], hooks: Hooks, batch_size: int, max_rows: int | None = None
) -> Iterator[Tensor | Pair]:
    """Usable rows of windows in their order, [at most batch_size, d] bfloat16, or pairs where the hooks differ.

    pieces: of a block's size, which the median norm is taken of, each with the number of its first window. Batches are
    cut as those of stored rows are.
    """
    read = (_usable_of(reader, first, windows, hooks) for first, windows in pieces)
    left = max_rows if max_rows is not None else 2**62
    if hooks[0] == hooks[1]:
        yield from rebatch((x for x, _ in read), batch_size, left)
        return
    for x, y in read:
        rows = min(len(x), left)
        left -= rows
        yield from map(Pair, x[:rows].split(batch_size) if rows else (), y[:rows].split(batch_size) if rows else ())
        if not left:
            return


def _usable_of(reader: Reader, first: int, windows: Windows, hooks: Hooks) -> tuple[Tensor, Tensor]:
    computed = reader.read(windows, list(dict.fromkeys(hooks)))
    masks = [reader.mask(computed, hook, computed.norms[hook].cpu(), first) for hook in hooks]
    usable = (torch.maximum(*masks) == Mask.USABLE).nonzero().flatten()
    x, y = (computed.acts[hook] for hook in hooks)
    return x[usable.to(x.device)], y[usable.to(y.device)]


def held_out_windows(corpus: Corpus, block_tokens: int) -> Iterator[tuple[int, Windows]]:
    """The held-out windows of a corpus, in pieces as a harvest cuts them into blocks."""
    for piece in _pieces(corpus, "held_out", block_tokens):
        yield piece.start_window, corpus.windows(piece.start_window, piece.stop_window)


def _pieces(corpus: Corpus, split: Split, block_tokens: int) -> list[Piece]:
    """What a harvest would make blocks of."""
    windows, context_size = corpus.manifest.windows, corpus.manifest.context_size
    plan = block_plan(windows["train"], windows["held_out"], context_size=context_size, block_tokens=block_tokens)
    return [
        Piece(span.start_window, span.stop_window, (span.stop_window - span.start_window) * context_size)
        for span in plan
        if span.split == split
    ]
