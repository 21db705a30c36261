"""What the pieces of a plan cost: cores and cards that are shared, memory, and what no card holds; against sums."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from jobs.runtime import Cluster, Node, model_slots, pack_slots
from midiscover import plancosts
from midiscover.cli import main
from midiscover.errors import ConfigError, StageError
from midiscover.memory import FIXED_BYTES, measuring_bytes, training_bytes
from midiscover.plan import Plan, Stage, plan_sweep
from midiscover.plancosts import Costs
from midiscover.rates import StepCost, of_sheet
from midiscover.saeconfig import SAE_KINDS
from midiscover.ways import plan_ways
from midiscover.work import Work
from tests.runs import write_run
from tests.unit.test_plan import RATES, WORK, resolved, stage_seconds

FOUR = replace(RATES, threads=4, starts=dict.fromkeys(RATES.starts, 0.0), load_bytes=1e15, write=1e15)
"""Of a machine with four cores on which nothing waits."""
GPU = replace(RATES, device="GPU", starts=dict.fromkeys(RATES.starts, 0.0), encode=1e-15)
ONE_EPOCH = {"epochs": 1, "batch_size": 128, "lr": 1e-3}


def stage(plan: Plan, name: str) -> Stage:
    (found,) = (one for one in plan.stages if one.name == name)
    return found


def seconds(folder: Path, name: str, **resources: object) -> float:
    return stage_seconds(plan_sweep(resolved(folder, resources=resources), WORK, FOUR, cores=4))[name]


@pytest.mark.parametrize("name", ["harvest", "evaluate"])
def test_language_models_share_the_cores_of_a_machine(tmp_path: Path, name: str) -> None:
    alone = seconds(tmp_path, name)
    assert seconds(tmp_path, name, threads=1) == pytest.approx(alone * 4**0.9)
    # Two of two threads each, and two sites for them.
    assert seconds(tmp_path, name, harvest_actors=2) == pytest.approx(
        alone * 2**0.9 / 2, rel=0.01 if name == "harvest" else 0.1
    )
    assert seconds(tmp_path, "harvest", harvest_actors=4, threads=4) == pytest.approx(
        seconds(tmp_path, "harvest", harvest_actors=4)
    ), "sixteen threads on four cores take turns"


def test_models_that_share_a_card_share_its_speed(tmp_path: Path) -> None:
    def harvest(share: float) -> float:
        run = resolved(tmp_path, resources={"gpus_per_actor": share})
        return stage_seconds(plan_sweep(run, WORK, replace(GPU, load_bytes=1e15, write=1e15), gpus=2))["harvest"]

    assert harvest(0.5) == pytest.approx(harvest(1.0))
    assert harvest(0.6) == pytest.approx(harvest(1.0)), "0.6 of a card fits once on each"


def test_streaming_and_storing_are_held_against_each_other_on_the_same_cores(tmp_path: Path) -> None:
    """With one thread for each process both are as much slower."""

    def model_seconds(**resources: int) -> tuple[float, float]:
        ways = plan_ways(resolved(tmp_path, train=ONE_EPOCH, resources=resources), WORK, FOUR, cores=4)
        live = sum(span.end - span.begin for span in ways["stream"].spans if span.what == "language model")
        return stage_seconds(ways["store"])["harvest"], live

    (stored, streamed), (slow, live) = model_seconds(), model_seconds(threads=1)
    assert (slow / stored, live / streamed) == pytest.approx((4**0.9, 4**0.9))


def test_workers_share_the_tokens_of_a_step_but_not_its_weights(tmp_path: Path) -> None:
    rates = replace(GPU, steps=dict.fromkeys(SAE_KINDS, StepCost(1e-6, 1e-8, 1e-9)))

    def train(workers: int, gpus: int) -> Stage:
        hooks = {"hooks": "model.layers.1.mlp.down_proj", "block_tokens": 1024}
        run = resolved(tmp_path, harvest=hooks, grid={}, resources={"workers": workers})
        return stage(plan_sweep(run, WORK, rates, gpus=gpus), "train")

    steps, rows = 2 * 20_000 // 128, 48
    for workers in (1, 2, 8):
        step = rows * (1e-6 * 96 + 128 / workers * (1e-8 * 96 + 1e-9 * 0.02 * 96))
        assert train(workers, 8).seconds == pytest.approx(steps * step)
    assert train(8, 8).read == 8 * train(1, 8).read, "each reads all rows"


def test_packs_of_workers_take_as_many_cards(tmp_path: Path) -> None:
    rates = replace(GPU, steps=dict.fromkeys(SAE_KINDS, StepCost(1e-6, 0.0)))

    def train(workers: int) -> float:
        run = resolved(tmp_path, grid={"train.seed": [0, 1]}, resources={"workers": workers})  # four packs
        return stage_seconds(plan_sweep(run, WORK, rates, gpus=4))["train"]

    assert train(2) == pytest.approx(2 * train(1))
    assert train(4) == pytest.approx(4 * train(1))


NODES = {1: (1,), 8: (8,), 12: (8, 4), 64: (8,) * 8}
"""Nodes of a plan on so many GPUs, by their cards."""
LAYOUTS = [
    {}, {"gpus_per_pack": 0.3, "gpus_per_actor": 0.25}, {"workers": 4}, {"gpus_per_model": 3}, {"gpus_per_model": 16},
    {"harvest_actors": 100}, {"harvest_actors": 100, "gpus_per_actor": 0.1}, {"workers": 16}, {"pack_size": 1},
]  # fmt: skip


@pytest.mark.parametrize("asked", LAYOUTS)
def test_workers_find_the_places_that_a_sweep_gives_them(tmp_path: Path, asked: dict[str, object]) -> None:
    """And what a sweep refuses, a plan refuses in its words."""
    run = resolved(tmp_path, grid={"train.seed": [0, 1]}, resources=asked)
    for gpus, cards in NODES.items():
        cluster = Cluster(local=False, cores=200, nodes=tuple(Node(200, number) for number in cards))
        costs = Costs(run, WORK, GPU, gpus, 1)
        many = len(costs.packs())
        pairs = [
            (partial(model_slots, cluster, run.config.resources), costs.models),
            (partial(pack_slots, cluster, run.config.resources, many), partial(costs.slots, many)),
        ]
        for slots, places in pairs:
            try:
                count = slots().count
            except StageError as error:
                needs = str(error).partition(";")[0]
                with pytest.raises(ConfigError, match=f"{needs}; a plan on {gpus} GPUs has nodes of"):
                    places()
            else:
                assert places().at_once == count


def test_a_plan_refuses_what_no_sweep_would_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", str(write_run(tmp_path)), "--store", str(tmp_path / "none"), "--gpus", "8"]
    assert main([*command, "--resources.harvest_actors", "100"]) == 2
    assert "The harvest needs 100 workers of 1 CPUs and 1 GPUs" in capsys.readouterr().err


def test_a_small_sae_alone_in_its_pack_leaves_cores_idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pack on two cores. Small SAEs take a core each, and rates are those of as many SAEs as there are cores."""

    def train(count: int) -> float:
        hooks = {"hooks": "model.layers.1.mlp.down_proj", "block_tokens": 1024}
        grid = {"sae.l1_coefficient": list(range(1, count + 1))}
        run = resolved(tmp_path, harvest=hooks, grid=grid, resources={})
        return stage_seconds(plan_sweep(run, WORK, replace(FOUR, threads=2), cores=2))["train"]

    two = train(2)
    assert train(4) == pytest.approx(2 * two)
    assert train(1) == pytest.approx(two / 2 * 2**0.9)
    monkeypatch.setattr(plancosts, "SMALL_BELOW", 1)
    assert (train(1), train(2)) == pytest.approx((two / 2, two)), "large ones take their steps on all cores"


