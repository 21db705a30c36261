"""A plan against arithmetic by hand, its scheduler against its own spans."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest

from midiscover import builtin_text, work
from midiscover.configio import load_config
from midiscover.errors import ConfigError
from midiscover.mixing import Mixed, mix
from midiscover.plan import Plan, plan_sweep
from midiscover.rates import Rates, StepCost
from midiscover.resolve import Resolved, resolve
from midiscover.saeconfig import SAE_KINDS
from midiscover.texts import documents
from midiscover.ways import chosen_way, plan_ways
from midiscover.work import Work, work_of
from tests.runs import write_run

RATES = Rates(
    device="CPU",
    measured="2026-11-26T00:00:00+00:00",
    model_dtype="float32",
    train_dtype="float32",
    model_flops=1e9,
    logits_flops=5e8,
    load_bytes=1e6,
    tokenise=1e4,
    steps=dict.fromkeys(SAE_KINDS, StepCost(1e-8, 1e-10, 1e-9)),
    encode=1e-10,
    write=1e6,
    read=1e9,
    starts={"driver": 1.0, "ray": 2.0, "worker": 3.0, "trial": 4.0, "figures": 5.0},
)
WORK = Work(20_000, 4_000, exact=True)


def resolved(folder: Path, **changes: object) -> Resolved:
    return resolve(load_config(write_run(folder, **changes)))


def stage_seconds(plan: Plan) -> dict[str, float]:
    return {stage.name: stage.seconds for stage in plan.stages}


def not_repeated(run: Resolved) -> float:
    """Seconds of the first block in three of the four spliced passes at the second block's hook, 256 tokens each."""
    return 3 * 256 * run.table.hooks["model.layers.0"].flops_per_token / 1e9


