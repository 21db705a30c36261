"""SAEs of other makers in a store: imported, they are measured, verified, written down and exported like ours."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs.imports import plan
from midiscover import load_sae
from midiscover.errors import ModelError
from midiscover.launch import parse_import
from midiscover.saes import sae_ids
from midiscover.store.storage import open_store
from midiscover.tracking import Tracker
from tests.jobs_cli import midiscover, refused
from tests.runs import harvested_run
from tests.tiny import make_tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

HOOK = "model.layers.1.mlp.down_proj"
D_IN, D_SAE = 24, 60


class World(NamedTuple):
    root: Path
    config: Path
    store: Path
    """With one SAE of ours, and that which was imported of it."""
    ours: str
    exported: Path
    imported: str


@pytest.fixture(scope="module")
def world(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    sae = {"kind": "jumprelu", "d_sae": D_SAE}
    config = harvested_run(finished, root, harvest={"hooks": HOOK, "block_tokens": 1024}, sae=sae, grid={})
    store, exported = root / "store", root / "Exported SAE"
    done = midiscover("sweep", str(config), "--store", str(store))
    assert done.code == 0, done.err
    (ours,) = sae_ids(open_store(str(store)))
    done = midiscover("export", ours, "--to", "saelens", "--out", str(exported), "--store", str(store))
    assert done.code == 0, done.err
    done = midiscover("import", str(exported), "--from", "saelens", "--config", str(config), "--store", str(store))
    assert done.code == 0, done.err
    return World(root, config, store, ours, exported, done.out.splitlines()[-2])


def record(world: World, sae: str) -> dict[str, Any]:
    return json.loads((world.store / "saes" / sae / "record.json").read_text())


def test_it_computes_and_measures_as_before(world: World) -> None:
    assert world.imported.startswith("imp.exported-sae.")
    ours, back = (load_sae(sae, store=str(world.store)) for sae in (world.ours, world.imported))
    x = torch.randn(64, D_IN, generator=torch.Generator().manual_seed(0)) + ours.module.b_dec
    features = ours.encode(x)
    assert float((features > 0).double().mean()) > 0.01
    assert float((back.encode(x) - features).abs().max()) < 1e-6
    assert float((back.decode(features) - ours.decode(features)).abs().max()) < 1e-6
    before, after = record(world, world.ours), record(world, world.imported)
    # The same model and text have the same held-out rows, so the numbers are the same as well.
    assert after["metrics"] == before["metrics"] | {"dead_in_window_share": None}
    kept = ("hook", "layer", "d_in", "d_sae", "kind", "sae", "config", "evaluation_id")
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    for name in ("model", "corpus", "harvest"):
        assert after["lineage"][name] == before["lineage"][name]
    assert (after["lineage"]["seed"], after["lineage"]["trainer"]) == (None, "imported")
    assert after["imported"]["from"] == "saelens"
    assert after["imported"]["source"] == "Exported SAE"
    assert after["imported"]["midiscover_id"] == world.ours
    assert (after["train"], after["l1"]) == (None, None)


def test_a_second_import_does_nothing(world: World) -> None:
    at = ("--config", str(world.config), "--store", str(world.store))
    done = midiscover("import", str(world.exported), "--from", "saelens", *at)
    assert (done.code, "it was imported already" in done.err) == (0, True), done.err
    assert done.out.splitlines()[-2] == world.imported


def test_everything_else_takes_it_for_one_of_ours(world: World) -> None:
    at = ("--store", str(world.store))
    for command in (
        ("features", world.imported),
        ("feature", "show", world.imported, "0"),
        ("interpret", world.imported, "The river and the lamp."),
        ("concepts", world.imported, "--module", "numbers"),
        ("export", world.imported, "--to", "saelens"),
        ("export", world.imported, "--to", "neuronpedia", "--model-id", "tiny", "--source-set", "imp-mlp"),
        ("export", world.imported, "--to", "bundle"),
        ("runs", "show", world.imported),
        ("runs", "reindex"),
        ("promote", world.imported, "--max-fvu", "100", "--l0", "0..1000", "--max-dead", "1"),
    ):
        done = midiscover(*command, *at)
        assert done.code == 0, (command, done.err)
    done = midiscover("verify", world.imported, "--json", *at)
    report = json.loads(done.out)
    assert (done.code, report["counts"]["fail"]) == (0, 0), report
    skipped = {check["group"] for check in report["checks"] if check["status"] == "skipped"}
    assert skipped <= {"cfg", "saelens"}  # k is of TopK alone; SAELens has its own tests
    with Tracker.for_store(open_store(str(world.store))) as tracker:
        assert tracker.show(world.imported)["status"] == "done"


def seed_file(path: Path, d_in: int = D_IN) -> Path:
    """As the seed project writes it, with the hook and the model in its config."""
    torch.manual_seed(0)
    encoder, decoder = torch.nn.Linear(d_in, D_SAE), torch.nn.Linear(D_SAE, d_in)
    state = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    state |= {f"decoder.{name}": value for name, value in decoder.state_dict().items()}
    config = {"d_model": d_in, "d_hidden": D_SAE, "model_name": "absent/model", "layer_name": HOOK}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model_state_dict": state, "config": config}, path)
    return path


def test_the_seed_projects_file_on_the_builtin_text(world: World) -> None:
    """Into a store of its own, with the model given on the command line and the text made here."""
    file, store = seed_file(world.root / "seed" / "sae_model.pt"), world.root / "seed-store"
    model = str(world.root / "model-llama")
    settings = ("--corpus.max_tokens", "60000", "--corpus.context_size", "32", "--evaluate.ce_tokens", "128")
    done = midiscover(
        "import", str(file), "--from", "seed", "--name", "old", "--model", model, *settings, "--store", str(store)
    )
    assert done.code == 0, done.err
    sae = done.out.splitlines()[-2]
    assert sae.startswith("imp.old.")
    state = torch.load(file, weights_only=True)["model_state_dict"]
    x = torch.randn(20, D_IN, generator=torch.Generator().manual_seed(2))
    features = torch.relu(x @ state["encoder.weight"].T + state["encoder.bias"])
    loaded = load_sae(sae, store=str(store))
    norms = state["decoder.weight"].norm(dim=0)
    assert float((loaded.encode(x) - features * norms).abs().max()) < 1e-6
    reconstruction = features @ state["decoder.weight"].T + state["decoder.bias"]
    assert float((loaded.reconstruct(x) - reconstruction).abs().max()) < 1e-6
    written = json.loads((store / "saes" / sae / "record.json").read_text())
    assert written["lineage"]["corpus"]["source"] == "builtin"
    assert written["imported"] | {"sha256": ""} == {
        "from": "seed",
        "source": "seed",
        "sha256": "",
        "model": "absent/model",
        "hook": None,
    }
    done = midiscover("verify", sae, "--store", str(store))
    assert (done.code, ", 0 failed, " in done.out) == (0, True), done.out


def truncated(folder: Path) -> None:
    file = folder / "sae_weights.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def flipped(folder: Path) -> None:
    file = folder / "sae_weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-9] ^= 4
    file.write_bytes(data)


def narrower(folder: Path) -> None:
    weights = load_file(folder / "sae_weights.safetensors")
    cut = {"W_enc": weights["W_enc"][:20], "W_dec": weights["W_dec"][:, :20], "b_dec": weights["b_dec"][:20]}
    cut["W_dec"] = cut["W_dec"] / cut["W_dec"].norm(dim=1, keepdim=True)
    save_file({name: value.contiguous() for name, value in (weights | cut).items()}, folder / "sae_weights.safetensors")
    (folder / "manifest.json").unlink()
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(cfg | {"d_in": 20}))


def elsewhere(folder: Path) -> None:
    cfg = json.loads((folder / "cfg.json").read_text())
    cfg["metadata"] |= {"hook_name": "blocks.7.hook_mlp_out", "hf_hook_name": "model.layers.7.mlp.down_proj"}
    (folder / "cfg.json").write_text(json.dumps(cfg))


def unchanged(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        (truncated, (), "sae_weights.safetensors can't be read: "),
        (flipped, (), "its sha256 is not the one written beside it"),
        (narrower, (), f"reads activations of width 20, and '{HOOK}' of llama has 24: it belongs to another model"),
        (elsewhere, (), "'blocks.7.hook_mlp_out' is none of llama's module paths"),
        (unchanged, ("--hook", "model.layers.9.mlp"), "layer 9 is out of range"),
        (unchanged, ("--hook", "model.layers.1.mlp.up_proj"), "reads activations of width 24"),
        (unchanged, ("--name", "Not/This"), "--name Not/This can't be part of an id"),
        (unchanged, ("--train.lr", "1"), "--train.lr has no meaning for an import"),
    ],
)
def test_wrong_input_is_told_and_leaves_nothing(
    world: World, tmp_path: Path, change: Callable[[Path], None], more: tuple[str, ...], message: str
) -> None:
    source = shutil.copytree(world.exported, tmp_path / "source")
    change(source)
    store = tmp_path / "store"
    model = make_tiny_model("llama", tmp_path / "llama")
    done = refused("import", str(source), "--from", "saelens", "--model", str(model), *more, "--store", str(store))
    assert (done.code, message in done.err) == (2, True), done.err
    assert done.err.count("\n") == 1, done.err
    assert not store.exists()


def test_a_tokenizer_of_another_model_is_told(world: World, tmp_path: Path) -> None:
    model = make_tiny_model("llama", tmp_path / "llama", extra_rows=-40)
    done = refused(
        "import", str(world.exported), "--from", "saelens", "--model", str(model), "--store", str(tmp_path / "s")
    )
    assert done.code == 2
    assert "has 320 tokens and the model 280 embedding rows: they do not belong together" in done.err
    assert os.listdir(tmp_path) == ["llama"]


def test_a_transcoder_finds_both_of_its_hooks(tmp_path: Path) -> None:
    """By the names of SAELens' metadata, or as they are given; its widths are those of two hooks."""
    model, folder = make_tiny_model("llama", tmp_path / "llama"), tmp_path / "transcoder"
    folder.mkdir()
    wide = 2 * D_IN + 8
    draw = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, wide), "b_dec": (wide,)}
    weights = {name: torch.randn(*shape, generator=draw) for name, shape in shapes.items()}
    save_file(weights, folder / "sae_weights.safetensors")
    cfg = {
        "architecture": "transcoder",
        "d_in": D_IN,
        "d_sae": D_SAE,
        "d_out": wide,
        "dtype": "float32",
        "apply_b_dec_to_input": False,
        "metadata": {
            "sae_lens_version": "6.0.0",
            "model_name": str(model),
            "hook_name": "blocks.1.hook_resid_pre",
            "hook_name_out": "model.layers.1.mlp.up_proj",
            "context_size": 32,
        },
    }
    (folder / "cfg.json").write_text(json.dumps(cfg))
    argv = [str(folder), "--from", "saelens", "--store", str(tmp_path / "none")]
    (sae,) = plan(parse_import(argv)).resolved.saes
    assert (sae.point.hook, sae.output_hook) == ("model.layers.1:in", "model.layers.1.mlp.up_proj")
    assert (sae.d_in, sae.d_sae, sae.d_out) == (D_IN, D_SAE, wide)
    (other,) = plan(parse_import([*argv, "--output-hook", "model.layers.2.mlp.up_proj"])).resolved.saes
    assert (other.output_hook, other.id != sae.id) == ("model.layers.2.mlp.up_proj", True)
    with pytest.raises(
        ModelError, match=f"reconstructs activations of width {wide}, and 'model.layers.1.mlp' of llama has"
    ):
        plan(parse_import([*argv, "--output-hook", "model.layers.1.mlp"]))
