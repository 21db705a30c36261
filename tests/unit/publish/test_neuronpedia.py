"""The Neuronpedia export against the importer's rules, each of which is broken once; and what its rows say."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from midiscover.config import NeuronpediaConfig
from midiscover.errors import UserError
from midiscover.features.records import FeatureRecords, open_features
from midiscover.publish.names import checked_model_id, checked_source_set, model_id, neuronpedia_names, source_set
from midiscover.publish.neuronpedia import ModelFacts, NeuronpediaExport
from midiscover.publish.neuronpedia_rules import violations
from tests.unit.features.naive import D_IN, D_SAE, VOCABULARY, finish, make_world, strings, whole

FACTS = ModelFacts(name="microsoft/phi-2", model_type="phi", layers=32, d_model=D_IN, neurons_per_layer=24)
RECORD: dict[str, Any] = {
    "id": "l1.mlp-fc2.standard-40.l1-0.5.0123456789",
    "created": "2026-11-25T10:00:00+00:00",
    "hook": "model.layers.1.mlp.fc2",
    "output_hook": "model.layers.1.mlp.fc2",
    "layer": 1,
    "d_in": D_IN,
    "d_sae": D_SAE,
    "kind": "standard",
    "sae": {"kind": "standard", "l1_coefficient": 0.5, "d_sae": D_SAE},
    "lineage": {"corpus": {"source": "builtin"}, "model": {"name": "microsoft/phi-2"}},
}
CFG = {"architecture": "standard", "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "metadata": {"context_size": 8}}
SOURCE = "v1/phi-2/1-mdc-mlp-40-l1-0p5"


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> FeatureRecords:
    world = make_world(tmp_path_factory.mktemp("store"))

    def odd(ids: list[int]) -> list[str]:
        return [token.replace("<7>", "a\0b").replace("<8>", "\u2028") for token in strings(ids)]

    lens = torch.randn(VOCABULARY, D_IN, generator=torch.Generator().manual_seed(1))
    finish(world, whole(world), lens, strings=odd)
    return open_features(world.storage, "sae")


def export(names: NeuronpediaConfig | None = None) -> NeuronpediaExport:
    return NeuronpediaExport(RECORD, CFG, FACTS, names or NeuronpediaConfig())


@pytest.fixture
def folder(records: FeatureRecords, tmp_path: Path) -> Path:
    for name, data in export().files(records):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path


def rows(folder: Path, table: str) -> list[dict[str, Any]]:
    data = gzip.decompress((folder / SOURCE / table / "batch-0.jsonl.gz").read_bytes()).decode()
    return [json.loads(line) for line in data.rstrip("\n").split("\n")]


def put(folder: Path, table: str, found: list[dict[str, Any]], batch: int = 0) -> None:
    text = "".join(json.dumps(row) + "\n" for row in found)
    (folder / SOURCE / table / f"batch-{batch}.jsonl.gz").write_bytes(gzip.compress(text.encode()))


def test_it_keeps_every_rule(folder: Path) -> None:
    assert violations(folder) == []
    assert {path.name for path in (folder / SOURCE).iterdir()} == {
        *("release.jsonl", "model.jsonl", "sourceset.jsonl", "source.jsonl"),
        *("features", "activations", "explanations"),
    }


def test_rows_say_what_the_records_say(folder: Path, records: FeatureRecords) -> None:
    features, activations = rows(folder, "features"), rows(folder, "activations")
    assert [row["index"] for row in features] == [str(i) for i in range(D_SAE)]
    assert {row["hookName"] for row in features} == {"blocks.1.hook_mlp_out"}
    for row in features:
        mine = records.feature(int(row["index"]))
        assert row["maxActApprox"] == pytest.approx(mine["max"], abs=1e-5)
        assert row["frac_nonzero"] == pytest.approx(mine["firing_rate"], abs=1e-8)
        assert row["pos_values"] == pytest.approx(mine["pos_values"], abs=1e-5)
        assert row["freq_hist_data_bar_heights"] == mine["hist_heights"]
        contexts = [c for c in records.contexts(int(row["index"])) if c.kind != "random"]
        told = [found for found in activations if found["index"] == row["index"]]
        assert len(told) == len(contexts)
        for found, context in zip(told, contexts, strict=True):
            assert found["values"] == pytest.approx(context.values, abs=1e-5)
            assert found["values"][found["qualifyingTokenIndex"]] == pytest.approx(context.value, abs=1e-5)
            assert found["maxValue"] == max(found["values"]) == found["values"][found["maxValueTokenIndex"]]
            assert (found["binMin"] == -1) == (context.kind == "top")
    assert any("a b" in row["tokens"] for row in activations)  # NUL became a space
    assert any("\u2028" in row["tokens"] for row in activations)
    explained = {row["index"] for row in rows(folder, "explanations")}
    assert explained == {row["index"] for row in features if row["maxActApprox"] > 0}


def test_equal_records_give_equal_bytes(records: FeatureRecords) -> None:
    assert dict(export().files(records)) == dict(export().files(records))


def change(table: str, **values: Any) -> Callable[[Path], None]:
    def work(folder: Path) -> None:
        found = rows(folder, table)
        found[1] |= values
        put(folder, table, found)

    return work


def change_single(name: str, **values: Any) -> Callable[[Path], None]:
    def work(folder: Path) -> None:
        path = folder / SOURCE / f"{name}.jsonl"
        path.write_text(json.dumps(json.loads(path.read_text()) | values) + "\n")

    return work


def without(table: str, key: str) -> Callable[[Path], None]:
    def work(folder: Path) -> None:
        found = rows(folder, table)
        del found[1][key]
        put(folder, table, found)

    return work


def twice(table: str) -> Callable[[Path], None]:
    return lambda folder: put(folder, table, [*rows(folder, table), rows(folder, table)[0]])


def cut(folder: Path) -> None:
    path = folder / SOURCE / "features" / "batch-0.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-20])


def many(folder: Path) -> None:
    for batch in range(1, 1002):
        put(folder, "explanations", [], batch)


def elsewhere(folder: Path) -> None:
    put(folder, "activations", rows(folder, "activations"), 3)
    put(folder, "activations", [])


@pytest.mark.parametrize(
    ("breaks", "problem"),
    [
        (change("features", hasVector=True), "hasVector must be false"),
        (change("features", sourceSetName=None), "sourceSetName is missing"),
        (change("features", sourceSetName="other"), "sourceSetName is not the source set"),
        (change("features", index=1), "index must be a text"),
        (change("features", frac_nonzero=float("nan")), "a number is not finite"),
        (change("features", pos_str=["a"], pos_values=[]), "pos_str and pos_values differ in length"),
        (change("features", layer="0-x"), "modelId and layer must name the model and the source"),
        (without("features", "maxActApprox"), "its keys are not those of the first line"),
        (twice("features"), "feature 0 stands twice"),
        (change("activations", tokens=[], values=[]), "values is empty"),
        (change("activations", values=[1.0]), "tokens and values differ in length"),
        (change("activations", id="x"), "id 'x' is not a cuid"),
        (change("activations", maxValue=None), "maxValue is missing"),
        (change("activations", index="999"), "there is no feature 999"),
        (change("activations", dataSource="a\0b"), "a text holds NUL"),
        (twice("activations"), "stands twice"),
        (elsewhere, "belongs into batch 0"),
        (change("explanations", description=None), "description is missing"),
        (change_single("source", saelensConfig=[1]), "saelensConfig of the source must be an object"),
        (change_single("source", setName="other"), "setName of the source is not the name"),
        (change_single("source", modelId="gpt-2"), "modelId of source set or source"),
        (change_single("source", id="1-other"), "the id of the source is not <layer>-<source set>"),
        (change_single("sourceset", releaseName="other"), "releaseName of the source set"),
        (change_single("model", owner=None), "owner is missing"),
        (lambda folder: (folder / SOURCE / "release.jsonl").unlink(), "release.jsonl must hold one JSON object"),
        (lambda folder: (folder / SOURCE / "features" / "batch-0.jsonl.gz").unlink(), "features/ holds no batch"),
        (lambda folder: (folder / SOURCE / "source.jsonl").unlink(), "there is no v1/<model>/<source>/source.jsonl"),
        (cut, "can't be read"),
        (many, "holds 1002 batches"),
    ],
)
def test_each_rule_can_be_broken(folder: Path, breaks: Callable[[Path], Any], problem: str) -> None:
    breaks(folder)
    assert any(problem in found for found in violations(folder)), violations(folder)[:5]


@pytest.mark.parametrize(
    ("hook", "word"),
    [
        ("model.layers.15.mlp.down_proj", "15-mdc-mlp"),  # of the demo
        ("model.layers.16.mlp.fc2", "16-mdc-mlp"),  # of Phi-2
        ("model.layers.3.mlp:in", "3-mdc-mlp"),
        ("model.decoder.layers.3.fc2", "3-mdc-mlp"),
        ("model.layers.3.feed_forward", "3-mdc-mlp"),
        ("model.layers.3.block_sparse_moe", "3-mdc-mlp"),
        ("model.layers.3.shared_mlp", "3-mdc-mlp"),
        ("gpt_neox.layers.3.attention.dense", "3-mdc-attn"),
        ("transformer.h.3.self_attention.dense", "3-mdc-attn"),
        ("model.layers.3.self_attn.o_proj", "3-mdc-attn"),
        ("transformer.h.3.attn.c_proj", "3-mdc-attn"),
        ("model.layers.3.linear_attn", "3-mdc-attn"),
        ("gpt_neox.layers.3", "3-mdc-res"),
        ("model.layers.3:in", "3-mdc-res"),
        ("model.layers.3.post_attention_layernorm", "3-mdc-post-attention-layernorm"),
        ("model.layers.3.mixer", "3-mdc-mixer"),
        ("model.norm", "0-mdc-model-norm"),
        ("transformer.ln_f", "0-mdc-transformer-ln-f"),
    ],
)
def test_a_set_is_named_by_the_part_of_the_model(hook: str, word: str) -> None:
    names = neuronpedia_names(RECORD | {"hook": hook}, "phi-2", NeuronpediaConfig())
    assert names.source == f"{word}-40-l1-0p5"


def test_names() -> None:
    assert model_id("microsoft/phi-2") == "phi-2"
    assert model_id("SmolLM2-135M-Instruct-Q4_1-dequantized") == "smollm2-135m-instruct-q4-1"
    assert model_id("1.. odd--Name_") == "odd-name"
    assert source_set(RECORD | {"d_sae": 20_480}) == "mdc-mlp-20k-l1-0p5"
    assert export(NeuronpediaConfig(model="my-model", source_set="my-set")).folder == "v1/my-model/1-my-set"
    for empty in ("1", "m", "\u043c\u043e\u0434\u0435\u043b\u044c", "org/5000"):
        with pytest.raises(UserError, match=rf"'{empty}', gives no id .* --model-id, or as publish.neuronpedia.model"):
            model_id(empty)
    for wrong in ("Phi", "a", "a--b", "a..b", "phi_2", "x" * 33):
        with pytest.raises(UserError, match="can't be a model of Neuronpedia"):
            checked_model_id(wrong)
    for wrong in ("neurons", "a.b", "A", "a--b"):
        with pytest.raises(UserError, match="can't be a source set of Neuronpedia"):
            checked_source_set(wrong)
