"""Feature records against loops over features and rows, and their files against damage."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import jobs.features
from midiscover.config import FeaturesConfig
from midiscover.errors import CorruptError, NotFoundError
from midiscover.features import collect
from midiscover.features.collect import Part, collect_chunk, merged
from midiscover.features.explanations import Explanations
from midiscover.features.labels import label, peaks
from midiscover.features.plan import plan_features
from midiscover.features.records import Context, FeatureRecords, open_features
from midiscover.ids import features_id
from midiscover.store import layout
from midiscover.store.blocks import Mask, commit_block, read_block, write_manifest
from tests.unit.features.naive import (
    CONTEXT,
    D_IN,
    D_SAE,
    SETTINGS,
    VOCABULARY,
    World,
    finish,
    hashed,
    make_world,
    strings,
    top_rows,
    whole,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def unembedding() -> Tensor:
    return torch.randn(VOCABULARY, D_IN, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def records(world: World, unembedding: Tensor) -> FeatureRecords:
    finish(world, whole(world), unembedding)
    return open_features(world.storage, "sae")


def test_a_task_that_is_tried_again_after_its_last_word_finds_it(world: World, unembedding: Tensor) -> None:
    run = jobs.features.Run(storage=world.storage, settings=world.plan.settings)
    manifest = finish(world, whole(world), unembedding, "again")
    parts = [run.part_key("again", number, 3) for number in range(3)]
    for key in parts[1:]:  # it died when it had removed one
        world.storage.write(key, b"part")
    site = jobs.features.Site("h.gone", "c.gone", "hook")
    again = jobs.features.finish_sae._function(run, site, "again", 3, None, 1, False)
    assert again == manifest
    assert not any(map(world.storage.exists, parts))


def test_statistics(world: World, records: FeatureRecords) -> None:
    table = records.table().to_pydict()
    assert table["index"] == list(range(D_SAE))
    for f in range(D_SAE):
        fired = world.codes[world.codes[:, f] > 0, f].double().numpy()
        assert table["count"][f] == len(fired)
        assert table["firing_rate"][f] == pytest.approx(len(fired) / int(world.usable.sum()), abs=1e-15)
        assert table["max"][f] == pytest.approx(fired.max() if len(fired) else 0, rel=1e-7)
        assert table["mean"][f] == pytest.approx(fired.mean() if len(fired) else 0, rel=1e-6)
        assert table["std"][f] == pytest.approx(fired.std() if len(fired) else 0, rel=1e-4, abs=1e-5)
    assert records.manifest["tokens"] == int(world.usable.sum())
    assert records.manifest["alive"] == int((world.codes > 0).any(0).sum()) < D_SAE


def test_histogram_and_quantiles(world: World, records: FeatureRecords) -> None:
    for f in range(D_SAE):
        row = records.feature(f)
        fired = world.codes[world.codes[:, f] > 0, f].double().numpy()
        if not len(fired):
            assert row["hist_heights"] == row["hist_values"] == row["quantiles"] == row["top_tokens"] == []
            continue
        width = 2.0 ** math.ceil(math.log2(fired.max())) / 128
        count = math.ceil(fired.max() / width)
        edges = np.arange(count + 1) * width
        # Bins hold their upper end, numpy's their lower one.
        expected = np.histogram(-fired, bins=-edges[::-1])[0][::-1]
        assert row["hist_heights"] == expected.tolist()
        assert row["hist_values"] == pytest.approx(((edges[:-1] + edges[1:]) / 2).tolist(), rel=1e-6)
        exact = np.quantile(fired, (0.25, 0.5, 0.75, 0.9, 0.95, 0.99), method="inverted_cdf")
        assert np.abs(np.array(row["quantiles"]) - exact).max() <= width * 1.0001


def test_top_contexts(world: World, records: FeatureRecords) -> None:
    for f in range(D_SAE):
        top = [context for context in records.contexts(f) if context.kind == "top"]
        expected = top_rows(world.codes, f, SETTINGS.top_contexts)
        assert [context.window * CONTEXT + context.position for context in top] == expected
        assert [context.rank for context in top] == list(range(len(expected)))
        peaks = [strings([int(world.corpus.ids[divmod(row, CONTEXT)])])[0] for row in expected]
        ranked = sorted(dict.fromkeys(peaks), key=lambda token: -peaks.count(token))  # equal ones: first seen first
        assert records.feature(f)["top_tokens"] == ranked[:5]
        for context in top:
            assert (context.bin_min, context.bin_share) == (-1, -1)
            assert context.bin_max == pytest.approx(float(world.codes[:, f].max()))


def test_every_context_is_what_stands_there(world: World, records: FeatureRecords) -> None:
    kinds = set()
    for f in range(D_SAE):
        for context in records.contexts(f):
            kinds.add(context.kind)
            start, stop = max(0, context.position - 3), min(CONTEXT, context.position + 3)
            rows = slice(context.window * CONTEXT + start, context.window * CONTEXT + stop)
            assert context.start == start
            assert context.values == world.codes[rows, f].tolist()
            assert context.token_ids == world.corpus.ids[context.window, start:stop].tolist()
            assert context.tokens == strings(context.token_ids)
            assert context.values[context.peak] == context.value
            document = int(world.corpus.doc[context.window, context.position])
            assert context.document == (document if document >= 0 else None)
    assert kinds == {"top", "interval", "random"}


def test_contexts_of_intervals_are_those_with_the_smallest_hashes(world: World, records: FeatureRecords) -> None:
    for f in range(D_SAE):
        values = world.codes[:, f].double()
        if not bool((values > 0).any()):
            continue
        width = 2.0 ** math.ceil(math.log2(float(values.max()))) / 8
        expected = []
        for i in reversed(range(8)):
            rows = ((values > i * width) & (values <= (i + 1) * width)).nonzero().flatten().tolist()
            share = len(rows) / int(world.usable.sum())
            chosen = sorted(rows, key=lambda row: hashed(f, row))[: SETTINGS.interval_contexts]
            expected += [(row, i * width, (i + 1) * width, share) for row in chosen]
        found = [
            (context.window * CONTEXT + context.position, context.bin_min, context.bin_max, context.bin_share)
            for context in records.contexts(f)
            if context.kind == "interval"
        ]
        assert [line[0] for line in found] == [line[0] for line in expected]
        for mine, naive in zip(found, expected, strict=True):
            assert mine == pytest.approx(naive, rel=1e-6)


def test_random_contexts_are_drawn_from_all_usable_rows(world: World, records: FeatureRecords) -> None:
    drawn, masked = [], 0
    for f, rows in enumerate(world.plan.drawn(D_SAE).tolist()):
        contexts = [context for context in records.contexts(f) if context.kind == "random"]
        usable = [row for row in rows if world.usable[row]]
        assert [context.window * CONTEXT + context.position for context in contexts] == usable
        assert [context.value for context in contexts] == pytest.approx(world.codes[usable, f].tolist(), rel=1e-6)
        drawn, masked = drawn + contexts, masked + len(rows) - len(usable)
    assert masked
    assert any(context.value == 0 for context in drawn)
    assert len({context.window for context in drawn}) > 15


@pytest.mark.parametrize("left_out", ["interval", "random"])
def test_a_kind_of_which_none_is_asked_is_left_out(
    world: World, records: FeatureRecords, unembedding: Tensor, tmp_path: Path, left_out: str
) -> None:
    less = make_world(tmp_path, dataclasses.replace(SETTINGS, **{f"{left_out}_contexts": 0}))
    finish(less, whole(less), unembedding)
    found = open_features(less.storage, "sae")
    for f in range(D_SAE):
        assert found.contexts(f) == [context for context in records.contexts(f) if context.kind != left_out]


def test_directions(world: World, records: FeatureRecords, unembedding: Tensor) -> None:
    decoder = world.sae.W_dec.detach().double()
    logits = (decoder @ unembedding.T.double()).numpy()
    cosine = (decoder / decoder.norm(dim=1, keepdim=True)) @ (decoder / decoder.norm(dim=1, keepdim=True)).T
    for f in range(D_SAE):
        row = records.feature(f)
        order = np.argsort(-logits[f])
        assert row["pos_ids"] == order[:10].tolist()
        assert row["neg_ids"] == order[::-1][:10].tolist()
        assert row["pos_values"] == pytest.approx(logits[f][order[:10]].tolist(), rel=1e-4)
        assert row["pos_tokens"] == strings(row["pos_ids"])
        assert row["neg_tokens"] == strings(row["neg_ids"])
        heights, edges = np.histogram(logits[f].astype(np.float32), bins=50)
        assert sum(row["logit_hist_heights"]) == VOCABULARY
        assert np.abs(np.cumsum(row["logit_hist_heights"]) - np.cumsum(heights)).max() <= 1  # a value on an edge
        assert row["logit_hist_values"] == pytest.approx(((edges[:-1] + edges[1:]) / 2).tolist(), rel=1e-3, abs=1e-4)
        near = cosine[f].clone()
        near[f] = -2
        assert row["neighbour_index"] == near.argsort(descending=True)[:10].tolist()
        assert row["neighbour_cosine"] == pytest.approx(near.sort(descending=True).values[:10].tolist(), abs=1e-5)
        size = decoder[f].abs()
        assert row["neuron_index"] == size.argsort(descending=True)[:3].tolist()
        assert row["neuron_value"] == pytest.approx(decoder[f][row["neuron_index"]].tolist(), rel=1e-5)
        assert row["neuron_l1"] == pytest.approx((size[row["neuron_index"]] / size.sum()).tolist(), rel=1e-5)


def test_correlations(world: World, records: FeatureRecords) -> None:
    codes, x = world.codes[world.usable].double().numpy(), world.x[world.usable].double().numpy()
    alive = codes.std(0) > 0.01 * np.sqrt((codes**2).mean(0))  # what hardly moves is left out
    assert D_SAE // 2 < alive.sum() < D_SAE - 2
    for f in np.flatnonzero(alive):
        row = records.feature(int(f))
        others = [g for g in np.flatnonzero(alive) if g != f]
        pearson = np.array([np.corrcoef(codes[:, f], codes[:, g])[0, 1] for g in others])
        assert row["coactive_pearson"] == pytest.approx(np.sort(pearson)[::-1][:10].tolist(), abs=1e-4)
        for g, cosine in zip(row["coactive_index"], row["coactive_cosine"], strict=True):
            exact = codes[:, f] @ codes[:, g] / np.linalg.norm(codes[:, f]) / np.linalg.norm(codes[:, g])
            assert cosine == pytest.approx(exact, abs=1e-5)
        inputs = np.array([np.corrcoef(codes[:, f], x[:, d])[0, 1] for d in range(1, D_IN)])  # column 0 is constant
        assert row["input_pearson"] == pytest.approx(np.sort(inputs)[::-1][:3].tolist(), abs=1e-4)
    assert records.feature(0)["coactive_index"] == []


def test_parts_merge_to_the_whole_in_any_order(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = world.plan.blocks
    pieces = [blocks[:1], blocks[1:4], blocks[4:]]
    monkeypatch.setattr(collect, "CODE_BYTES", 4 * D_SAE * CONTEXT)  # a window at a time
    parts = [collect_chunk(world.storage, {"sae": world.sae}, world.plan, piece)["sae"].to_bytes() for piece in pieces]
    monkeypatch.undo()
    one = Part.from_bytes(whole(world).to_bytes())
    for order in ((0, 1, 2), (2, 0, 1)):
        many = merged(Part.from_bytes(parts[i]) for i in order)
        assert (many.tokens, many.rows) == (one.tokens, one.rows)
        for group in ("histogram", "top", "intervals", "drawn", "sample"):
            for name, tensor in getattr(one, group).state().items():
                other = getattr(many, group).state()[name]
                if tensor.dtype == torch.float64:
                    torch.testing.assert_close(other, tensor, rtol=1e-12, atol=1e-12)
                else:
                    assert torch.equal(other, tensor), f"{group}.{name}"


def test_masked_rows_do_not_count_even_where_they_are_no_numbers(world: World) -> None:
    old, storage, rows = world.plan.manifest, world.storage, {}
    for row in old.blocks:
        block = read_block(storage, old.harvest_id, old.hook, row)
        acts = block.acts.clone()
        acts[block.mask != Mask.USABLE] = torch.nan
        rows[row.index] = commit_block(storage, "h.nan", old.hook, row.span, acts, block.norm, block.mask)
    spans = [row.span for row in old.blocks]
    plan = plan_features(write_manifest(storage, "h.nan", old.hook, spans, rows, lineage={}), SETTINGS)
    found = collect_chunk(storage, {"sae": world.sae}, plan, plan.blocks)["sae"]
    assert found.to_bytes() == whole(world).to_bytes()


def test_a_sample_is_drawn_where_not_all_rows_fit(tmp_path: Path) -> None:
    small = make_world(tmp_path, FeaturesConfig(sample_tokens=50, max_tokens=100))
    numbers = small.plan.sample()
    assert small.plan.usable <= 100 < 20 * CONTEXT
    assert 20 < len(numbers) <= 50
    inside = {row for b in small.plan.blocks for row in range(b.start_window * CONTEXT, b.stop_window * CONTEXT)}
    assert set(numbers.tolist()) <= inside
    part = collect_chunk(small.storage, {"sae": small.sae}, small.plan, small.plan.blocks)["sae"]
    kept = [row for row in numbers.tolist() if small.usable[row]]
    assert part.sample.numbers.tolist() == kept
    dense = torch.zeros(len(kept), D_SAE)
    dense[part.sample.row.long(), part.sample.feature.long()] = part.sample.value
    assert torch.equal(dense, small.codes[kept])


def test_blocks_are_spread_evenly(world: World) -> None:
    few = plan_features(world.plan.manifest, FeaturesConfig(max_tokens=60))
    assert [block.index for block in few.blocks] == [0, 3]
    assert few.usable <= 60
    one = plan_features(world.plan.manifest, FeaturesConfig(max_tokens=1))
    assert [block.index for block in one.blocks] == [0]
    assert len(world.plan.chunks(3)) == 3
    assert [b for chunk in world.plan.chunks(3) for b in chunk] == list(world.plan.blocks)


def test_without_a_lens_and_with_another_width(tmp_path: Path, unembedding: Tensor) -> None:
    wide = make_world(tmp_path, d_out=9)
    finish(wide, whole(wide), unembedding)
    row = open_features(wide.storage, "sae").feature(7)
    assert row["pos_ids"] == row["neg_tokens"] == row["logit_hist_heights"] == []
    assert len(row["neighbour_index"]) == 10


def test_reading(world: World, records: FeatureRecords) -> None:
    batches = list(records.batches(16))
    assert [len(features) for features, _ in batches] == [16, 16, 8]
    for features, contexts in batches:
        for feature in features:
            assert feature == records.feature(feature["index"])
            assert contexts[feature["index"]] == records.contexts(feature["index"])
    assert isinstance(records.contexts(9)[0], Context)
    with pytest.raises(NotFoundError, match="has no feature 40; its features are 0 to 39"):
        records.contexts(D_SAE)
    with pytest.raises(NotFoundError, match="run `midiscover features nothing`"):
        open_features(world.storage, "nothing")


def test_damage_is_found(world: World, unembedding: Tensor) -> None:
    finish(world, whole(world), unembedding, name="damaged")
    key = layout.features_file("damaged", features_id(SETTINGS), "contexts.parquet")
    data = bytearray(world.storage.read(key))
    data[len(data) // 2] ^= 1
    world.storage.write(key, bytes(data))
    damaged = open_features(world.storage, "damaged")
    assert damaged.feature(3)["index"] == 3
    with pytest.raises(CorruptError, match="differs from what was written"):
        damaged.contexts(3)


PARALLEL = """
import sys, threading, time
from midiscover.features.records import open_features
from midiscover.store.storage import open_store
storage = open_store(sys.argv[1], create=False)
until = time.monotonic() + 3
while time.monotonic() < until:
    records = open_features(storage, "sae")
    ready = threading.Barrier(6)
    def read(number):
        ready.wait()
        for feature in range(records.d_sae):
            records.rows(["index", "max", "top_tokens"])
            assert records.feature(feature)["index"] == feature
            assert all(len(c.tokens) == len(c.values) for c in records.contexts(feature))
    threads = [threading.Thread(target=read, args=(number,)) for number in range(6)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
print("whole")
"""


def test_several_threads_may_read_at_once(world: World, records: FeatureRecords) -> None:
    """In a process of its own: without the lock pyarrow ends it by a segmentation fault within seconds."""
    done = subprocess.run(
        [sys.executable, "-c", PARALLEL, records.storage.uri], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "whole\n"), done.stderr[-2000:]


def test_rows_have_what_was_said_of_them(world: World, records: FeatureRecords) -> None:
    fired = next(f for f in range(D_SAE) if records.feature(f)["count"])
    assert records.feature(fired)["explanation"] is None
    assert records.rows(["index"]) == [{"index": f} for f in range(D_SAE)]
    said = Explanations(world.storage, "sae", records.features_id, "org/some model", {})
    said.add({fired: {"text": "words about rain", "made": "2026", "detection": {"score": 0.8}}})
    try:
        assert records.explanations == {}, "as it stood when they were opened"
        again = open_features(world.storage, "sae")
        assert again.explanations[fired] == ("words about rain", "org/some model", "2026", 0.8, None)
        row, rows = again.feature(fired), again.rows(["index"])
        assert row["explanation"] == rows[fired]["explanation"] == label(row) == "words about rain"
        assert {**row, "explanation": None} == records.feature(fired)
        assert peaks(row) == label(records.feature(fired)) != "words about rain"
        assert [row for row in rows if row["explanation"] is not None] == [rows[fired]]
        batches = [features for features, _ in again.batches(7)]
        assert [f["explanation"] for some in batches for f in some] == [
            "words about rain" if f == fired else None for f in range(D_SAE)
        ]
    finally:
        world.storage.delete(said.key(0))
