"""A live model's rows against those of a harvest of the same corpus: the same bits in one order, from any batch on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from jobs import crews
from midiscover.config import HarvestConfig, TrainConfig
from midiscover.corpus import Corpus
from midiscover.errors import ConfigError
from midiscover.harvest import Harvester, HarvestJob
from midiscover.live import Hooks, LivePools, LiveSource, held_out_windows, usable_rows
from midiscover.lm import LanguageModel
from midiscover.packing import Windows
from midiscover.reading import Computed, Reader
from midiscover.resolve import Pack
from midiscover.source import iterate_pairs, open_source
from midiscover.store.blocks import block_plan, committed, write_manifest
from midiscover.store.loader import iterate_rows
from midiscover.store.manifest import HookManifest
from midiscover.train import Pair
from tests.unit.test_harvest import CONTEXT

HOOK, OUTPUT = "model.layers.0.mlp.down_proj:in", "model.layers.1.mlp"
WIDTHS = {HOOK: 56, OUTPUT: 24}
HARVEST = HarvestConfig(hooks=(HOOK, OUTPUT), block_tokens=7 * CONTEXT, outlier_norm=1.5)
ID = "h.0000000000"
ALL, SOME = 1_000_000, 20 * CONTEXT
"""Rows of a pool: more than there are, or three blocks."""


class Counted(Reader):
    """Notes how many windows are read, and at which hooks."""

    def __init__(self, model: LanguageModel, config: HarvestConfig = HARVEST) -> None:
        super().__init__(model, WIDTHS, config, CONTEXT)
        self.windows = 0
        self.hooks_read: set[str] = set()

    def read(self, windows: Windows, hooks: Sequence[str]) -> Computed:
        self.windows += len(windows.ids)
        self.hooks_read.update(hooks)
        return super().read(windows, hooks)


def harvest(model: LanguageModel, corpus: Corpus, config: HarvestConfig = HARVEST) -> dict[str, HookManifest]:
    windows, storage = corpus.manifest.windows, corpus.storage
    plan = block_plan(windows["train"], windows["held_out"], context_size=CONTEXT, block_tokens=config.block_tokens)
    job = HarvestJob(harvest_id=ID, hooks=WIDTHS, config=config)
    list(Harvester(job, model, corpus, storage).run([(span, [HOOK, OUTPUT]) for span in plan]))
    return {hook: write_manifest(storage, ID, hook, plan, committed(storage, ID, hook), lineage={}) for hook in WIDTHS}


def pools(reader: Reader, corpus: Corpus, *hooks: Hooks, shuffle: int = ALL, epochs: int = 1) -> LivePools:
    names = {str(number): pair for number, pair in enumerate(hooks)}
    return LivePools(reader, corpus, names, shuffle_tokens=shuffle, seed=3, epochs=epochs)


def settings(*, batch_size: int = 11, epochs: int = 1, shuffle: int = ALL) -> TrainConfig:
    return TrainConfig(batch_size=batch_size, epochs=epochs, shuffle_tokens=shuffle, seed=3)


def all_of(source: LiveSource | object, start: int = 0) -> list[Tensor]:
    """Batches as one tensor each."""
    batches = source.batches(start)  # type: ignore[attr-defined]
    return [torch.cat(list(batch), 1) if isinstance(batch, Pair) else batch for batch in batches]


@pytest.mark.parametrize("output", [HOOK, OUTPUT], ids=["rows", "pairs"])
@pytest.mark.parametrize("epochs", [1, 3])
def test_in_one_pool_everything_is_what_a_store_gives(
    model: LanguageModel, corpus: Corpus, output: str, epochs: int
) -> None:
    manifests, train = harvest(model, corpus), settings(epochs=epochs)
    assert all(manifest.masked["outlier"] > 0 for manifest in manifests.values())
    stored = open_source(corpus.storage, ID, HOOK, output, train)
    reader = Counted(model)
    live = LiveSource(pools(reader, corpus, (HOOK, output), epochs=epochs), "0", train)
    assert (len(live), live.rows_per_epoch) == (len(stored), stored.rows_per_epoch)
    for one, two in ((live.inputs, stored.inputs), (live.outputs, stored.outputs)):
        assert torch.equal(one.mean, two.mean)
        assert (one.scale, one.variance) == (two.scale, two.variance)
    ours, theirs = all_of(live), all_of(stored)
    assert len(ours) == len(live)
    assert all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True))
    assert reader.windows == corpus.manifest.windows["train"], "the model ran once"
    assert reader.hooks_read == {HOOK, output}


def test_several_pools_come_in_the_order_of_the_store(model: LanguageModel, corpus: Corpus) -> None:
    """Without outliers, whose number could not be known before."""
    plain = HarvestConfig(hooks=(HOOK, OUTPUT), block_tokens=7 * CONTEXT, outlier_norm=1e9, mask_first=False)
    harvest(model, corpus, plain)
    train, reader = settings(shuffle=SOME), Counted(model, plain)
    stored = open_source(corpus.storage, ID, OUTPUT, OUTPUT, train)
    live = LiveSource(pools(reader, corpus, (OUTPUT, OUTPUT), shuffle=SOME), "0", train)
    assert len(live.live.order) > 3
    ours, theirs = all_of(live), all_of(stored)
    # How many rows are usable is reckoned from the first pool: special tokens inside a window differ a little.
    assert abs(len(ours) - len(theirs)) <= 0.05 * len(theirs)
    common = min(len(ours), len(theirs))
    assert all(torch.equal(one, two) for one, two in zip(ours[:common], theirs[:common], strict=True))
    scale, variance = stored.inputs.scale, stored.inputs.variance
    assert live.inputs.scale == pytest.approx(scale, rel=0.1)
    assert live.inputs.variance == pytest.approx(variance, rel=0.2)


def test_a_text_that_ends_early_goes_through_its_last_pool_again(model: LanguageModel, corpus: Corpus) -> None:
    train, reader = settings(batch_size=8, shuffle=SOME), Counted(model)
    live = LiveSource(pools(reader, corpus, (HOOK, HOOK), shuffle=SOME), "0", train)
    real = len(all_of(live)) * 8
    live._usable[0] *= 2  # as if the first pool had had no outliers
    promised = len(live)
    assert promised * 8 > 1.2 * real
    again = LiveSource(pools(Counted(model), corpus, (HOOK, HOOK), shuffle=SOME), "0", train)
    again.restore(live.state())
    assert len(all_of(again, start=1)) == promised - 1


@pytest.mark.parametrize("shuffle", [ALL, SOME])
def test_from_any_batch_on_it_is_the_same_and_no_earlier_pool_is_computed(
    model: LanguageModel, corpus: Corpus, shuffle: int
) -> None:
    train, reader = settings(batch_size=5, shuffle=shuffle), Counted(model)
    whole = LiveSource(pools(reader, corpus, (HOOK, OUTPUT), shuffle=shuffle), "0", train)
    want, state = [], {}
    for number, batch in enumerate(whole.batches(0)):
        want.append(torch.cat(list(batch), 1))
        state[number + 1] = json.loads(json.dumps(whole.state()))
    for start in (1, len(want) // 2, len(want) - 1):
        reader = Counted(model)
        rest = LiveSource(pools(reader, corpus, (HOOK, OUTPUT), shuffle=shuffle), "0", train)
        rest.restore(state[start])
        assert len(rest) == len(want)
        assert all(torch.equal(one, two) for one, two in zip(all_of(rest, start), want[start:], strict=True))
        if shuffle == SOME and start > 1:
            assert reader.windows < 0.7 * corpus.manifest.windows["train"]


def test_sources_share_every_pool_and_none_is_kept(model: LanguageModel, corpus: Corpus) -> None:
    train, reader = settings(shuffle=SOME), Counted(model)
    live = pools(reader, corpus, (HOOK, HOOK), (HOOK, OUTPUT), (OUTPUT, OUTPUT), shuffle=SOME)
    sources = [LiveSource(live, name, train) for name in "012"]
    streams = [source.batches(0) for source in sources]
    counts = Counter[int]()
    while streams:
        for number, stream in enumerate(list(streams)):
            counts[number] += 1
            if counts[1] == 9 and number == 1:
                stream.close()  # it needs no more, such as a pack whose SAEs have all diverged
            if next(stream, None) is None:
                streams.remove(stream)
        assert len(live.kept) <= 2
    assert reader.windows == corpus.manifest.windows["train"]
    assert not live.kept
    assert not live.awaited


def test_packs_of_other_paces_share_every_pool(
    model: LanguageModel, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process steps the pack that is furthest behind, however large its batches are."""
    live = pools(Counted(model), corpus, (HOOK, HOOK), (OUTPUT, OUTPUT), shuffle=SOME)
    sizes, most = {"0": 5, "1": 160}, [0]

    def turns(_job: object, pack: Pack, *_: object) -> Iterator[int]:
        train = settings(batch_size=sizes[pack.id], shuffle=SOME)
        for number, _batch in enumerate(LiveSource(live, pack.id, train).batches(0), 1):
            most[0] = max(most[0], len(live.kept))
            yield number * sizes[pack.id]

    monkeypatch.setattr(crews, "_turns", turns)
    job: Any = SimpleNamespace(slots=SimpleNamespace(threads=torch.get_num_threads()), streams=False)
    crews.run_crew(job, tuple(Pack(id=name, hook=HOOK, saes=()) for name in sizes))
    assert corpus.manifest.windows["train"] * CONTEXT > 6 * SOME
    assert 0 < most[0] <= 2


