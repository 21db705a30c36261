"""Which language model an SAE of another maker reads: by its name and its revision, there and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs import imports
from midiscover.config import ModelConfig
from midiscover.configio import load_config
from midiscover.errors import ConfigError, ModelError
from midiscover.launch import parse_import
from midiscover.publish.saelens import saelens_hooks
from midiscover.resolve import resolve
from midiscover.sae.registry import make_sae
from midiscover.saes import saelens_cfg
from tests.runs import write_run
from tests.unit.publish.test_importers import random_weights, write_saelens

PYTHIA = "EleutherAI/pythia-70m"


def asked_for(folder: Path, kwargs: Any, monkeypatch: pytest.MonkeyPatch, *more: str) -> tuple[str, str | None]:
    """Id and revision of the model that the import of such an SAE looks for."""
    asked: list[ModelConfig] = []

    def absent(config: ModelConfig, _store: str | None) -> None:
        asked.append(config)
        raise ModelError("absent.")

    monkeypatch.setattr(imports, "resolve_model", absent)
    about = {"sae_lens_version": "6.54.12", "model_name": PYTHIA, "hook_name": "h"}
    source = write_saelens(
        folder, "standard", random_weights("standard"), metadata=about | {"model_from_pretrained_kwargs": kwargs}
    )
    with pytest.raises(ModelError, match="absent"):
        imports.plan(parse_import([str(source), "--from", "saelens", "--store", str(folder / "none"), *more]))
    return asked[0].id, asked[0].revision


def test_the_revision_of_the_source_is_taken_with_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = {"revision": "step1000", "checkpoint_value": None}
    assert asked_for(tmp_path, pinned, monkeypatch) == (PYTHIA, "step1000")
    assert asked_for(tmp_path, pinned, monkeypatch, "--model.revision", "step2") == (PYTHIA, "step2")
    for none in ({}, None, {"torch_dtype": "float32"}):
        assert asked_for(tmp_path, none, monkeypatch) == (PYTHIA, None)
    for flag in ("--model", "--model.id"):
        assert asked_for(tmp_path, pinned, monkeypatch, flag, "lab/other") == ("lab/other", None)


@pytest.mark.parametrize("checkpoint", [{"checkpoint_value": 1000}, {"checkpoint_index": 0}])
def test_a_checkpoint_needs_a_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: dict[str, int]
) -> None:
    ((name, value),) = checkpoint.items()
    with pytest.raises(ConfigError, match=rf"as it was at {name} {value} of its training, .* by --model.revision"):
        asked_for(tmp_path, checkpoint, monkeypatch)
    assert asked_for(tmp_path, checkpoint, monkeypatch, "--model.revision", "step1") == (PYTHIA, "step1")
    assert asked_for(tmp_path, checkpoint, monkeypatch, "--model", "lab/other") == ("lab/other", None)


def test_a_pinned_model_is_named_with_its_commit_and_loaded_by_transformers(tmp_path: Path) -> None:
    resolved = resolve(load_config(write_run(tmp_path)))
    planned, commit = resolved.saes[0], "c" * 40
    of_hub = replace(resolved, model=replace(resolved.model, hub_id=PYTHIA, revision=commit))
    pinned = replace(of_hub, config=replace(of_hub.config, model=replace(of_hub.config.model, revision="step1000")))
    sae = make_sae(planned.point.sae, planned.d_in, planned.d_sae)
    free, told = (saelens_cfg(planned, run, sae, prepend_bos=False)["metadata"] for run in (of_hub, pinned))
    assert free["model_from_pretrained_kwargs"] == {}
    assert told == free | {"model_from_pretrained_kwargs": {"revision": commit}}
    assert told["model_class_name"] == "AutoModelForCausalLM"
    assert saelens_hooks(free, "gpt_neox")["model_class_name"] == "HookedTransformer"  # which knows no commit
    assert saelens_hooks(told, "gpt_neox") == {}
