"""The card of an SAE on a hub: what it says the SAE is, and under which licence."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from midiscover.cli.publish import VERBS
from midiscover.config import PublishConfig
from midiscover.errors import ConfigError
from midiscover.publish import export as exports
from midiscover.publish.export import prepare_export, write_export
from midiscover.publish.neuronpedia import ModelFacts
from midiscover.publish.saelens import card
from midiscover.publish.verify import subject_of_folder, verify
from midiscover.store.storage import Storage, open_store
from tests.unit.publish import folders

HOOK = "model.layers.3.mlp"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """With one SAE, of a language model that is not here."""
    folders.write_sae(tmp_path / "store", "standard")
    facts = ModelFacts(name="microsoft/phi-2", model_type="phi", layers=3, d_model=6, neurons_per_layer=24)
    monkeypatch.setattr(exports, "resolve_origin", lambda *_: SimpleNamespace())
    monkeypatch.setattr(exports, "_facts", lambda _: facts)
    return open_store(str(tmp_path / "store"))


def card_of(store: Storage, cfg: dict[str, Any] | None = None, **changes: Any) -> str:
    """The card of that SAE with another record and other metadata, as one line."""
    record, told = (json.loads(store.read(f"saes/{folders.SAE}/{name}")) for name in ("record.json", "cfg.json"))
    told["metadata"] |= {"model_class_name": "AutoModelForCausalLM", "hook_name": HOOK} | (cfg or {})
    sae = record["sae"] | changes.pop("sae", {})
    return " ".join(card(record | {"hook": HOOK, "output_hook": HOOK, "sae": sae} | changes, told, None).split())


def test_an_sae_and_where_it_is_read(store: Storage) -> None:
    told = card_of(store)
    assert "A sparse autoencoder (standard, 40 features) on `model.layers.3.mlp` of microsoft/phi-2, trained by" in told
    assert f"It reads `{HOOK}` in transformers, in SAELens `{HOOK}` of `AutoModelForCausalLM`." in told
    assert "control" not in told.split("## Where it comes from")[0]


def test_a_transcoder_tells_what_it_predicts_and_claims_no_hook_that_nobody_has(store: Storage) -> None:
    of = {"kind": "transcoder", "hook": f"{HOOK}:in", "output_hook": HOOK}
    told = card_of(store, {"hook_name": f"{HOOK}:in", "hook_name_out": HOOK}, **of)
    assert f"A transcoder (transcoder, 40 features) that reads the input of `{HOOK}` and predicts `{HOOK}` of" in told
    assert f"It reads the input of `{HOOK}` in transformers, for which SAELens has no hook." in told
    assert f"It predicts `{HOOK}` in transformers, in SAELens `{HOOK}` of `AutoModelForCausalLM`." in told
    assert ":in" not in told
    lens = {"hook_name": "blocks.3.hook_resid_pre", "hook_name_out": "x", "model_class_name": "HookedTransformer"}
    told = card_of(store, lens, **of | {"hook": "model.layers.3:in"})
    assert "the input of `model.layers.3` in transformers, in SAELens `blocks.3.hook_resid_pre` of `Hooked" in told


@pytest.mark.parametrize(
    ("control", "sentence"),
    [
        ("neurons", "phi-2, measured by miDiscover on builtin. It is a control: its features are the hook's own"),
        ("untrained", "phi-2, measured by miDiscover on builtin. It is a control: it is as it was initialised"),
        ("frozen_decoder", "phi-2, trained by miDiscover on builtin. It is a control: its decoder rows are random"),
        ("random_model", "phi-2 with its weights shuffled, trained by miDiscover on builtin. It is a control: "),
    ],
)
def test_a_control_is_called_one(store: Storage, control: str, sentence: str) -> None:
    assert sentence in card_of(store, sae={"control": control})


def test_a_licence_is_stated_where_one_is_given(store: Storage, tmp_path: Path) -> None:
    free, same, licensed = (
        prepare_export(store, folders.SAE, "saelens", licence=licence) for licence in (None, None, "apache-2.0")
    )
    assert free.made_of == same.made_of != licensed.made_of
    out = open_store(str(tmp_path / "out"))
    for export in (free, licensed):
        write_export(export, out)
        text = (tmp_path / "out" / "README.md").read_text()
        licence = export.licence
        assert yaml.safe_load(text.split("---")[1]).get("license") == licence
        assert ("## Licence\n\n`apache-2.0`.\n" in text) == (licence is not None)
        assert ("None is stated here" in text) == (licence is None)
        (tmp_path / "out" / "LICENSE").write_text("Apache License")  # beside it, as a hub wants it
        assert verify(subject_of_folder(str(tmp_path / "out"))).count("fail") == 0
    assert not write_export(licensed, out).is_new


def test_a_licence_beside_the_export_in_a_store_is_no_fault(store: Storage) -> None:
    prefix = f"saes/{folders.SAE}/exports/saelens"
    write_export(prepare_export(store, folders.SAE, "saelens"), store, prefix)

    def failed() -> list[str]:
        report = verify(subject_of_folder(str(store.local_path(f"saes/{folders.SAE}"))))
        return [found.name for found in report.outcomes if found.status == "fail"]

    before = failed()
    store.write(f"{prefix}/LICENSE", b"Apache License")
    assert failed() == before
    store.write(f"{prefix}/LICENSE.py", b"1")
    assert set(failed()) - set(before) == {"files_are_data", "saelens_export_is_whole"}


@pytest.mark.parametrize("licence", ["", "MIT", "mit\nbase_model: x", "a b", "../x", "-"])
def test_what_is_no_licence(licence: str) -> None:
    with pytest.raises(ValueError, match=r"publish.license must be a hub's short name of a licence, such as mit"):
        PublishConfig(license=licence)
    with pytest.raises(ConfigError, match="--license must be a hub's short name"):
        VERBS["export"](["any", "--to", "saelens", f"--license={licence}"])
    with pytest.raises(ConfigError, match="--license goes with --to saelens"):
        VERBS["export"](["any", "--to", "bundle", f"--license={licence}"])
