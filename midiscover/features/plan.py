"""Which stored rows the features of an SAE are measured on; known before anything is read.

A row's number is `window * context_size + position`, the same in every hook of a harvest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from midiscover.config import FeaturesConfig
from midiscover.store.manifest import BlockRow, HookManifest

CHUNK_TOKENS = 262_144
"""Rows that one task reads, about: what a task leaves behind is as large as all examples of all features."""
_SAMPLE_SEED, _RANDOM_SEED = 1, 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The training blocks of a hook that are read, and the rows of them that are drawn at random."""

    manifest: HookManifest
    blocks: tuple[BlockRow, ...]
    settings: FeaturesConfig

    @property
    def context_size(self) -> int:
        """Tokens of a window."""
        return self.blocks[0].context_size

    @property
    def usable(self) -> int:
        """Rows that are not masked."""
        return sum(block.usable for block in self.blocks)

    @property
    def rows(self) -> int:
        """All rows of the blocks."""
        return sum(block.rows for block in self.blocks)

    def chunks(self, workers: int = 1) -> list[tuple[BlockRow, ...]]:
        """The blocks in pieces of about `CHUNK_TOKENS` rows, and no fewer pieces than workers where blocks suffice."""
        count = min(len(self.blocks), max(workers, math.ceil(self.rows / CHUNK_TOKENS)))
        ends = [len(self.blocks) * i // count for i in range(count + 1)]
        return [self.blocks[start:stop] for start, stop in zip(ends, ends[1:], strict=False)]

    def sample(self) -> Tensor:
        """Sorted numbers of the rows on which correlations are measured, at most `settings.sample_tokens`."""
        wanted = self.settings.sample_tokens
        if wanted >= self.rows:
            places = torch.arange(self.rows)
        else:
            places = torch.randint(self.rows, (wanted,), generator=torch.Generator().manual_seed(_SAMPLE_SEED))
        return self._numbers(places.unique())

    def drawn(self, d_sae: int) -> Tensor:
        """[d_sae, random_contexts] numbers of the rows whose contexts are kept of each feature, whatever it does;
        of all rows, the masked ones included, which are left out when they are read.
        """
        shape = (d_sae, self.settings.random_contexts)
        return self._numbers(
            torch.randint(self.rows, shape, generator=torch.Generator().manual_seed(_RANDOM_SEED)).flatten()
        ).view(shape)

    def _numbers(self, places: Tensor) -> Tensor:
        """Row numbers of places in the blocks' rows laid end to end."""
        ends = torch.tensor([block.rows for block in self.blocks]).cumsum(0)
        first = torch.tensor([block.start_window * self.context_size for block in self.blocks])
        block = torch.searchsorted(ends, places, right=True)
        return first[block] + places - (ends - torch.tensor([b.rows for b in self.blocks]))[block]


def plan_features(manifest: HookManifest, settings: FeaturesConfig) -> Plan:
    """Whole training blocks, all of them or as many, evenly spread, as `settings.max_tokens` allows; one at least."""
    every = blocks = manifest.split("train")
    count = len(every)
    while count > 1 and (usable := sum(block.usable for block in blocks)) > settings.max_tokens:
        count = max(1, min(count - 1, count * settings.max_tokens // usable))
        blocks = tuple(every[len(every) * i // count] for i in range(count))
    return Plan(manifest=manifest, blocks=blocks, settings=settings)
