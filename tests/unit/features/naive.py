"""What is written down of features, by loops over features and rows; and a harvest and a corpus to read it from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from midiscover.config import FeaturesConfig
from midiscover.corpus import Corpus
from midiscover.features.collect import Part, collect_chunk
from midiscover.features.finish import Finisher
from midiscover.features.plan import Plan, plan_features
from midiscover.packing import Windows
from midiscover.sae.base import Sae
from midiscover.sae.registry import folded_sae
from midiscover.store.local import LocalStorage
from tests.harvests import write_harvest

CONTEXT, D_IN, D_SAE, VOCABULARY = 8, 6, 40, 30
SETTINGS = FeaturesConfig(
    top_contexts=4, interval_contexts=2, random_contexts=3, context_before=3, context_after=2, sample_tokens=10**6
)


class World(NamedTuple):
    storage: LocalStorage
    plan: Plan
    sae: Sae
    corpus: Any
    codes: Tensor
    """[train rows, d_sae] float32, masked rows 0."""
    x: Tensor
    usable: Tensor


def strings(ids: list[int]) -> list[str]:
    return [f"<{token}>" if token < VOCABULARY - 4 else "<|outofrange|>" for token in ids]


def random_sae(d_out: int = D_IN, *, seed: int = 0) -> Sae:
    generator = torch.Generator().manual_seed(seed)
    decoder = torch.randn(D_SAE, d_out, generator=generator)
    weights = {
        "W_enc": torch.randn(D_IN, D_SAE, generator=generator) / 40,
        "b_enc": torch.randn(D_SAE, generator=generator),
        "W_dec": decoder / decoder.norm(dim=1, keepdim=True),
        "b_dec": torch.zeros(d_out),
    }
    weights["b_enc"][:2] = -1e6  # dead
    weights["W_enc"][:, 5] *= 1e-4  # many values that are nearly equal
    architecture = "standard" if d_out == D_IN else "transcoder"
    return folded_sae({"architecture": architecture, "d_in": D_IN, "d_sae": D_SAE, "d_out": d_out}, weights)


def fake_corpus(windows: int) -> Any:
    generator = np.random.default_rng(0)
    ids = generator.integers(0, VOCABULARY, (windows, CONTEXT), dtype=np.int32)
    doc = np.repeat(np.arange(windows, dtype=np.int32) // 3, CONTEXT).reshape(windows, CONTEXT)
    doc[:, 0] = -2
    shards = [SimpleNamespace(start_window=0, stop_window=7), SimpleNamespace(start_window=7, stop_window=windows)]
    manifest = SimpleNamespace(id="c.test", shards=shards)
    return SimpleNamespace(
        manifest=manifest, ids=ids, doc=doc, windows=lambda start, stop: Windows(ids[start:stop], doc[start:stop])
    )


def make_world(folder: Path, settings: FeaturesConfig = SETTINGS, *, d_out: int = D_IN) -> World:
    folder.mkdir(parents=True, exist_ok=True)
    storage = LocalStorage(folder)
    manifest, acts, mask = write_harvest(storage, train_windows=20, d_in=D_IN, context_size=CONTEXT)
    sae = random_sae(d_out)
    rows = 20 * CONTEXT
    usable = mask[:rows] == 0
    with torch.no_grad():
        codes = sae.encode(acts[:rows].float()) * usable[:, None]
    corpus: Corpus | Any = fake_corpus(24)
    return World(storage, plan_features(manifest, settings), sae, corpus, codes, acts[:rows].float(), usable)


def whole(world: World) -> Part:
    """What its features do on all training rows."""
    return collect_chunk(world.storage, {"sae": world.sae}, world.plan, world.plan.blocks)["sae"]


def finish(
    world: World,
    part: Part,
    unembedding: Tensor | None,
    name: str = "sae",
    strings: Callable[[list[int]], list[str]] = strings,
) -> dict[str, Any]:
    """Feature records of an SAE of this name."""
    return Finisher(
        storage=world.storage,
        sae_id=name,
        sae=world.sae,
        plan=world.plan,
        corpus=world.corpus,
        strings=strings,
        unembedding=unembedding,
    ).finish(part)


def top_rows(codes: Tensor, feature: int, count: int) -> list[int]:
    """Rows of the highest window maxima, highest first."""
    best = []
    for window in range(len(codes) // CONTEXT):
        values = codes[window * CONTEXT : (window + 1) * CONTEXT, feature].tolist()
        if max(values) > 0:
            best.append((-max(values), window * CONTEXT + values.index(max(values))))
    return [row for _, row in sorted(best)[:count]]


def hashed(feature: int, row: int) -> int:
    """splitmix64's finaliser of feature and row, in Python's integers."""
    full = (1 << 64) - 1
    x = (feature * 0x9E3779B97F4A7C15 + row * 0xBF58476D1CE4E5B9) & full
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & full
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & full
    return (x ^ (x >> 31)) >> 1