def test_alone_a_source_gives_what_it_gives_beside_others(model: LanguageModel, corpus: Corpus) -> None:
    train = settings(shuffle=SOME)
    alone = LiveSource(pools(Counted(model), corpus, (OUTPUT, OUTPUT), shuffle=SOME), "0", train)
    live = pools(Counted(model), corpus, (HOOK, HOOK), (OUTPUT, OUTPUT), shuffle=SOME)
    first, second = (LiveSource(live, name, train) for name in "01")
    beside = [batch for batch, _ in zip(second.batches(0), first.batches(0), strict=False)]
    assert all(torch.equal(one, two) for one, two in zip(all_of(alone), beside, strict=False))


@pytest.mark.parametrize("limit", [None, 100])
def test_held_out_rows_are_those_of_the_store(model: LanguageModel, corpus: Corpus, limit: int | None) -> None:
    manifests, reader = harvest(model, corpus), Reader(model, WIDTHS, HARVEST, CONTEXT)
    held_out = list(held_out_windows(corpus, HARVEST.block_tokens))
    stored = list(iterate_rows(corpus.storage, manifests[HOOK], "held_out", 16, limit))
    live = list(usable_rows(reader, held_out, (HOOK, HOOK), 16, limit))
    assert all(torch.equal(one, two) for one, two in zip(live, stored, strict=True))  # type: ignore[arg-type]
    pairs = list(iterate_pairs(corpus.storage, manifests[HOOK], manifests[OUTPUT], "held_out", 16, limit))
    found = list(usable_rows(reader, held_out, (HOOK, OUTPUT), 16, limit))
    for one, two in zip(found, pairs, strict=True):
        assert torch.equal(one[0], two.x)
        assert torch.equal(one[1], two.y)


def test_what_would_run_the_model_again_is_refused(model: LanguageModel, corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.epochs is 2: its [\d,]+ rows do not fit into train.shuffle_tokens"):
        pools(Counted(model), corpus, (HOOK, HOOK), shuffle=SOME, epochs=2)
    source = LiveSource(pools(Counted(model), corpus, (HOOK, HOOK)), "0", settings(batch_size=10**6))
    with pytest.raises(ConfigError, match="train.batch_size 1000000 is more than"):
        len(source)
