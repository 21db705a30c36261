"""A sweep published as its config says: every format, each verified, imported again, and pushed to a hub."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file, save_file

from midiscover import load_sae
from midiscover.publish.neuronpedia_rules import violations
from tests.hub import hub
from tests.jobs_cli import midiscover, refused
from tests.runs import harvested_run
from tests.venvs import checked, saelens_python

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]

HOOK = "model.layers.1.mlp.down_proj"
NAMES = {"model": "tiny", "release": "tiny-saes"}
FROM_HUB = """
import sys, torch
from safetensors.torch import load_file, save_file
from sae_lens import SAE
given = load_file(sys.argv[3])
with torch.no_grad():
    sae = SAE.from_pretrained(sys.argv[1], sys.argv[2])
    features = sae.encode(given["x"])
save_file({"features": features.contiguous()}, sys.argv[4])
print(type(sae).__name__, sae.cfg.metadata.hook_name)
"""


class World(NamedTuple):
    config: Path
    store: Path
    saes: list[str]


@pytest.fixture(scope="module")
def world(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A sweep of two SAEs with their features, and what its config publishes of them; activations go in between."""
    root = tmp_path_factory.mktemp("publish")
    changes = {"harvest": {"hooks": HOOK, "block_tokens": 1024}, "publish": {"saes": "all", "neuronpedia": NAMES}}
    changes["resources"] = {"threads": 1, "keep_activations": "until_done"}
    config, store = harvested_run(finished, root, **changes), root / "store"
    said = {}
    for verb in ("sweep", "features", "publish"):
        done = midiscover(verb, str(config), "--store", str(store))
        assert done.code == 0, done.err
        said[verb] = done.err
        assert bool(list(store.glob("activations/*/*/*.safetensors"))) == (verb != "sweep")
    assert "of activations removed: resources.keep_activations is until_done" in said["sweep"]
    assert "its activations can't be found in the store and will be made again" in said["features"]
    return World(config, store, sorted(path.name for path in (store / "saes").iterdir()))


def exports(world: World, kind: str) -> list[Path]:
    return [world.store / "saes" / sae / "exports" / kind for sae in world.saes]


def test_every_export_of_every_sae_is_there_and_verifies(world: World) -> None:
    assert len(world.saes) == 2
    for kind in ("saelens", "neuronpedia", "bundle"):
        for folder in exports(world, kind):
            done = midiscover("verify", str(folder))
            assert (done.code, ", 0 failed, " in done.out) == (0, True), done.out
    for folder in exports(world, "neuronpedia"):
        assert violations(folder) == []
    for sae in world.saes:
        done = midiscover("verify", sae, "--store", str(world.store), "--json")
        report = json.loads(done.out)
        assert (done.code, report["counts"]["fail"]) == (0, 0), report
        assert {check["group"] for check in report["checks"] if check["status"] == "skipped"} <= {
            "cfg",
            "weights",
            "saelens",
        }


def test_a_second_run_writes_nothing_and_a_damaged_export_is_made_again(world: World) -> None:
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in world.store.rglob("exports/*/**/*") if path.is_file()}

    before = times()
    assert midiscover("publish", str(world.config), "--store", str(world.store)).code == 0
    assert times() == before
    (lost, _) = exports(world, "saelens")
    (lost / "cfg.json").unlink()
    done = midiscover("verify", str(lost))
    assert (done.code, "there is no cfg.json" in done.out) == (1, True)
    assert midiscover("publish", str(world.config), "--store", str(world.store)).code == 0
    assert midiscover("verify", str(lost)).code == 0


def test_what_is_packed_holds_the_folder_and_the_report(world: World, tmp_path: Path) -> None:
    sae = world.saes[0]
    done = midiscover("verify", sae, "--package", "--visualize", "--out", str(tmp_path), "--store", str(world.store))
    assert done.code == 0, done.err
    with zipfile.ZipFile(tmp_path / f"{sae}.zip") as archive:
        assert archive.testzip() is None
        names = set(archive.namelist())
    wanted = ("cfg.json", "sae_weights.safetensors", "record.json", "verify.json", "verify.md", "density.png")
    assert {f"{sae}/{name}" for name in wanted} <= names
    assert f"{sae}/exports/bundle/feature_analysis.json" in names


