"""hooks.py: what is refused without the table must be what the table refuses, and in its words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from midiscover.config import ModelConfig
from midiscover.errors import ModelError
from midiscover.hooks import HookTable, refuse_impossible
from midiscover.lm import hook_facts
from midiscover.modelfiles import weight_names
from midiscover.models import hook_table, resolve_model
from tests.tiny import KINDS, MLP_OUTPUT, Kind, make_tiny_model


class Family:
    """A tiny model of a family: its config, its weights' names and its full table."""

    def __init__(self, kind: Kind, folder: Path) -> None:
        self.kind, self.folder = kind, make_tiny_model(kind, folder / kind)
        self.config: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        with safe_open(self.folder / "model.safetensors", "pt") as file:
            self.weights: list[str] = list(file.keys())
        self.table: HookTable = hook_table(resolve_model(ModelConfig(id=str(self.folder))))

    def refusal(self, hook: str, weights: list[str] | None = None) -> str | None:
        try:
            weights = self.weights if weights is None else weights
            refuse_impossible([hook], model=self.kind, config=self.config, weights=weights)
        except ModelError as error:
            return str(error)
        return None


@pytest.fixture(scope="module", params=KINDS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIDISCOVER_HOME", str(tmp_path_factory.mktemp("home")))
        return Family(request.param, tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Family:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIDISCOVER_HOME", str(tmp_path_factory.mktemp("home")))
        return Family("llama", tmp_path_factory.mktemp("family"))


def without_prefix(names: list[str]) -> list[str]:
    return [name.partition(".")[2] if name.split(".")[1].isalpha() else name for name in names]


def renamed(names: list[str]) -> list[str]:
    return [name.replace(".mlp.", ".block_sparse_moe.experts.0.") for name in names]


@pytest.mark.parametrize("saved_as", [list, without_prefix, renamed, lambda names: []])
def test_no_hook_of_the_table_is_refused(family: Family, saved_as: Callable[[list[str]], list[str]]) -> None:
    assert len(family.table.hooks) > 60
    assert {":in" in hook for hook in family.table.hooks} == {True, False}
    names = saved_as(family.weights)
    assert [hook for hook in family.table.hooks if family.refusal(hook, names) is not None] == []


def test_wrong_hooks_are_refused_as_the_table_does(family: Family) -> None:
    right = MLP_OUTPUT[family.kind]
    for hook in (right.format(3), right.format(99) + ":in", right.format(0) + "zz", f"x{right.format(1)}", "zzz"):
        assert hook not in family.table.hooks
        refusal = family.refusal(hook)
        assert refusal is not None
        with pytest.raises(ModelError) as by_table:
            family.table.require(hook)
        # Which hooks are nearest may differ: only those with weights are known before the table is made.
        assert refusal.partition("; nearest")[0].partition("; `mid")[0] in str(by_table.value).replace(", try", "; try")
        named = refusal.partition("nearest are ")[2].rstrip(".").split(", ")
        assert set(filter(None, named)) <= set(family.table.hooks)


@pytest.mark.parametrize(
    ("hook", "sentence"),
    [
        ("model.layers.3.mlp", "layer 3 is out of range; llama has layers 0 to 2."),
        ("model.layers.1.mlp.down_prj:in", "nearest are model.layers.1.mlp.down_proj:in, "),
        ("model.layers.99.mlp.down_prj", "nearest are model.layers."),
        ("blocks.1.hook_mlp_out", "has no hook"),
        ("", "has no hook ''"),
        # Each word is the name of a module, but not there.
        ("model.layers.1.self_attn.down_proj", "nearest are model.layers.1.self_attn."),
        ("model.layers.1.down_proj:in", "nearest are model.layers.1.mlp.down_proj:in, "),
        ("layers.1.mlp", "nearest are model.layers.1.mlp, "),
        # Perhaps there, perhaps without weights: the table knows.
        ("model.layers.1.mlp.act_fn", None),
        ("model.layers.1.mlp.down_proj.act_fn", None),
        ("model.layers.01.mlp", None),
    ],
)
def test_what_is_told_without_the_table(llama: Family, hook: str, sentence: str | None) -> None:
    refusal = llama.refusal(hook)
    assert (refusal is None) == (sentence is None)
    assert (sentence or "") in (refusal or "")


def test_a_layer_with_weights_or_of_another_count_is_left_to_the_table(llama: Family) -> None:
    assert llama.refusal("model.layers.3.mlp", [*llama.weights, "model.layers.3.mlp.x.weight"]) is None
    llama.config["vision_config"] = {"num_hidden_layers": 27}
    try:
        assert llama.refusal("model.layers.3.mlp") is None
        assert llama.refusal("model.layers.27.mlp") is not None
    finally:
        del llama.config["vision_config"]


def test_a_family_that_is_not_known_is_left_to_the_table() -> None:
    for config in ({}, {"model_type": "no-such-family"}, {"model_type": "llama", "text_config": {"model_type": "?"}}):
        refuse_impossible(["zzz", "model.layers.99"], model="m", config=config, weights=[])


def test_the_table_has_every_hook_of_the_facts(llama: Family) -> None:
    assert set(hook_facts(llama.folder)["hooks"]) == set(llama.table.hooks)


def test_names_of_weights_come_from_the_index_or_the_header(llama: Family, tmp_path: Path) -> None:
    def reader(folder: Path) -> Callable[[str, int, int | None], bytes]:
        def read(name: str, start: int, length: int | None) -> bytes:
            data = (folder / name).read_bytes()[start:]
            return data if length is None else data[:length]

        return read

    assert sorted(weight_names(reader(llama.folder))) == sorted(llama.weights)
    assert weight_names(reader(tmp_path)) == []
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    assert weight_names(reader(tmp_path)) == []
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a.weight": "1", "b.weight": "2"}}')
    assert weight_names(reader(tmp_path)) == [], "the single file comes first"
    (tmp_path / "model.safetensors").unlink()
    assert weight_names(reader(tmp_path)) == ["a.weight", "b.weight"]
