"""The bundle against the SAE, its parquet tables and plain loops over them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

from midiscover.config import NeuronpediaConfig
from midiscover.configio import to_tree
from midiscover.features.records import FeatureRecords, open_features
from midiscover.publish.bundle import Bundle, six_digits, top_features
from midiscover.publish.checks_bundle import png_problem
from midiscover.publish.export import Export, write_export
from midiscover.publish.importers import read_seed
from midiscover.publish.neuronpedia import ModelFacts, NeuronpediaExport
from midiscover.publish.verify import subject_of_folder, verify
from midiscover.saeconfig import TranscoderConfig
from midiscover.saes import find_sae, sae_ids
from midiscover.store.local import LocalStorage
from midiscover.store.storage import open_store
from tests.unit.features.naive import D_IN, D_SAE, random_sae
from tests.unit.publish import folders

FACTS = ModelFacts(name="microsoft/phi-2", model_type="phi", layers=32, d_model=D_IN, neurons_per_layer=24)
D_OUT = 4
"""Of a transcoder to another width."""
PICTURES = {"density", "dead", "norms", "frontier", "top_features"}
ROWS = [
    {"sae_id": name, "hook": folders.HOOK, "kind": "standard", "sparsity": 1.0, "l0": l0, "fvu": fvu}
    for name, l0, fvu in (("a", 10.0, 0.4), ("b", 30.0, 0.2))
]


def spelled(ids: list[int]) -> str:
    """Of a tokenizer whose tokens are no characters by themselves."""
    return "|".join(map(str, ids))


class Made(NamedTuple):
    sae: Path
    """The SAE's folder."""
    folder: Path
    """Its bundle."""
    records: FeatureRecords
    export: Export


def make(root: Path, kind: str, rows: list[dict[str, Any]]) -> Made:
    sae = folders.write_sae(root / "store", "standard" if kind == "transcoder" else kind)
    if kind == "transcoder":
        transcode(sae, D_OUT)
    folders.add_features(root / "store", sae)
    storage = open_store(str(root / "store"))
    record, cfg = folders.get_json(sae / "record.json"), folders.get_json(sae / "cfg.json")
    export = Export(
        storage=storage,
        record=record,
        kind="bundle",
        neuronpedia=NeuronpediaExport(record, cfg, FACTS, NeuronpediaConfig()),
        records=open_features(storage, sae.name),
        decode=spelled,
        rows=rows,
        made_of="0123456789",
    )
    write_export(export, open_store(str(root / "bundle")))
    assert export.records is not None
    return Made(sae, root / "bundle", export.records, export)


def transcode(sae: Path, d_out: int) -> None:
    """Make the SAE of a folder a transcoder to another width."""
    weights = random_sae(d_out).state_dict()
    (sae / "sae_weights.safetensors").write_bytes(save({name: value.contiguous() for name, value in weights.items()}))
    cfg, record = folders.get_json(sae / "cfg.json"), folders.get_json(sae / "record.json")
    folders.put_json(sae / "cfg.json", cfg | {"architecture": "transcoder", "d_out": d_out})
    settings = to_tree(TranscoderConfig(d_sae=D_SAE))
    folders.put_json(sae / "record.json", record | {"kind": "transcoder", "sae": settings, "output_hook": "model.out"})
    folders.sign(sae)


@pytest.fixture(scope="module")
def standard(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("standard"), "standard", ROWS)


@pytest.fixture(scope="module")
def jumprelu(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("jumprelu"), "jumprelu", [])


def features(made: Made) -> list[dict[str, Any]]:
    return json.loads((made.folder / "feature_analysis.json").read_text())["features"]


def test_it_verifies_by_itself(standard: Made, jumprelu: Made) -> None:
    for made in (standard, jumprelu):
        report = verify(subject_of_folder(str(made.folder)))
        assert report.kind == "bundle"
        assert [found for found in report.outcomes if found.status == "fail"] == []
        assert report.count("pass") >= 32


def test_that_of_a_transcoder_between_two_widths_verifies(tmp_path: Path) -> None:
    """As the seed project has one width, `d_model` is that of the inputs."""
    made = make(tmp_path, "transcoder", [])
    metadata = folders.get_json(made.folder / "neuronpedia_metadata.json")
    assert (metadata["d_model"], metadata["d_sae"], len(features(made)[0]["decoder_weights"])) == (D_IN, D_SAE, D_OUT)
    found = verify(subject_of_folder(str(made.folder)), ("bundle",))
    assert [outcome for outcome in found.outcomes if outcome.status == "fail"] == []