def test_a_bundle_is_imported_again(world: World) -> None:
    sae = world.saes[0]
    bundle = exports(world, "bundle")[0]
    done = midiscover(
        *("import", str(bundle), "--from", "seed", "--name", "back"),
        *("--config", str(world.config), "--store", str(world.store)),
    )
    assert done.code == 0, done.err
    ours, back = (load_sae(name, store=str(world.store)) for name in (sae, done.out.splitlines()[-2]))
    x = torch.randn(64, ours.module.d_in, generator=torch.Generator().manual_seed(0)) + ours.module.b_dec
    assert float((back.encode(x) - ours.encode(x)).abs().max()) < 1e-6
    assert float((back.reconstruct(x) - ours.reconstruct(x)).abs().max()) < 1e-6
    shutil.rmtree(world.store / "saes" / done.out.splitlines()[-2])


def test_a_push_arrives_and_saelens_loads_it_from_there(world: World, tmp_path: Path) -> None:
    python = saelens_python()
    with hub() as there:
        there.files["lab/saes"] = {}
        done = midiscover(
            *("publish", str(world.config), "--publish.push", "hf://lab/saes", "--publish.formats", "[saelens]"),
            *("--store", str(world.store)),
            env=there.environment(),
        )
        assert done.code == 0, done.err
        assert done.out.count(f"{there.url}/lab/saes/tree/main/") == 2
        folders = {name.partition("/")[0] for name in there.files["lab/saes"]}
        assert folders == {"README.md", *world.saes}
        card = there.files["lab/saes"][f"{world.saes[0]}/README.md"].decode()
        assert f'SAE.from_pretrained("lab/saes", "{world.saes[0]}")' in card
        sae, x = world.saes[0], torch.randn(32, 24, generator=torch.Generator().manual_seed(0))
        got = [
            hf_hub_download("lab/saes", f"{sae}/{name}", endpoint=there.url, cache_dir=tmp_path / "cache", token=False)
            for name in ("cfg.json", "sae_weights.safetensors")
        ]
        ours, theirs = load_sae(sae, store=str(world.store)), load_sae(str(Path(got[0]).parent))
        assert torch.equal(ours.encode(x), theirs.encode(x))
        save_file({"x": x}, tmp_path / "x.safetensors")
        environment = os.environ | there.environment() | {"HF_HOME": str(tmp_path / "home")}
        words = ["lab/saes", sae, str(tmp_path / "x.safetensors"), str(tmp_path / "f.safetensors")]
        told = checked([str(python), "-I", "-c", FROM_HUB, *words], env=environment)
        assert told.strip().endswith(f"StandardSAE {HOOK}")
        features = load_file(tmp_path / "f.safetensors")["features"]
        assert float((features - ours.encode(x)).abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--publish.formats", "[paper]"), "publish.formats holds 'paper'; known are saelens, neuronpedia, bundle"),
        (("--publish.saes", "l9"), "publish.saes is 'l9', which fits none of the sweep's 2 finished SAEs"),
        (("--publish.neuronpedia.source_set", "one"), "would both be tiny/1-one on Neuronpedia"),
        (("--publish.neuronpedia.source_set", "a.b"), "'a.b' can't be a source set of Neuronpedia"),
        (("--publish.push", "hf://lab/saes"), "A push needs a token of the hub: set HF_TOKEN"),
        (("--publish.push", "lab/saes"), "publish.push must look like hf://org/repo"),
        (("--train.lr", "1"), "--train.lr does not belong to publish"),
    ],
)
def test_bad_input(world: World, tmp_path: Path, arguments: tuple[str, ...], sentence: str) -> None:
    store = shutil.copytree(world.store, tmp_path / "store")
    for folder in store.glob("saes/*/exports"):
        shutil.rmtree(folder)
    environment = {"HF_HOME": str(tmp_path), "HF_TOKEN": ""}
    done = refused("publish", str(world.config), *arguments, "--store", str(store), env=environment)
    assert (done.code, sentence in done.err) == (2, True), done.err
    assert not list(store.glob("saes/*/exports/*"))


def test_one_name_on_neuronpedia_matters_to_no_other_format(world: World, tmp_path: Path) -> None:
    done = midiscover(
        *("publish", str(world.config), "--publish.formats", "[saelens]", "--publish.neuronpedia.source_set", "one"),
        *("--publish.out", str(tmp_path), "--store", str(world.store)),
    )
    assert done.code == 0, done.err
    assert {path.parent.parent.name for path in tmp_path.glob("*/saelens/manifest.json")} == set(world.saes)


def test_features_are_needed_first(world: World, tmp_path: Path) -> None:
    store = shutil.copytree(world.store, tmp_path / "store")
    for folder in (*store.glob("saes/*/exports"), *store.glob("saes/*/features")):
        shutil.rmtree(folder)
    done = refused("publish", str(world.config), "--store", str(store))
    assert (done.code, "are not written down yet; run `midiscover features " in done.err) == (2, True), done.err
    assert not list(store.glob("saes/*/exports/*"))
