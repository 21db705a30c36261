"""The main job on a small model, as a user runs it: what it leaves, what a second run does, and that ways agree."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from midiscover import load_sae
from tests.jobs_cli import midiscover
from tests.runs import blocks, weights, write_run

pytestmark = [pytest.mark.alone, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def store(folder: Path) -> Path:
    """The store after one whole sweep."""
    done = midiscover("sweep", str(write_run(folder)), "--store", str(folder / "store"), "--tag", "first")
    assert done.code == 0, done.err
    assert "L0" in done.out
    assert "Quality box" in done.out
    assert done.out.strip().endswith("report.html")
    assert "32-token runs of the held-out text left in training: 0" in done.err
    return folder / "store"


def test_a_sweep_leaves_what_the_design_says(store: Path) -> None:
    found = weights(str(store))
    assert len(found) == 4
    for sae_id in found:
        files = {path.name for path in (store / "saes" / sae_id).iterdir()}
        assert files >= {"cfg.json", "sae_weights.safetensors", "sparsity.safetensors", "training.json", "record.json"}
        record = json.loads((store / "saes" / sae_id / "record.json").read_text())
        assert record["metrics"]["ce_recovered"] is not None
        assert 0 < record["metrics"]["fvu"] < 1
        assert record["lineage"]["threads"] == 1
    (sweep,) = (store / "sweeps").iterdir()
    assert {path.name for path in sweep.iterdir()} >= {"sweep.json", "report.html", "frontier.png", "tensorboard"}
    assert not (sweep / "packs").exists() or not any((sweep / "packs").rglob("*.safetensors"))
    assert len(list(sweep.rglob("*tfevents*"))) == 4


def test_the_second_run_does_nothing_and_says_the_same(folder: Path, store: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*.safetensors")}
    again = midiscover("sweep", str(folder / "run.yaml"), "--store", str(store))
    assert again.code == 0, again.err
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*.safetensors")} == before
    assert "tokens/s" not in again.err  # neither a forward pass nor a step
    assert again.seconds < 30


def test_a_finished_sweep_harvests_nothing_again_and_is_told_to_let_go_later(
    folder: Path, store: Path, tmp_path: Path
) -> None:
    copy = str(shutil.copytree(store, tmp_path / "store"))
    line = ("sweep", str(folder / "run.yaml"), "--store", copy)
    assert midiscover(*line, "--resources.keep_activations", "until_done").code == 0
    assert blocks(copy) == {}
    again = midiscover(*line)
    assert again.code == 0, again.err
    assert "tokens/s" not in again.err
    assert blocks(copy) == {}
    assert weights(copy) == weights(str(store))


def test_another_grid_reuses_what_is_there(folder: Path, store: Path) -> None:
    before = weights(str(store))
    done = midiscover(
        "sweep", str(folder / "run.yaml"), "--store", str(store), "--grid.sae.l1_coefficient=[2, 4]", "--name", "more"
    )
    assert done.code == 0, done.err
    after = weights(str(store))
    assert before.items() <= after.items()
    assert len(after) == 6
    assert "starting the language model" not in done.err  # no forward pass for the harvest


@pytest.mark.long
def test_packs_of_one_and_a_ray_train_worker_give_the_same_weights(folder: Path, store: Path) -> None:
    want = weights(str(store))
    for name, flags in {
        "grid": ["--resources.pack_size", "1"],
        "train": ["--resources.trainer", "ray_train"],
    }.items():
        other = folder / f"store-{name}"
        done = midiscover("sweep", str(folder / "run.yaml"), "--store", str(other), *flags)
        assert done.code == 0, done.err
        got = weights(str(other))
        assert len(got) == 4
        assert got.items() <= want.items()
        assert blocks(str(other)) == blocks(str(store))


def test_harvest_alone_then_one_more_hook(folder: Path, store: Path, tmp_path: Path) -> None:
    other = str(tmp_path / "store")
    config = str(folder / "run.yaml")
    first = midiscover("harvest", config, "--store", other, "--harvest.hooks", "model.layers.0.mlp.down_proj")
    assert first.code == 0, first.err
    before = blocks(other)
    second = midiscover("harvest", config, "--store", other)
    assert second.code == 0, second.err
    assert before.items() <= blocks(other).items()
    assert blocks(other) == blocks(str(store))
    third = midiscover("harvest", config, "--store", other)
    assert "the model is not run" in third.err
    # A kill between the last block and the manifests leaves this; the next run declares what stands.
    manifests = list(Path(other).glob("activations/*/*/manifest.json"))
    before_manifests = {path: path.read_bytes() for path in manifests}
    assert len(manifests) == 3
    for path in manifests:
        path.unlink()
    fourth = midiscover("harvest", config, "--store", other)
    assert fourth.code == 0, fourth.err
    assert {path: path.read_bytes() for path in manifests} == before_manifests


def test_one_sae_by_flags_and_phi(folder: Path, tmp_path: Path) -> None:
    """phi-2's code path, with embedding rows beyond the tokenizer's ids, without a YAML file."""
    write_run(tmp_path, kind="phi")
    done = midiscover(
        *("train", "--model", str(tmp_path / "model-phi"), "--hook", "model.layers.1.mlp.fc2", "--l1", "0.5"),
        *("--max-samples", "300", "--epochs", "1", "--batch-size", "64", "--expansion-factor", "8"),
        *("--corpus", str(tmp_path / "text.jsonl"), "--corpus.context_size", "32", "--evaluate.ce_tokens", "64"),
        *("--model.dtype", "float32", "--store", str(tmp_path / "store")),
    )
    assert done.code == 0, done.err
    (sae_id,) = weights(str(tmp_path / "store"))
    assert sae_id.startswith("l1.mlp-fc2.standard-192.l1-0.5.")


def test_saes_load_without_ray_from_id_prefix_folder_and_uri(store: Path) -> None:
    sae_id = sorted(weights(str(store)))[0]
    folder = store / "saes" / sae_id
    plain = load_file(folder / "sae_weights.safetensors")
    x = torch.randn(5, plain["W_enc"].shape[0])
    for source in (sae_id, sae_id[:-4], str(folder)):
        sae = load_sae(source, store=str(store))
        assert sae.record is not None
        features = torch.relu((x - plain["b_dec"]) @ plain["W_enc"] + plain["b_enc"])
        assert torch.allclose(sae.encode(x), features, atol=1e-5)
        assert torch.allclose(sae.decode(features), features @ plain["W_dec"] + plain["b_dec"], atol=1e-5)


def test_the_tracker_tells_what_was_done_and_is_rebuilt_from_the_store(store: Path) -> None:
    listed = json.loads(midiscover("runs", "list", "--store", str(store), "--json").out)
    assert {run["name"] for run in listed} == {"tiny", "more"}
    (sweep,) = (run["id"] for run in listed if run["name"] == "tiny")
    compared = json.loads(midiscover("runs", "compare", sweep, "--store", str(store), "--json").out)
    assert len(compared["saes"]) == 4
    assert {(pair["axis"], pair["hook"]) for pair in compared["stability"]} == {
        ("sparsity", f"model.layers.{layer}.mlp.down_proj") for layer in (0, 1)
    }
    text = midiscover("runs", "compare", sweep, "--store", str(store))
    assert "FVU" in text.out
    shown = midiscover("runs", "show", compared["saes"][0]["sae_id"], "--store", str(store))
    assert compared["saes"][0]["sae_id"] in shown.out
    (store / "tracker.db").rename(store / "old.db")
    assert midiscover("runs", "reindex", "--store", str(store)).code == 0
    again = json.loads(midiscover("runs", "compare", sweep, "--store", str(store), "--json").out)
    assert again == compared
    assert "first" in midiscover("runs", "show", sweep, "--store", str(store)).out


def test_force_makes_the_saes_anew_and_equal(folder: Path, store: Path) -> None:
    before = weights(str(store))
    records = {path: path.read_bytes() for path in store.glob("saes/*/record.json")}
    done = midiscover("sweep", str(folder / "run.yaml"), "--store", str(store), "--force")
    assert done.code == 0, done.err
    assert weights(str(store)) == before
    changed = [path for path, data in records.items() if path.read_bytes() != data]
    assert len(changed) == 4