@pytest.mark.parametrize(("gpus", "share"), [(0, 0.12), (1, 0.008)])
def test_a_code_that_is_not_sparse_costs_no_more_for_more_features(tmp_path: Path, gpus: int, share: float) -> None:
    rates = replace(GPU, memory=1e12 if gpus else None, steps=dict.fromkeys(SAE_KINDS, StepCost(0.0, 0.0, 1e-6)))

    def train(k: int) -> float:
        run = resolved(tmp_path, sae={"kind": "topk", "d_sae": 1_000, "k": k}, grid={}, train=ONE_EPOCH)
        return stage_seconds(plan_sweep(run, WORK, rates, gpus=gpus))["train"]

    again = 0 if gpus else 0.5  # the second of two packs
    of_one = 20_000 // 128 * 48 * 128 * 1e-6
    assert train(4) == pytest.approx(again + 2 * of_one * 4)
    assert train(200) == train(500) == pytest.approx(again + 2 * of_one * share * 1_000)


def test_each_pack_of_a_torch_trainer_starts_anew(tmp_path: Path) -> None:
    def starts(gpus: int, **resources: object) -> list[float]:
        run = resolved(tmp_path, grid={"train.seed": [0, 1, 2]}, resources=resources)
        plan = plan_sweep(run, WORK, RATES, gpus=gpus)
        return [round(span.end - span.begin, 6) for span in plan.spans if span.what == "start"]

    assert starts(1) == [4.0] * 6
    assert starts(1, trainer="inline") == starts(0) == [4.0] + [0.5] * 5
    assert starts(0, trainer="ray_train") == [4.0] * 6


