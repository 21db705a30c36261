"""Ids change with what changes the numbers, and with nothing else; golden values hold them still across releases."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from midiscover import ids
from midiscover.config import CorpusConfig, EvaluateConfig, HarvestConfig, ModelConfig, RunConfig, SaePoint, TrainConfig
from midiscover.configio import expand_grid, to_tree
from midiscover.saeconfig import SAE_KINDS, UNSTEPPED_CONTROLS, StandardConfig, TopKConfig

FIRST = StandardConfig(l1_coefficient=3.0, initial_density=None)
POINT = SaePoint(hook="model.layers.16.mlp.fc2", sae=FIRST, train=TrainConfig(lr=3e-4, l1_warmup=0.05))
"""An SAE of the first release, in today's settings."""


def corpus(config: CorpusConfig, **changes: str) -> str:
    return ids.corpus_id(config, **({"source_digest": "s", "tokenizer_digest": "t"} | changes))


def harvest(model: ModelConfig, config: HarvestConfig) -> str:
    return ids.harvest_id(model, config, model_digest="m", corpus="c")


def sae(point: SaePoint) -> str:
    return ids.sae_id(point, harvest="h", d_in=2560)


def test_golden_ids() -> None:
    """A release that changes one of these would find none of its users' results again: raise a version on purpose."""
    assert corpus(CorpusConfig()) == "c.82aa0a3fe1"
    assert harvest(ModelConfig(), HarvestConfig()) == "h.226560a9d1"
    assert sae(POINT) == "l16.mlp-fc2.standard-20480.l1-3.82fe8e537d"
    topk = dataclasses.replace(POINT, sae=TopKConfig(k=64, d_sae=100))
    assert sae(topk) == "l16.mlp-fc2.topk-100.k-64.aecf105af5"
    assert ids.evaluation_id(EvaluateConfig()) == "e.4dd9f386f0"
    assert ids.sweep_id("demo", ["a", "b"], "e") == "demo.7643c66837"
    assert ids.pack_id(["a", "b"]) == "p.ed7a4e17ac"


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TrainConfig)])
def test_every_training_setting_but_reports_and_checkpoints_makes_another_sae(name: str) -> None:
    other: dict[str, Any] = {"betas": (0.5, 0.9), "dtype": "bfloat16", "dead_window": 7, "resample_at": (0.5,)}
    other |= dict.fromkeys(("lr_warmup", "lr_decay", "l1_warmup", "retire_after"), 0.5)
    value = other[name] if name in other else getattr(POINT.train, name) + 1
    changed = dataclasses.replace(POINT, train=dataclasses.replace(POINT.train, **{name: value}))
    assert (sae(changed) == sae(POINT)) == (name in ("report_every", "checkpoint_every", "retire_after"))


@pytest.mark.parametrize("kind", list(SAE_KINDS))
def test_every_setting_of_an_architecture_makes_another_sae(kind: str) -> None:
    """Found by field, so that a new setting can't be forgotten; and the id says what the SAE is."""
    base = dataclasses.replace(POINT, sae=SAE_KINDS[kind]())
    name, value = base.sae.sparsity()
    assert sae(base).startswith(f"l16.mlp-fc2.{kind}-20480.{name.lower()}-{value:g}.")
    special: dict[str, Any] = {
        "control": "untrained",
        "decoder": "unit_norm",
        "prefixes": (0.5, 1.0),
        "output_hook": "x",
        "target_l0": 30.0,
        "initial_density": 0.3,
        "threshold_decay": 0.5,
        "k_aux": 9,
        "expansion_factor": 2.0,
        "d_sae": 77,
    }
    for field in dataclasses.fields(base.sae):
        if field.name == "kind":
            continue
        changed = special[field.name] if field.name in special else getattr(base.sae, field.name) + 1
        other = dataclasses.replace(base, sae=dataclasses.replace(base.sae, **{field.name: changed}))
        assert sae(other) != sae(base), field.name


def test_a_learning_rate_left_to_the_recipe_counts_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = dataclasses.replace(POINT, train=TrainConfig())
    before = sae(recipe)
    assert before == "l16.mlp-fc2.standard-20480.l1-3.dfb6862c97"
    monkeypatch.setattr(ids, "RECIPE_VERSION", 10**6)
    assert sae(recipe) != before
    assert sae(POINT) == "l16.mlp-fc2.standard-20480.l1-3.82fe8e537d"