def test_the_checkpoint_computes_as_the_seed_project_did(standard: Made) -> None:
    """f = relu(W x + b) on raw activations; the reconstruction is decoder.weight f + decoder.bias."""
    found = torch.load(standard.folder / "sae_model.pt", weights_only=True)
    linear, weights = found["model_state_dict"], load_file(standard.sae / "sae_weights.safetensors")
    x = torch.randn(30, D_IN, generator=torch.Generator().manual_seed(1))
    expected = torch.relu((x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"])
    codes = torch.relu(x @ linear["encoder.weight"].T + linear["encoder.bias"])
    torch.testing.assert_close(codes, expected, rtol=1e-6, atol=1e-6)
    decoded = codes @ linear["decoder.weight"].T + linear["decoder.bias"]
    torch.testing.assert_close(decoded, expected @ weights["W_dec"] + weights["b_dec"], rtol=1e-6, atol=1e-5)
    assert linear["encoder.weight"].shape == (D_SAE, D_IN)
    config = found["config"]
    assert (config["d_model"], config["d_hidden"]) == (D_IN, D_SAE)
    assert config["layer_name"] == folders.HOOK
    assert set(found["state_dict"]) == set(weights)
    assert all(torch.equal(found["state_dict"][name], value) for name, value in weights.items())


def test_other_architectures_keep_their_tensors(jumprelu: Made) -> None:
    found = torch.load(jumprelu.folder / "sae_model.pt", weights_only=True)
    assert "threshold" in found["state_dict"]
    assert set(found["model_state_dict"]) == set(found["state_dict"])


def test_it_is_imported_again_to_the_last_digit(standard: Made, jumprelu: Made) -> None:
    for made in (standard, jumprelu):
        back = read_seed(made.folder)
        ours = load_file(made.sae / "sae_weights.safetensors")
        assert set(back.weights) == set(ours)
        assert max(float((back.weights[name] - ours[name]).abs().max()) for name in ours) < 1e-6


def test_the_decoder_array(standard: Made) -> None:
    found = np.load(standard.folder / "decoder_weights.npy", allow_pickle=False)
    decoder = load_file(standard.sae / "sae_weights.safetensors")["W_dec"]
    assert (found.dtype, found.shape) == (np.float32, (D_IN, D_SAE))
    assert np.array_equal(found, decoder.T.numpy())


def test_the_analysis_tells_of_every_feature_what_the_records_do(standard: Made) -> None:
    document = json.loads((standard.folder / "feature_analysis.json").read_text())
    assert {name: document[name] for name in ("d_model", "d_hidden", "layer_name")} == {
        "d_model": D_IN,
        "d_hidden": D_SAE,
        "layer_name": folders.HOOK,
    }
    decoder = load_file(standard.sae / "sae_weights.safetensors")["W_dec"]
    for row in document["features"]:
        index = row["feature_idx"]
        recorded, contexts = standard.records.feature(index), standard.records.contexts(index)
        assert row["max_activation"] == pytest.approx(recorded["max"], rel=1e-5)
        assert row["activation_frequency"] == pytest.approx(recorded["count"] / document["tokens"], rel=1e-5)
        # Over all tokens, as the seed project had it, and not over those on which the feature fires.
        assert row["mean_activation"] == pytest.approx(
            recorded["mean"] * recorded["count"] / document["tokens"], rel=1e-5, abs=1e-12
        )
        top = [context.value for context in contexts if context.kind == "top"]
        assert row["top_activations"] == pytest.approx(top, rel=1e-5)
        assert row["decoder_weights"] == pytest.approx(decoder[index].tolist(), rel=1e-5, abs=1e-9)
        assert row["decoder_norm"] == pytest.approx(1, abs=1e-5)
        assert row["count"] == recorded["count"]
        assert len(row["texts"]) == min(5, len(top))
    assert [row["feature_idx"] for row in document["features"]] == list(range(D_SAE))


def test_the_hundred_best(standard: Made) -> None:
    """Those that a person would look at first: by mean where they fire, rare ones before frequent ones."""
    top = json.loads((standard.folder / "top_100_features.json").read_text())
    rare, frequent = [], []
    for row in features(standard):
        if row["count"] >= 10 and row["activation_frequency"] <= 0.01:
            rare.append(row)
        elif row["count"]:
            frequent.append(row)
    expected = [row["feature_idx"] for rows in (rare, frequent) for row in sorted(rows, key=lambda row: -row["mean"])]
    assert [row["feature_idx"] for row in top] == expected[:100]
    assert [row["rank"] for row in top] == list(range(1, len(top) + 1))
    rows = [{"feature_idx": i, "count": i, "mean": 1.0, "firing_rate": i / 1000} for i in range(300)]
    assert [row["feature_idx"] for row in top_features(rows)] == [10, *range(1, 10), *range(11, 101)]


def test_numbers_have_six_digits() -> None:
    draw = torch.Generator().manual_seed(0)
    values = torch.cat(
        [torch.randn(2000, generator=draw) * 10.0**power for power in range(-12, 13)] + [torch.tensor([0.0, 1.0, -0.5])]
    ).numpy()
    found = six_digits(values)
    digits = [
        len(repr(value).partition("e")[0].replace(".", "").replace("-", "").strip("0")) for value in found.tolist()
    ]
    assert max(digits) <= 6
    expected = np.array([float(f"{value:.6g}") for value in values.tolist()])
    assert np.allclose(found, expected, rtol=1.01e-5, atol=0)  # a tie may go either way
    assert (found == expected).mean() > 0.999


def test_metadata_name_model_and_hook(standard: Made) -> None:
    found = folders.get_json(standard.folder / "neuronpedia_metadata.json")
    assert (found["model_name"], found["modelId"]) == ("microsoft/phi-2", "phi-2")
    assert (found["layer"], found["d_model"], found["d_sae"]) == (folders.HOOK, D_IN, D_SAE)
    assert found["num_features"] == D_SAE
    assert found["active_features"] == sum(row["activation_frequency"] > 0.001 for row in features(standard))
    assert {"release", "model", "sourceset", "source"} <= found.keys()


def test_pictures_can_be_opened_and_show_something(standard: Made, jumprelu: Made) -> None:
    drawn = {path.stem for path in (standard.folder / "visualizations").iterdir()}
    assert drawn <= PICTURES
    assert drawn >= {"density", "dead", "norms", "frontier"}
    # An SAE of no sweep has no frontier to stand on.
    assert "frontier" not in {path.stem for path in (jumprelu.folder / "visualizations").iterdir()}
    for path in (standard.folder / "visualizations").iterdir():
        data = path.read_bytes()
        assert png_problem(data) is None, path.name
        assert min(struct.unpack(">II", data[16:24])) > 200
        assert len(data) > 5000, "an empty sheet is smaller"


def test_equal_records_give_equal_bytes(standard: Made, tmp_path: Path) -> None:
    write_export(standard.export, open_store(str(tmp_path / "again")))
    for path in standard.folder.rglob("*"):
        if path.is_file():
            other = tmp_path / "again" / path.relative_to(standard.folder)
            assert other.read_bytes() == path.read_bytes(), path.name


class Interrupted(Exception):
    pass


def test_an_interrupted_one_is_finished_by_the_next(standard: Made, tmp_path: Path) -> None:
    """Without a manifest it is none; what a later one does not have is removed."""

    class Broken(Bundle):
        def files(self) -> Any:
            for number, file in enumerate(super().files()):
                if number == 4:
                    raise Interrupted
                yield file

    out = LocalStorage(tmp_path)
    export = standard.export
    broken = Broken(export.storage, export.record, standard.records, export.neuronpedia, [])
    with pytest.raises(Interrupted):
        _write(out, export, broken)
    assert not (tmp_path / "manifest.json").exists()
    (tmp_path / "left.tmp.json").write_text("{}")
    done = write_export(export, out)
    assert done.is_new
    assert not (tmp_path / "left.tmp.json").exists()
    assert verify(subject_of_folder(str(tmp_path))).count("fail") == 0
    assert not write_export(export, out).is_new


def test_what_was_put_beside_an_export_outlives_an_interrupted_one(standard: Made, tmp_path: Path) -> None:
    class Broken(Bundle):
        def files(self) -> Any:
            yield "left.tmp.json", b"{}"
            raise Interrupted

    export, out = standard.export, LocalStorage(tmp_path)
    write_export(export, out, "there")
    beside = tmp_path / "there" / "notes" / "mine.md"
    beside.parent.mkdir()
    beside.write_text("mine")
    broken = Broken(export.storage, export.record, standard.records, export.neuronpedia, export.decode, [])
    licence = tmp_path / "there" / "LICENSE"
    for _ in range(2):
        with pytest.raises(Interrupted):
            _write(out, export, broken, "there")
        licence.write_text("free")  # also what a hub wants and is put there meanwhile
        assert (tmp_path / "there" / "unfinished.json").exists()
        assert (tmp_path / "there" / "left.tmp.json").exists()
    assert write_export(export, out, "there").is_new
    assert (beside.read_text(), licence.read_text()) == ("mine", "free")
    assert not list((tmp_path / "there").glob("*.tmp.json"))
    assert not (tmp_path / "there" / "unfinished.json").exists()


def _write(out: LocalStorage, export: Export, bundle: Bundle, prefix: str = "") -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Export, "files", lambda self: bundle.files())
        write_export(export, out, prefix, force=True)


def test_the_copy_of_a_record_in_a_bundle_is_no_sae(tmp_path: Path) -> None:
    """So that the beginning of an id still means one."""
    sae = folders.write_sae(tmp_path / "store", "standard")
    storage = open_store(str(tmp_path / "store"))
    storage.write(f"saes/{sae.name}/exports/bundle/record.json", (sae / "record.json").read_bytes())
    assert sae_ids(storage) == [sae.name]
    assert find_sae(storage, sae.name[:8]) == sae.name
