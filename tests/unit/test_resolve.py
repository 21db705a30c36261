"""What a config resolves to: hooks of transcoders, harvests of controls, packs that share a stream."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from midiscover.configio import load_config
from midiscover.errors import ConfigError, ModelError
from midiscover.resolve import Pack, Resolved, auto_pack_size, make_crews, make_packs, pool_tokens, resolve
from tests.runs import write_run


def resolved(folder: Path, **changes: object) -> Resolved:
    return resolve(load_config(write_run(folder, **changes)))


HOOK = "model.layers.1.mlp"


def test_a_transcoder_predicts_the_output_of_the_module_that_it_reads(tmp_path: Path) -> None:
    run = resolved(tmp_path, harvest={"hooks": f"{HOOK}:in"}, sae={"kind": "transcoder"}, grid={})
    (sae,) = run.saes
    assert (sae.point.hook, sae.output_hook) == (f"{HOOK}:in", HOOK)
    assert list(run.hooks) == [f"{HOOK}:in", HOOK]
    assert sae.row()["output_hook"] == HOOK


def test_the_layer_of_a_named_output_is_filled_in(tmp_path: Path) -> None:
    sae = {"kind": "skip_transcoder", "output_hook": "model.layers.{layer}.mlp.down_proj"}
    run = resolved(tmp_path, harvest={"hooks": "model.layers.{0,1}.mlp:in"}, sae=sae, grid={})
    assert [p.output_hook for p in run.saes] == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]


@pytest.mark.parametrize(
    ("sae", "error", "sentence"),
    [
        ({"kind": "transcoder"}, ConfigError, "needs sae.output_hook"),
        ({"kind": "transcoder", "output_hook": "model.layers.9.mlp"}, ModelError, "out of range"),
        ({"kind": "transcoder", "output_hook": "model.layers.0.mlp"}, ConfigError, "fires before"),
        ({"kind": "topk", "k": 1000}, ConfigError, "more than the 96 features"),
        ({"target_l0": 9, "control": "untrained"}, ConfigError, "has no meaning"),
        ({"target_l0": 90}, ConfigError, "more than half of the 96 features"),
        ({"kind": "transcoder", "output_hook": HOOK, "control": "neurons"}, ConfigError, "has no meaning"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    tmp_path: Path, sae: dict[str, object], error: type[Exception], sentence: str
) -> None:
    width = {} if "d_sae" in sae else {"d_sae": 96}
    with pytest.raises(error, match=sentence):
        resolved(tmp_path, harvest={"hooks": HOOK}, sae=width | sae, grid={})


def test_a_random_model_has_a_harvest_of_its_own(tmp_path: Path) -> None:
    run = resolved(tmp_path, grid={"sae.control": ["none", "random_model", "untrained"]})
    trained, shuffled = run.parts()
    assert trained.harvest_id == run.harvest_id != shuffled.harvest_id
    assert (trained.config.model.weights, shuffled.config.model.weights) == ("trained", "shuffled")
    assert {p.point.sae.control for p in trained.saes} == {"none", "untrained"}
    assert {p.point.sae.control for p in shuffled.saes} == {"random_model"}
    assert all(run.part_of(sae).harvest_id == sae.harvest_id for sae in run.saes)
    packs = make_packs(run.saes, None, {sae.id for sae in run.saes})
    assert all(len({sae.harvest_id for sae in pack.saes}) == 1 for pack in packs)
    assert len(resolved(tmp_path).parts()) == 1


@pytest.mark.parametrize(
    "grid",
    [{"sae.d_sae": [48], "sae.expansion_factor": [1, 2]}, {"train.retire_after": [None, 0.5]}],
)
def test_a_grid_that_names_an_sae_twice_is_refused(tmp_path: Path, grid: dict[str, list[object]]) -> None:
    with pytest.raises(ConfigError, match="twice"):
        resolved(tmp_path, grid=grid)


def test_neurons_stand_once_however_many_widths_there_are(tmp_path: Path) -> None:
    run = resolved(tmp_path, grid={"sae.expansion_factor": [4, 8], "sae.control": ["none", "neurons"]}, sae={})
    per_hook = [p.point.sae.control for p in run.saes if p.point.hook == run.saes[0].point.hook]
    assert per_hook.count("neurons") == 1
    assert per_hook.count("none") == 2


def test_one_output_hook_makes_one_transcoder_however_it_is_spelt(tmp_path: Path) -> None:
    ids = set()
    for output in (None, HOOK, "model.layers.{layer}.mlp"):
        sae = {"kind": "transcoder", "output_hook": output}
        ids |= {p.id for p in resolved(tmp_path, harvest={"hooks": f"{HOOK}:in"}, sae=sae, grid={}).saes}
    assert len(ids) == 1


def test_neurons_have_two_features_for_each_dimension(tmp_path: Path) -> None:
    run = resolved(tmp_path, grid={"sae.control": ["none", "neurons"]})
    assert {(p.point.sae.control, p.d_sae // p.d_in) for p in run.saes} == {("none", 4), ("neurons", 2)}


def test_crews_share_a_model_and_its_pools_and_stand_in_the_order_of_their_hooks(tmp_path: Path) -> None:
    hooks = "model.layers.{1,0}.mlp.down_proj"
    grid = {"sae.control": ["none", "random_model"], "train.seed": [0, 1]}
    run = resolved(tmp_path, harvest={"hooks": hooks}, grid=grid)
    packs, order = make_packs(run.saes, None, {sae.id for sae in run.saes}), list(run.table.hooks)
    for count in (1, 4, 7):  # by two models and two seeds; fewer crews can't be
        crews = make_crews(packs, count, order)
        assert [[pack.hook for pack in crew] for crew in crews] == [
            [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
        ] * 4
        for crew in crews:
            assert len({(sae.harvest_id, sae.point.train.seed) for pack in crew for sae in pack.saes}) == 1
    assert [len(crew) for crew in make_crews(packs, 8, order)] == [1] * 8
    assert sorted(pack.id for crew in make_crews(packs, 8, order) for pack in crew) == sorted(pack.id for pack in packs)


def longest_lane(packs: list[Pack], slots: int, reading: int) -> int:
    """Time of the slot that ends last: each free one takes the next pack, which reads all rows while it steps SAEs."""
    lanes = [0] * slots
    for pack in packs:
        lanes[lanes.index(min(lanes))] += max(reading, len(pack.saes))
    return max(lanes)


@pytest.mark.parametrize("groups", [(5,) * 5, (8,) * 15, (3, 2), (10, 1), (1,) * 9, (24, 7, 7, 1), (30,)])
def test_more_slots_never_take_longer(tmp_path: Path, groups: tuple[int, ...]) -> None:
    """Whatever a pass over the rows takes, in steps of an SAE; and no pack that a slot has alone could be smaller."""
    (sae,) = resolved(tmp_path, harvest={"hooks": HOOK}, grid={}).saes
    counts = dict(enumerate(groups))
    saes = [
        replace(sae, id=f"{group}-{n}", harvest_id=str(group)) for group, count in counts.items() for n in range(count)
    ]
    every = {sae.id for sae in saes}
    before = dict.fromkeys((0, 1, 4, 9), 10**6)
    for slots in range(1, sum(groups) + 3):
        packs = make_packs(saes, auto_pack_size(saes, slots), every)
        for reading, least in before.items():
            before[reading] = longest_lane(packs, slots, reading)
            assert before[reading] <= least, (slots, reading)
        cut = [make_packs(saes, size, every) for size in range(1, max(groups) + 1)]
        alone = [max(len(pack.saes) for pack in one) for one in cut if len(one) <= slots]
        assert max(len(pack.saes) for pack in packs) == min(alone, default=max(groups))
    assert before[0] == 1


def test_pairs_take_the_memory_of_rows(tmp_path: Path) -> None:
    (sae,) = resolved(tmp_path, harvest={"hooks": f"{HOOK}:in"}, sae={"kind": "transcoder"}, grid={}).saes
    (other,) = resolved(tmp_path, harvest={"hooks": HOOK}, grid={}).saes
    assert (pool_tokens(sae), pool_tokens(other)) == (500_000, 1_000_000)
