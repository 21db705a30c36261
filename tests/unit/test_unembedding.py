"""W_U from the files against the one of the loaded model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from midiscover import lm, unembedding
from midiscover.config import ModelConfig
from midiscover.lm import LanguageModel
from midiscover.models import resolve_model
from midiscover.unembedding import read_unembedding
from tests.tiny import KINDS, VOCABULARY, Kind, make_tiny_model


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_loaded_models(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = resolve_model(ModelConfig(id=str(make_tiny_model(kind, tmp_path / kind))))
    loaded = LanguageModel.load(identity, dtype="float32", attention="eager").model.get_output_embeddings().weight
    monkeypatch.delattr(lm, "LanguageModel")  # the files must do
    found = read_unembedding(identity)
    assert found is not None
    assert torch.equal(found, loaded)
    assert found.shape == (VOCABULARY + 12, 24)


def test_a_model_in_several_files(tmp_path: Path) -> None:
    folder = make_tiny_model("phi", tmp_path / "phi")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {"lm_head.weight": "model-00002-of-00002.safetensors"}
    places = {name: files.get(name, "model-00001-of-00002.safetensors") for name in weights}
    for file in set(places.values()):
        held = {name: tensor for name, tensor in weights.items() if places[name] == file}
        save_file(held, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    found = read_unembedding(resolve_model(ModelConfig(id=str(folder))))
    assert found is not None
    assert torch.equal(found, weights["lm_head.weight"])


def test_a_model_with_names_of_its_own_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = resolve_model(ModelConfig(id=str(make_tiny_model("gpt_neox", tmp_path / "model"))))
    expected = read_unembedding(identity)
    monkeypatch.setattr(unembedding, "_OUTPUT", ())
    monkeypatch.setattr(unembedding, "_INPUT", ())
    found = read_unembedding(identity)
    assert found is not None
    assert expected is not None
    assert torch.equal(found, expected)