def test_where_resampled_features_begin_counts_where_some_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Golden: those of kinds that begin as at first, and SAEs without resampling, keep the ids that they had."""
    resampled = dataclasses.replace(POINT.train, resample_at=(0.3, 0.6))
    points = [
        dataclasses.replace(POINT, sae=SAE_KINDS[kind](), train=train)
        for kind in ("standard", "gated", "jumprelu")
        for train in (POINT.train, resampled)
    ]
    before = [sae(point) for point in points]
    assert [name.rpartition(".")[2] for name in before] == [
        "bcb7385b54", "3ee0035c89", "8b8a846c50", "ac2a58a919", "98b5ad2925", "6639aeb7ea",
    ]  # fmt: skip
    controls = [
        dataclasses.replace(POINT, sae=SAE_KINDS["jumprelu"](control=control), train=resampled)
        for control in UNSTEPPED_CONTROLS
    ]
    unstepped = [sae(point) for point in controls]
    assert [name.rpartition(".")[2] for name in unstepped] == ["0306be394a", "c2e21ee00b"]
    monkeypatch.setattr(ids, "RESAMPLING_VERSIONS", {"jumprelu": 10**6})
    assert [sae(point) != name for point, name in zip(points, before, strict=True)] == [False] * 5 + [True]
    assert [sae(point) for point in controls] == unstepped


def test_equal_widths_are_one_sae_however_they_are_written() -> None:
    by_width = dataclasses.replace(POINT, sae=dataclasses.replace(FIRST, d_sae=20480))
    by_factor = dataclasses.replace(POINT, sae=dataclasses.replace(FIRST, expansion_factor=8))
    whole = dataclasses.replace(FIRST, l1_coefficient=3)
    assert sae(dataclasses.replace(POINT, sae=whole)) == sae(POINT)  # 3 and 3.0 alike
    assert sae(by_width) == sae(by_factor) == sae(POINT)


def test_hooks_and_batches_are_no_part_of_a_harvest() -> None:
    base = harvest(ModelConfig(), HarvestConfig())
    assert harvest(ModelConfig(), HarvestConfig(hooks=("x", "y"), batch_tokens=64)) == base
    assert harvest(ModelConfig(dtype="float32"), HarvestConfig()) != base
    assert harvest(ModelConfig(), HarvestConfig(block_tokens=64)) != base


def test_a_corpus_is_its_text_its_tokenizer_and_its_cutting() -> None:
    base = corpus(CorpusConfig())
    assert corpus(CorpusConfig(source="another/path")) == base  # the digest counts, not where the text lies
    assert corpus(CorpusConfig(), source_digest="z") != base
    assert corpus(CorpusConfig(), tokenizer_digest="z") != base
    for change in ({"context_size": 64}, {"max_tokens": 5}, {"held_out": 0.2}, {"seed": 1}, {"split": "test"}):
        assert corpus(CorpusConfig(**change)) != base  # type: ignore[arg-type]  # each is of its field's type


def test_sweeps_and_packs_do_not_depend_on_the_order() -> None:
    assert ids.sweep_id("n", ["a", "b"], "e") == ids.sweep_id("n", ["b", "a"], "e") != ids.sweep_id("n", ["a"], "e")
    assert ids.pack_id(["a", "b"]) == ids.pack_id(["b", "a"])


def test_labels_of_hooks() -> None:
    assert ids.hook_label("model.layers.16.mlp.fc2") == "l16.mlp-fc2"
    assert ids.hook_label("transformer.h.3.mlp:in") == "l3.mlp-in"
    assert ids.hook_label("model.layers.7") == "l7.block"
    assert ids.hook_label("model.embed_tokens") == "model-embed_tokens"
    assert (ids.hook_layer("model.layers.16.mlp.fc2"), ids.hook_layer("model.norm")) == (16, None)


def test_canonical_json_is_stable_and_refuses_what_has_no_stable_form() -> None:
    assert ids.canonical_json({"b": [1, 2.5], "a": "ü"}) == '{"a":"\\u00fc","b":[1,2.5]}'
    with pytest.raises(ValueError, match="JSON"):
        ids.canonical_json({"x": math.nan})
    with pytest.raises(TypeError):
        ids.canonical_json({"x": object()})


def records(grid: Any, **train: Any) -> list[dict[str, Any]]:
    """What record.json would hold of each SAE of a grid."""
    run = RunConfig(
        harvest=HarvestConfig(hooks=("model.layers.1.mlp", "model.layers.2.mlp")), grid=grid, train=TrainConfig(**train)
    )
    return [
        {"hook": point.hook, "output_hook": point.hook, "d_sae": point.sae.width(16)}
        | {"sae": to_tree(point.sae), "train": to_tree(point.train)}
        for point in expand_grid(run)
    ]


def test_a_variant_names_what_nothing_else_tells_apart() -> None:
    grid = {"sae.l1_coefficient": (1.0, 5.0), "train.lr": (1e-3, None), "sae.decoder": ("free", "unit_norm")}
    found = records(({**grid, "train.seed": (0, 1)},))
    names = ids.variants(found)
    assert set(names) == {f"decoder {d}, lr {lr}" for d in ("free", "unit_norm") for lr in ("0.001", "null")}
    for record, name in zip(found, names, strict=True):
        decoder, lr = record["sae"]["decoder"], record["train"]["lr"]
        assert name == f"decoder {decoder}, lr {'null' if lr is None else lr}"


def test_a_variant_is_parted_between_its_settings_only() -> None:
    found = records(({"train.betas": ((0.0, 0.999), (0.9, 0.999)), "train.resample_at": ((), (0.3, 0.6))},))
    parted = {tuple(name.split(", ")) for name in ids.variants(found)}
    assert {len(parts) for parts in parted} == {2}
    assert ("betas [0.9,0.999]", "resample_at [0.3,0.6]") in parted


@pytest.mark.parametrize(
    "grid",
    [
        {"sae.l1_coefficient": (1.0, 5.0), "train.seed": (0, 1)},
        {"sae.target_l0": (20.0, 60.0), "sae.expansion_factor": (2, 4)},
        {"sae.kind": ("standard", "gated", "topk"), "sae.control": ("none", "frozen_decoder")},
        [{"sae.l1_coefficient": (1.0,), "train.lr": (1e-3,)}, {"sae.l1_coefficient": (5.0,), "train.lr": (3e-3,)}],
    ],
    ids=["seeds", "widths", "kinds", "pairs"],
)
def test_there_is_no_variant_where_other_names_tell_all(grid: Any) -> None:
    found = records(tuple(grid) if isinstance(grid, list) else (grid,))
    assert len(found) >= 4
    assert ids.variants(found) == [""] * len(found)


def test_a_control_that_takes_no_step_has_no_settings_of_steps() -> None:
    grid = {"sae.control": ("none", "untrained", "frozen_decoder"), "sae.decoder": ("free", "unit_norm")}
    found = records((grid | {"train.lr": (1e-3, 3e-4)},))
    names = {(record["sae"]["control"], name) for record, name in zip(found, ids.variants(found), strict=True)}
    pairs = [(decoder, rate) for decoder in ("free", "unit_norm") for rate in ("0.001", "0.0003")]
    stepped = {(c, f"decoder {d}, lr {rate}") for c in ("none", "frozen_decoder") for d, rate in pairs}
    assert names == stepped | {("untrained", f"decoder {decoder}") for decoder, _ in pairs}


def test_variants_of_one_architecture_are_no_matter_of_another() -> None:
    found = records(({"sae.kind": ("topk",)}, {"train.resample_at": ((), (0.3, 0.6))}))
    older = [record | {"train": {k: v for k, v in record["train"].items() if v != []}} for record in found]
    for given in (found, older):
        names = {(record["sae"]["kind"], name) for record, name in zip(given, ids.variants(given), strict=True)}
        assert ("topk", "") in names
        assert ("standard", "resample_at [0.3,0.6]") in names
    assert ids.variants([{"id": "of another maker"}]) == [""]


def test_a_record_older_than_a_setting_has_the_variant_that_a_later_one_has() -> None:
    later = records(({"sae.decoder": ("free", "unit_norm"), "train.resample_at": ((), (0.3, 0.6))},))
    older = [
        record | {part: {k: v for k, v in record[part].items() if v not in ("free", [])} for part in ("sae", "train")}
        for record in later
    ]
    assert ["decoder" in record["sae"] for record in older] == [False, False, True, True] * 2
    assert ["resample_at" in record["train"] for record in older] == [False, True] * 4
    names = [f"decoder {d}, resample_at {shares}" for d in ("free", "unit_norm") for shares in ("[]", "[0.3,0.6]")]
    assert ids.variants(later) == ids.variants(older) == names * 2
    assert ids.variants([*older[:1], *later[1:]]) == names * 2
