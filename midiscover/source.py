"""A stored hook as the training loop's Source: the loader's stream with the numbers that normalise it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

from torch import Tensor

from midiscover.config import TrainConfig
from midiscover.errors import NotFoundError
from midiscover.store.blocks import read_manifest
from midiscover.store.loader import ActivationStream, normalisation
from midiscover.store.manifest import HookManifest
from midiscover.store.storage import Storage


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
        self.variance = manifest.variance
        self.mean, self.scale = normalisation(storage, manifest)

    @classmethod
    def open(cls, storage: Storage, harvest_id: str, hook: str, train: TrainConfig) -> Self:
        """The source of a harvested hook. NotFoundError where its manifest is not committed."""
        manifest = read_manifest(storage, harvest_id, hook)
        if manifest is None:
            raise NotFoundError(
                f"'{hook}' is not harvested in {storage.uri} under {harvest_id}; run the harvest first."
            )
        return cls(storage, manifest, train)

    def __len__(self) -> int:
        return len(self.stream)

    def batches(self, start: int) -> Iterator[Tensor]:
        """Batches [batch_size, d_in] bfloat16 from number `start` on."""
        return self.stream.batches(start)