def test_what_is_streamed_is_cut_as_the_packs_will_be(tmp_path: Path) -> None:
    """A card that holds the three SAEs of either hook, but not of both: the model reads the text once for each."""
    run = resolved(tmp_path, train=ONE_EPOCH, sae={"d_sae": 20_000}, grid={"sae.l1_coefficient": [1, 2, 3]})
    sizes, model = run.saes[0].sizes, 4 * run.table.parameters
    assert run.config.model.dtype == "float32"
    room = (training_bytes([sizes] * 3) + training_bytes([sizes] * 6)) / 2 + model
    streamed = plan_ways(run, WORK, replace(GPU, memory=room / 0.95), gpus=1)["stream"]
    assert sum(span.what == "language model" for span in streamed.spans) == 2
    cut, measured = streamed.notes
    assert cut == (
        "6 SAEs of 2 hooks are 2 times what a card holds, and for each part the language model reads the text anew"
    )
    assert "where it is measured" in measured
    whole = plan_ways(run, WORK, replace(GPU, memory=1e12), gpus=1)["stream"]
    assert sum(span.what == "language model" for span in whole.spans) == 1
    assert whole.notes == ()
    halved = (training_bytes([sizes] * 6) + model // 2) / 0.95
    notes = plan_ways(run, WORK, replace(GPU, memory=halved), gpus=1)["stream"].notes
    assert notes[0].startswith("6 SAEs of 2 hooks are 2 times what a card holds"), "4 bytes a parameter, not 2"


def test_parts_of_a_stored_pack_read_its_rows_each(tmp_path: Path) -> None:
    run = resolved(tmp_path, sae={"d_sae": 20_000}, grid={"sae.l1_coefficient": [1, 2, 3]})
    sizes = run.saes[0].sizes
    tight = replace(GPU, memory=(training_bytes([sizes] * 2) + 1e6) / 0.95)
    assert stage(plan_sweep(run, WORK, tight, gpus=1), "train").read == 2 * 2 * 20_000 * 2 * 24
    shared = replace(run, config=replace(run.config, resources=replace(run.config.resources, workers=2)))
    half = sizes._replace(batch_size=64)  # each of two workers has half of a batch
    narrow = replace(GPU, memory=(training_bytes([half] * 2) + 1e6) / 0.95)
    cut, measured, left_out = plan_sweep(shared, WORK, narrow, gpus=2).notes
    assert "they are not trained in parts: give resources.pack_size; so it is with 1 more" in cut
    assert "where it is measured" in measured
    told = "what the 2 processes of a pack tell each other in every step is left out of the time"
    assert left_out == told
    wide = replace(GPU, memory=(training_bytes([half] * 3) + 1e4) / 0.95)
    assert plan_sweep(shared, WORK, wide, gpus=2).notes == (measured.replace("are 1.1 GB", "are 1.2 GB"), told)


def test_what_fits_one_pool_is_read_once(tmp_path: Path) -> None:
    def read(**train: int) -> float:
        run = resolved(tmp_path, train={"epochs": 3, "batch_size": 128, "lr": 1e-3} | train)
        return stage(plan_sweep(run, WORK, RATES), "train").read

    once = 2 * 20_000 * 2 * 24
    assert read(shuffle_tokens=20_000) == read(epochs=1, shuffle_tokens=5_000) == once
    assert read(shuffle_tokens=19_999) == 3 * once


def test_what_no_card_holds_is_said(tmp_path: Path) -> None:
    run = resolved(tmp_path, sae={"d_sae": 500_000}, grid={"sae.l1_coefficient": [1]})
    measured, note = plan_sweep(run, WORK, replace(GPU, memory=1.2e9, write=1e15), gpus=1).notes
    logits, model = 2 * 4 * 8 * 32 * run.table.vocab_size, FIXED_BYTES + 4 * run.table.parameters
    there = 4 * 500_000 * 48 + 3.25 * 4 * 4_096 * 500_000 + logits + model
    assert measured == (
        f"an SAE of 500,000 features on model.layers.0.mlp.down_proj needs {there / 1e9:.1f} GB of a card where it is "
        "measured beside the language model, and there are 1.1 GB"
    )
    needed = (training_bytes([run.saes[0].sizes]) / 1e9, 1.2 * 0.95)
    assert (
        "an SAE of 500,000 features on model.layers.0.mlp.down_proj needs {:.1f} GB of a card".format(*needed) in note
    )
    assert "there are 1.1 GB" in note
    small = resolved(tmp_path)
    notes = plan_sweep(small, WORK, replace(GPU, memory=FIXED_BYTES + 1.0), gpus=1).notes
    assert any(note.startswith("the language model needs 1.1 GB of a card, and there are 1.1 GB") for note in notes)


def test_what_ends_in_an_error_is_said(tmp_path: Path) -> None:
    run = resolved(tmp_path, train={"epochs": 2, "batch_size": 6_000, "lr": 1e-3})
    few, enough = (plan_sweep(run, Work(rows, 300, exact=True), RATES).notes for rows in (2_999, 3_000))
    assert few == (
        "the sweep will end in an error: train.batch_size 6000 is more than the 2999 training rows of "
        "model.layers.0.mlp.down_proj give in 2 epochs: lower it, or give more text",
    )
    assert enough == ()
    (note,) = plan_sweep(run, Work(3_000, 0, exact=True), RATES).notes
    assert note.startswith("the sweep will end in an error: the corpus has no held-out window")


def test_a_window_in_which_nothing_can_be_dead_before_a_resampling_is_said(tmp_path: Path) -> None:
    """Of 1,000 rows in two epochs 15 batches of 128, of which 9 come before the last resampling."""

    def notes(window: int | None, control: str = "none") -> tuple[str, ...]:
        train = ONE_EPOCH | {"epochs": 2, "resample_at": [0.2, 0.6], "dead_window": window}
        run = resolved(tmp_path, train=train, grid={"sae.control": [control]})
        return plan_sweep(run, Work(1_000, 300, exact=True), RATES).notes

    (note,) = notes(9 * 128 + 1)
    assert note == (
        "the sweep will end in an error where such SAEs are yet to be trained: train.dead_window is 1153, more than "
        "the 1152 rows before the last of train.resample_at, so that no feature could be resampled: lower it, or leave "
        "one of the two out"
    )
    assert notes(9 * 128) == notes(None) == notes(10**6, "untrained") == ()


def test_checkpoints_that_a_store_would_feel_are_said(tmp_path: Path) -> None:
    """Two SAEs of 96 features in a pack, 110 KB with their moments, and a store that takes 1 MB/s."""

    def notes(every: float, step: float) -> tuple[str, ...]:
        run = resolved(tmp_path, train=ONE_EPOCH | {"checkpoint_every": every})
        return plan_sweep(run, WORK, replace(RATES, steps=dict.fromkeys(SAE_KINDS, StepCost(step, 0.0)))).notes

    size = 12 * 2 * 96 * 48
    (note,) = notes(size / 1.1e5, 1e-6)
    assert note.startswith("checkpoints are left out of time and bytes: 0.0 GB of each pack every 1.00")
    assert notes(size / 0.9e5, 1e-6) == (), "less than a tenth of what a worker writes"
    assert notes(size / 1.1e5, 1e-9) == (), "the pack ends before the first"


def test_another_precision_than_that_of_the_rates_is_said(tmp_path: Path) -> None:
    run = resolved(tmp_path, train=ONE_EPOCH | {"dtype": "bfloat16"})
    (note,) = plan_sweep(run, WORK, RATES).notes
    assert note.startswith("these rates are those of train.dtype float32, and the run has bfloat16,")
    assert note.endswith("`midiscover calibrate` with its settings measures that")
    assert plan_sweep(run, WORK, of_sheet("h200", *run.dtypes), gpus=1).notes == ()


def test_a_step_in_float32_takes_a_gpu_many_times_as_long(tmp_path: Path) -> None:
    def train(dtype: str) -> float:
        run = resolved(tmp_path, train=ONE_EPOCH | {"dtype": dtype}, sae={"d_sae": 20_480})
        rates = replace(of_sheet("h200", *run.dtypes), starts=dict.fromkeys(RATES.starts, 0.0), read=1e15)
        return stage_seconds(plan_sweep(run, WORK._replace(train=50_000_000), rates, gpus=1))["train"]

    assert 2 < train("float32") / train("bfloat16") < 989 / 67


def test_what_takes_no_step_reads_one_pool_and_needs_no_model(tmp_path: Path) -> None:
    control = {"sae.control": ["untrained"]}
    run = resolved(tmp_path, grid=control, train={"epochs": 2, "batch_size": 128, "shuffle_tokens": 5_000})
    assert stage(plan_sweep(run, WORK, RATES), "train").read == 2 * 5_000 * 2 * 24
    live = plan_ways(resolved(tmp_path, grid=control, train=ONE_EPOCH | {"shuffle_tokens": 5_000}), WORK, RATES)[
        "stream"
    ]
    (passed,) = (span.end - span.begin for span in live.spans if span.what == "language model")
    to_hook = run.table.require("model.layers.1.mlp.down_proj").flops_per_token
    assert passed == pytest.approx(5_000 * to_hook / 1e9)
    bare = resolved(tmp_path, evaluate={"ce_tokens": 0})
    evaluate = stage(plan_sweep(bare, WORK, RATES), "evaluate")
    assert evaluate.seconds == pytest.approx(3 + 2 * 4_000 * 2 * 48 * 96 * 1e-10), "a worker starts, and loads no model"
    assert evaluate.host == 2 * 48 * 96 * 4 + 3.25 * 4_096 * 96 * 4


def test_memory_of_each_stage(tmp_path: Path) -> None:
    run = resolved(tmp_path, train=ONE_EPOCH | {"shuffle_tokens": 4_000})
    model, kept, rows = 4 * run.table.parameters, 16 * 2 * 96 * 50, 2 * 8_000 * 24
    step, logits = 4 * 128 * (6 * 96 + 8 * 48), 4 * (2 * 8 + 2) * 32 * run.table.vocab_size
    stored, streamed = (plan_ways(run, WORK, RATES)[way] for way in ("store", "stream"))
    block = 2 * run.config.harvest.block_tokens * 2 * 24
    measured = model + 2 * 48 * 96 * 4 + 3.25 * 4_096 * 96 * 4 + logits
    assert [one.host for one in stored.stages] == [0, model + block, kept + step + rows, measured, 0]
    assert stage(streamed, "train").host == model + 2 * kept + step + 2 * rows
    assert all(one.card == 0 for one in stored.stages)
    aside = resolved(tmp_path, train=ONE_EPOCH | {"shuffle_tokens": 4_000}, resources={})
    both = stage(plan_sweep(aside, WORK, replace(RATES, threads=2), cores=2), "train")
    assert both.host == 2 * (kept + step + rows), "two packs of a thread each"
    one = resolved(tmp_path, train=ONE_EPOCH, resources={}, harvest={"hooks": "model.layers.1.mlp.down_proj"})
    alone = stage(plan_sweep(one, WORK, replace(RATES, threads=2), cores=2), "train")
    assert alone.host == kept + 2 * step + 2 * 20_000 * 24, "two SAEs are stepped side by side"
    shared = resolved(tmp_path, train=ONE_EPOCH, resources={"gpus_per_pack": 0.5, "gpus_per_actor": 0.5})
    cards = [one.card for one in plan_sweep(shared, WORK, GPU, gpus=1).stages]
    assert cards == pytest.approx([0, *(2 * (FIXED_BYTES + size) for size in (model, kept + step, measured)), 0])


def test_every_two_seeds_are_compared(tmp_path: Path) -> None:
    """Two hooks, four seeds of one setting each: six pairs on each hook."""
    run = resolved(tmp_path, grid={"train.seed": [0, 1, 2, 3]})
    report = stage(plan_sweep(run, WORK, RATES), "report")
    assert report.seconds == pytest.approx(5 + 2 * 6 * 96**2 * 24 * 1e-10)


def test_every_two_seeds_of_a_learning_rate_are_compared(tmp_path: Path) -> None:
    """On each of two hooks and at each of three rates: three k in a row for either seed, and three pairs of seeds."""
    grid = {"sae.kind": ["topk"], "sae.k": [8, 16, 32], "train.lr": [1e-3, 3e-4, 1e-4], "train.seed": [0, 1]}
    report = stage(plan_sweep(resolved(tmp_path, grid=grid, sae={"d_sae": 96}), WORK, RATES), "report")
    assert report.flops == 2 * (2 * 3 * (2 * 2 + 3)) * 96**2 * 24


@pytest.mark.parametrize("streamed", [False, True])
def test_saes_are_measured_in_parts_that_fit_a_card(tmp_path: Path, streamed: bool) -> None:
    """Two of three SAEs of a hook fit: one more part has two more spliced passes, and reads the rows once more."""
    coefficients = {"sae.l1_coefficient": [1, 2, 3]}
    run = resolved(tmp_path, train=ONE_EPOCH, sae={"d_sae": 20_000}, grid=coefficients)
    run = replace(run, saes=run.saes[3:])
    assert {sae.point.hook for sae in run.saes} == {"model.layers.1.mlp.down_proj"}
    sizes, model = run.saes[0].sizes, FIXED_BYTES + 4 * run.table.parameters
    tables = 4 * (2 * 8 + 2) * run.config.corpus.context_size * run.table.vocab_size
    tight = replace(GPU, memory=(model + measuring_bytes([sizes] * 2) + tables + 1e3) / 0.95)
    wide = replace(GPU, memory=1e12)
    parts, whole = (
        stage(plan_sweep(run, WORK, rates, gpus=1, streamed=streamed), "evaluate") for rates in (tight, wide)
    )
    assert whole.card - parts.card == 4 * 20_000 * 48
    assert tight.memory is not None
    assert parts.card < tight.memory
    table, hook = run.table, run.table.require("model.layers.1.mlp.down_proj")
    spliced = 2 * 256 * table.flops_per_token - 256 * table.hooks["model.layers.0"].flops_per_token
    more = spliced + (4_000 * hook.flops_per_token if streamed else 0)
    assert parts.flops - whole.flops == pytest.approx(more)
    half = replace(run, config=replace(run.config, resources=replace(run.config.resources, gpus_per_actor=0.5)))
    doubled = replace(tight, memory=2 * tight.memory)
    assert stage(plan_sweep(half, WORK, doubled, gpus=1, streamed=streamed), "evaluate").flops == parts.flops
    on_cpu = stage(plan_sweep(run, WORK, tight, streamed=streamed), "evaluate")
    assert on_cpu.flops == whole.flops


def test_a_warm_up_that_leaves_no_time_for_an_l0_is_said(tmp_path: Path) -> None:
    def notes(warmup: float, target: float | None) -> tuple[str, ...]:
        train = ONE_EPOCH | {"l1_warmup": warmup}
        run = resolved(tmp_path, sae={"d_sae": 96, "target_l0": target}, train=train, grid={})
        return plan_sweep(run, Work(1_000, 300, exact=True), RATES).notes

    (note,) = notes(0.5, 9)
    assert note == (
        "the sweep will end in an error where such SAEs are yet to be trained: train.l1_warmup is 0.5, which leaves "
        "too few steps for sae.target_l0, steered to after it: take 0.4 at most, or leave one of the two out"
    )
    assert notes(0.4, 9) == notes(0.5, None) == ()
