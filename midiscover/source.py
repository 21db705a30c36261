"""Stored activations as the training loop's Source: one hook, or the same tokens at two hooks for transcoders.

All hooks of a harvest are cut into blocks of the same rows, but each masks rows of its own (outliers by its own norm).
A pair is a row that both hooks may use.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Self

import torch
from torch import Tensor

from midiscover.config import TrainConfig
from midiscover.errors import NotFoundError
from midiscover.sae.base import Normalisation
from midiscover.store.blocks import Mask, read_manifest, read_masks
from midiscover.store.loader import ActivationStream, iterate_blocks, normalisation
from midiscover.store.manifest import HookManifest, Split
from midiscover.store.storage import Storage
from midiscover.train import Pair


class StoreSource:
    """Shuffled training rows of one hook, resumable at any batch; see `midiscover.train.Source`."""

    def __init__(self, storage: Storage, manifest: HookManifest, train: TrainConfig) -> None:
        """ConfigError where the rows of all epochs do not fill one batch."""
        self.stream = ActivationStream(
            storage,
            manifest,
            batch_size=train.batch_size,
            epochs=train.epochs,
            seed=train.seed,
            shuffle_tokens=train.shuffle_tokens,
        )
        self.batch_size = train.batch_size
        self.rows_per_epoch = self.stream.rows_per_epoch
        self.inputs = self.outputs = _normalisation(storage, manifest)

    @classmethod
    def open(cls, storage: Storage, harvest_id: str, hook: str, train: TrainConfig) -> Self:
        """The source of a harvested hook. NotFoundError where its manifest is not committed."""
        return cls(storage, harvested(storage, harvest_id, hook), train)

    def __len__(self) -> int:
        return len(self.stream)

    def batches(self, start: int) -> Iterator[Tensor]:
        """Batches [batch_size, d_in] bfloat16 from number `start` on."""
        return self.stream.batches(start)


class PairSource:
    """Shuffled training rows at two hooks of one harvest, resumable at any batch; see `midiscover.train.Source`.

    Two streams in the same order over the rows that both hooks may use. They share the memory of one: each pool holds
    half of `shuffle_tokens` rows. Each hook is normalised by its own manifest, as it is for an SAE of its own.
    """

    def __init__(self, storage: Storage, inputs: HookManifest, outputs: HookManifest, train: TrainConfig) -> None:
        """Reads the masks of all training blocks, a byte per row and hook, and keeps them.

        ConfigError where the pairs of all epochs do not fill one batch.
        """
        masks = joint_masks(storage, inputs, outputs, "train")
        self.x, self.y = (
            ActivationStream(
                storage,
                manifest,
                batch_size=train.batch_size,
                epochs=train.epochs,
                seed=train.seed,
                shuffle_tokens=train.pool_tokens(2),
                masks=masks,
            )
            for manifest in (inputs, outputs)
        )
        self.batch_size = train.batch_size
        self.rows_per_epoch = self.x.rows_per_epoch
        self.inputs, self.outputs = _normalisation(storage, inputs), _normalisation(storage, outputs)

    @classmethod
    def open(cls, storage: Storage, harvest_id: str, hook: str, output_hook: str, train: TrainConfig) -> Self:
        """The source of two harvested hooks. NotFoundError where a manifest is not committed."""
        return cls(storage, harvested(storage, harvest_id, hook), harvested(storage, harvest_id, output_hook), train)

    def __len__(self) -> int:
        return len(self.x)

    def batches(self, start: int) -> Generator[Pair, None, None]:
        """Pairs of [batch_size, d_in] and [batch_size, d_out] bfloat16 from number `start` on."""
        with closing(self.x.batches(start)) as inputs, closing(self.y.batches(start)) as outputs:
            yield from map(Pair, inputs, outputs)


def open_source(
    storage: Storage, harvest_id: str, hook: str, output_hook: str, train: TrainConfig
) -> StoreSource | PairSource:
    """What an SAE of `hook` trains on: the hook's rows, or pairs where `output_hook` is another hook.

    NotFoundError where a manifest is not committed, ConfigError where the rows do not fill one batch.
    """
    if output_hook == hook:
        return StoreSource.open(storage, harvest_id, hook, train)
    return PairSource.open(storage, harvest_id, hook, output_hook, train)


def harvested(storage: Storage, harvest_id: str, hook: str) -> HookManifest:
    """The manifest of a hook. NotFoundError where it is not committed."""
    manifest = read_manifest(storage, harvest_id, hook)
    if manifest is None:
        raise NotFoundError(f"'{hook}' is not harvested in {storage.uri} under {harvest_id}; run the harvest first.")
    return manifest


def joint_masks(storage: Storage, inputs: HookManifest, outputs: HookManifest, split: Split) -> dict[int, Tensor]:
    """Block index -> [rows] uint8, 0 where both hooks may use the row. Reads nothing but masks."""
    assert [row.span for row in inputs.blocks] == [row.span for row in outputs.blocks], "hooks of one harvest"
    first, second = (read_masks(storage, manifest, split) for manifest in (inputs, outputs))
    return {index: torch.maximum(first[index], second[index]) for index in first}


def iterate_pairs(
    storage: Storage,
    inputs: HookManifest,
    outputs: HookManifest,
    split: Split,
    batch_size: int,
    max_rows: int | None = None,
) -> Iterator[Pair]:
    """Rows of a split that both hooks may use, in their order: pairs of [at most batch_size, d] bfloat16.

    Blocks are not joined: the last batch of each may be shorter.
    """
    left = sum(row.rows for row in inputs.split(split)) if max_rows is None else max_rows
    with (
        closing(iterate_blocks(storage, inputs, split)) as first,
        closing(iterate_blocks(storage, outputs, split)) as second,
    ):
        for x, y in zip(first, second, strict=True):
            usable = ((x.mask == Mask.USABLE) & (y.mask == Mask.USABLE)).nonzero().flatten()[:left]
            left -= len(usable)
            for rows in usable.split(batch_size) if len(usable) else ():
                yield Pair(x.acts[rows], y.acts[rows])
            if left == 0:
                return


def _normalisation(storage: Storage, manifest: HookManifest) -> Normalisation:
    mean, scale = normalisation(storage, manifest)
    return Normalisation(mean, scale, manifest.variance)