def test_every_stage_is_the_sum_of_its_parts(tmp_path: Path) -> None:
    """Two hooks of width 24, two SAEs of 96 features on each, one core."""
    run = resolved(tmp_path)
    to_hook = run.table.hooks["model.layers.1.mlp.down_proj"].flops_per_token
    load = 2 * run.table.parameters / 1e6
    found = stage_seconds(plan_sweep(run, WORK, RATES))
    assert found["start"] == pytest.approx(1 + 24_000 / 1e4 + 2)
    assert found["harvest"] == pytest.approx(3 + load + max(24_000 * to_hook / 1e9, 24_000 * 2 * 2 * 24 / 1e6))
    step = 48 * (1e-8 * 96 + 128 * (1e-10 * 96 + 1e-9 * 0.02 * 96))
    pack = 2 * (2 * 20_000 // 128) * step
    assert found["train"] == pytest.approx(4 + pack + 0.5 + pack)
    encoding = (4_000 + 256) * 2 * 48 * 96 * 1e-10
    spliced = 4 * 256 * run.table.flops_per_token / 5e8
    assert found["evaluate"] == pytest.approx(3 + 2 * (load + encoding + spliced) - not_repeated(run))
    assert found["report"] == pytest.approx(5 + 2 * 96**2 * 24 * 1e-10)


def test_a_streamed_sweep_runs_one_model_beside_all_packs(tmp_path: Path) -> None:
    run = resolved(tmp_path, train={"epochs": 1, "batch_size": 128, "lr": 1e-3})
    ways = plan_ways(run, WORK, RATES)
    stored, streamed = ways["store"], ways["stream"]
    load, to_hook = 2 * run.table.parameters / 1e6, run.table.hooks["model.layers.1.mlp.down_proj"].flops_per_token
    assert [stage.name for stage in streamed.stages] == ["start", "train", "evaluate", "report"]
    packs = stage_seconds(stored)["train"] - 4 - 0.5
    assert stage_seconds(streamed)["train"] == pytest.approx(4 + load + 20_000 * to_hook / 1e9 + packs)
    first = run.table.hooks["model.layers.0.mlp.down_proj"].flops_per_token
    held_out = 4_000 * (first + to_hook) / 1e9
    assert stage_seconds(streamed)["evaluate"] == pytest.approx(stage_seconds(stored)["evaluate"] + held_out)
    saes = 4 * 4 * 96 * 48  # float32
    assert [(stage.written, stage.read) for stage in streamed.stages] == [(0, 0), (saes, 0), (0, 0), (0, 0)]
    assert [stage.written for stage in stored.stages] == [0, 24_000 * 2 * 2 * 24, saes, 0, 0]


def test_the_settings_or_the_quicker_way_are_taken(tmp_path: Path) -> None:
    def chosen(activations: str, rates: Rates, **train: object) -> str:
        run = resolved(
            tmp_path, resources={"activations": activations}, train={"epochs": 1, "batch_size": 128, "lr": 1e-3} | train
        )
        return chosen_way(run, plan_ways(run, WORK, rates))

    slow_store = replace(RATES, write=1e4, read=1e4)
    assert [chosen(way, slow_store) for way in ("store", "stream", "auto")] == ["store", "stream", "stream"]
    # Where the model is slow and the store is quick, its second pass over the held-out text is what counts.
    slow_model = replace(RATES, starts=dict.fromkeys(RATES.starts, 0.0), load_bytes=1e12, write=1e12, model_flops=1e6)
    assert chosen("auto", slow_model) == "store"
    assert chosen("stream", RATES, epochs=2) == "stream", "everything fits into one pool"
    assert chosen("auto", slow_store, epochs=2, shuffle_tokens=5_000) == "store"
    with pytest.raises(ConfigError, match="train.epochs is 2, and 20,000 rows are more than train.shuffle_tokens"):
        chosen("stream", RATES, epochs=2, shuffle_tokens=5_000)


def test_a_way_that_ram_does_not_hold_is_left_out_and_said_so(tmp_path: Path) -> None:
    """Streaming is quicker here, and holds the rows of both hooks; storing holds those of one at a time."""
    slow_store = replace(RATES, write=1e4, read=1e4)
    work = Work(200_000, 4_000, exact=False)
    settings = {"train": {"epochs": 1, "batch_size": 128, "lr": 1e-3}}
    run = resolved(tmp_path, resources={"activations": "auto"}, **settings)
    ways = plan_ways(run, work, slow_store)
    rows = 200_000 * 2 * 24
    assert ways["stream"].host > 2 * rows > ways["store"].host > rows
    room = ways["stream"].host - 1
    short = plan_ways(run, work, slow_store, memory=room)
    assert [chosen_way(run, short, memory) for memory in (room, room + 1, 1)] == ["store", "stream", "store"]
    (note,) = short["store"].notes
    assert note == "activations: stream takes 0.0 GB of RAM, and there are 0.0 here"
    assert short["stream"].notes == (note,)
    assert ways["store"].notes == ways["stream"].notes == ()
    asked = resolved(tmp_path, resources={"activations": "store"}, **settings)
    assert plan_ways(asked, work, slow_store, memory=room)["store"].notes == (), "nobody asks for the other"
    on_cards = plan_ways(run, work, replace(slow_store, memory=1e12), gpus=2, memory=1)
    assert [note for note in on_cards["store"].notes if "stream takes" in note] == [
        "activations: stream takes 0.0 GB of RAM for each card, and there are 0.0 here"
    ]


def test_a_slow_store_is_named_as_what_bounds_the_harvest(tmp_path: Path) -> None:
    run = resolved(tmp_path)
    slow = plan_sweep(run, WORK, replace(RATES, write=1e4))
    (harvest,) = (stage for stage in slow.stages if stage.name == "harvest")
    assert harvest.bound == "the store"
    assert harvest.written == 24_000 * 2 * 2 * 24
    assert slow.bottleneck is harvest
    limited = plan_sweep(run, WORK, RATES, bandwidth=1e4)
    assert stage_seconds(limited)["harvest"] == pytest.approx(harvest.seconds)


def test_what_most_of_a_stage_goes_to_is_named(tmp_path: Path) -> None:
    run = resolved(tmp_path, train={"epochs": 1, "batch_size": 128, "lr": 1e-3})
    quick = replace(RATES, load_bytes=1e15, starts=dict.fromkeys(RATES.starts, 0.0))

    def bound(name: str, streamed: bool = False, **rates: float) -> str:
        plan = plan_sweep(run, WORK, replace(quick, **rates), streamed=streamed)
        return next(stage.bound for stage in plan.stages if stage.name == name)

    assert bound("evaluate") == "the spliced language model"
    assert bound("evaluate", encode=1e-6) == "encoding"
    assert bound("evaluate", streamed=True, model_flops=1e6, logits_flops=1e12) == "the language model"
    # Three packs on two cards: what the one with two of them waits for, and not the mean of both.
    three = resolved(tmp_path, harvest={"hooks": "model.layers.1.mlp.down_proj"}, grid={"train.seed": [0, 1, 2]})
    steps = 2 * 20_000 // 128 * 48 * (1e-8 * 96 + 128 * (1e-10 * 96 + 1e-9 * 0.02 * 96))
    for factor, why in ((1.1, "the store"), (0.9, "the SAEs' steps")):
        slow = replace(quick, device="GPU", read=20_000 * 2 * 24 / (factor * steps))
        plan = plan_sweep(three, WORK, slow, gpus=2)
        assert stage_seconds(plan)["train"] == pytest.approx(2 * steps * max(1, factor))
        assert next(stage.bound for stage in plan.stages if stage.name == "train") == why


def test_gpus_share_models_packs_and_sites(tmp_path: Path) -> None:
    run = resolved(tmp_path, grid={"train.seed": [0, 1]})  # four packs of one SAE
    one, two, eight = (plan_sweep(run, WORK, replace(RATES, device="GPU"), gpus=count) for count in (1, 2, 8))
    assert (one.packs, two.packs) == (4, 4)
    first, second = stage_seconds(one), stage_seconds(two)
    pack = first["train"] / 4 - 4  # a TorchTrainer starts anew for each
    assert second["train"] == pytest.approx(2 * (4 + pack))
    assert stage_seconds(eight)["train"] == pytest.approx(4 + pack)
    load = 3 + 2 * run.table.parameters / 1e6
    assert second["harvest"] - load == pytest.approx((first["harvest"] - load) / 2)
    assert first["evaluate"] - 3 == pytest.approx(2 * (second["evaluate"] - 3) - not_repeated(run))


def test_packs_that_share_a_card_share_its_speed(tmp_path: Path) -> None:
    def train(share: float, gpus: int) -> float:
        run = resolved(tmp_path, grid={"train.seed": [0, 1]}, resources={"gpus_per_pack": share})  # four packs
        return stage_seconds(plan_sweep(run, WORK, rates, gpus=gpus))["train"]

    rates = replace(RATES, device="GPU", steps=dict.fromkeys(SAE_KINDS, StepCost(1e-6, 1e-10, 1e-9)))
    pack = train(1, 4) - 4
    assert pack > 1
    assert train(0.5, 1) == pytest.approx(2 * (4 + 2 * pack))
    assert train(0.25, 1) == pytest.approx(4 + 4 * pack)
    assert train(0.6, 2) == pytest.approx(train(1, 2)), "0.6 of a card fits once on each"
    assert train(0.6, 2) == pytest.approx(2 * (4 + pack))


def test_no_worker_does_two_things_at_once_and_no_stage_ends_before_its_spans(tmp_path: Path) -> None:
    run = resolved(tmp_path, grid={"train.seed": [0, 1, 2], "sae.control": ["none", "random_model"]})
    plan = plan_sweep(run, WORK, RATES, gpus=3)
    assert [stage.name for stage in plan.stages] == ["start", "harvest", "harvest", "train", "evaluate", "report"]
    for _, spans in groupby(sorted(plan.spans, key=lambda one: (one.lane, one.begin)), lambda one: one.lane):
        ends = 0.0
        for span in spans:
            assert span.begin >= ends - 1e-9
            ends = span.end
    assert max(span.end for span in plan.spans) == pytest.approx(plan.seconds)


def test_an_unstepped_control_takes_no_time_to_train(tmp_path: Path) -> None:
    trained, both = (
        plan_sweep(resolved(tmp_path, grid={"sae.control": controls}), WORK, RATES)
        for controls in (["none"], ["none", "untrained"])
    )
    assert stage_seconds(trained)["train"] == pytest.approx(stage_seconds(both)["train"])


def test_more_than_a_card_holds_is_said(tmp_path: Path) -> None:
    tight = replace(RATES, memory=1.2e9)
    plan = plan_sweep(resolved(tmp_path, sae={"d_sae": 20_000}), WORK, tight, gpus=1)
    assert "2 SAEs of model.layers.0.mlp.down_proj are 2 times what a card holds" in plan.notes[0]


def test_few_long_documents_are_counted_on_the_side_that_each_falls_to(tmp_path: Path) -> None:
    texts = [f"{number} " + "word " * 839 for number in range(10, 32)]  # 4,198 characters
    (tmp_path / "long.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    given = {"source": str(tmp_path / "long.jsonl"), "max_tokens": 12_500, "held_out": 0.3, "seed": 4}
    draws = [int(hashlib.sha256(f"4\n{text}".encode()).hexdigest()[:16], 16) / 2**64 for text in texts]
    held_out = sum(1000 * (draw < 0.3) for draw in draws[:12]) + 500 * (draws[12] < 0.3)
    assert 1500 < held_out < 5000
    expected = Work(12_500 - held_out, held_out, exact=False)
    assert work_of(resolved(tmp_path, corpus=given), None) == expected
    short = work_of(resolved(tmp_path, corpus=given | {"max_tokens": 999_999}), None)
    assert short.train + short.held_out == 22_000


def test_documents_that_are_counted_come_in_the_order_of_the_mix(tmp_path: Path) -> None:
    """Of the built-in text's parts one has few long documents and the other many short ones."""
    run = resolved(tmp_path, corpus={"source": "builtin", "max_samples": 1500, "context_size": 32})
    numbers = itertools.count()

    def tokenizer(batch: list[str], **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[next(numbers) for _ in range(round(len(text) / 4.2))] for text in batch]}

    parts = dict(zip(run.source.parts, documents(run.config.corpus, run.source), strict=True))
    mixed = list(mix(parts, run.config.corpus, tokenizer, Mixed()))  # type: ignore[arg-type]
    assert len({document.part for document in mixed[:400]}) == len({document.part for document in mixed}) == 2
    expected = {split: sum(len(one.ids) for one in mixed if one.split == split) for split in ("train", "held_out")}
    assert work_of(run, None) == Work(**expected, exact=False)


def test_a_text_that_ends_before_its_limit_has_its_own_size(tmp_path: Path) -> None:
    def total(**limits: int) -> int:
        source = {"source": str(tmp_path / "text.jsonl"), "context_size": 32}
        found = work_of(resolved(tmp_path, corpus=source | limits), None)
        return found.train + found.held_out

    whole = total(max_samples=10_000)
    characters = sum(len(json.loads(line)["text"]) for line in (tmp_path / "text.jsonl").read_text().splitlines())
    assert whole == pytest.approx(characters / 4.2, rel=1e-3)
    assert total() == total(max_tokens=5_000_000) == whole
    assert total(max_tokens=whole - 100) == whole - 100


def test_no_more_tokens_are_planned_than_a_text_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def total(source: object, **limits: int) -> int:
        given = {"source": str(source), "context_size": 32, "max_tokens": 1_000_000_000}
        found = work_of(resolved(tmp_path, corpus=given | limits), None)
        return found.train + found.held_out

    builtin = builtin_text.texts("builtin")
    assert total("builtin") == pytest.approx(sum(len(text) for part in builtin for text in part) / 4.2, rel=1e-3)
    assert total("builtin", max_tokens=1_010_000) == 1_010_000, "more than a text of one's own is read for"
    monkeypatch.setattr(work, "READ_BELOW", 1_000)
    folder = tmp_path / "own"
    folder.mkdir()
    text = "word " * 4_200
    (folder / "a.txt").write_text(text)
    (folder / "b.txt").write_text(text)
    assert total(folder) == 10_000
    assert total(folder, max_tokens=9_999) == 9_999
    with gzip.open(folder / "c.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": text}) + "\n")
    assert 10_000 < total(folder) < 11_000


def test_the_text_is_counted_by_its_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "READ_BELOW", 0)
    assert work_of(resolved(tmp_path), None) == Work(21_600, 2_400, exact=False)
    source = {"source": str(tmp_path / "text.jsonl"), "context_size": 32}
    few = work_of(resolved(tmp_path, corpus=source | {"max_samples": 10}), None)
    many = work_of(resolved(tmp_path, corpus=source | {"max_samples": 20}), None)
    assert 1.8 < many.train / few.train < 2.2
    with pytest.raises(ConfigError, match="give corpus.max_tokens"):
        work_of(resolved(tmp_path, corpus=source), None)
