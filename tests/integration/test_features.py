"""Feature records of a small sweep, as a user makes and reads them; and a driver that is killed half-way."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from midiscover import load_sae
from midiscover.features.records import CONTEXTS, FEATURES, open_features
from midiscover.interpret import load_language_model, start_token
from midiscover.publish.neuronpedia_rules import violations
from midiscover.store.storage import open_store
from midiscover.tracking import Tracker, reindex
from tests.faults.test_kills import kill_driver, wait_for
from tests.jobs_cli import command, environment, midiscover, refused
from tests.runs import copied_run, write_run
from tests.unit.tracking import samples

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

PARTS = "saes/*/features/*/parts/*.safetensors"


@pytest.fixture(scope="module")
def folder(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of four SAEs, and the features of all of them."""
    folder = tmp_path_factory.mktemp("features")
    copied_run(finished, folder)
    return folder


@pytest.fixture(scope="module")
def store(folder: Path) -> Path:
    return folder / "store"


def files(store: Path) -> dict[str, bytes]:
    paths = sorted(path for name in (FEATURES, CONTEXTS) for path in store.glob(f"saes/*/features/*/{name}"))
    return {str(path.relative_to(store)): path.read_bytes() for path in paths}


def test_every_sae_has_records_and_no_part_is_left(store: Path) -> None:
    saes = sorted(path.name for path in (store / "saes").iterdir())
    assert len(saes) == 4
    assert not list(store.rglob("parts/*.safetensors"))
    for sae in saes:
        records = open_features(open_store(str(store)), sae)
        table = records.table()
        assert len(table) == records.d_sae
        assert max(table["count"].to_pylist()) > 0
        # More embedding rows than ids: they are in the lens, under a name of their own.
        tokens = {
            token
            for lists in (table["pos_tokens"], table["neg_tokens"])
            for line in lists.to_pylist()
            for token in line
        }
        assert "<|outofrange|>" in tokens


def test_the_tracker_has_the_scalars(store: Path, tmp_path: Path) -> None:
    told = samples.dump(f"sqlite:///{store / 'tracker.db'}")["features"]
    assert len(told) == sum(len(pq.read_table(path)) for path in store.glob(f"saes/*/features/*/{FEATURES}"))
    with Tracker.open(f"sqlite:///{tmp_path / 'fresh.db'}") as fresh:
        assert reindex(open_store(str(store)), fresh).features == 4
    assert samples.dump(f"sqlite:///{tmp_path / 'fresh.db'}")["features"] == told


def test_controls_and_activations_that_are_gone(tmp_path: Path) -> None:
    """What was read can be had again from an SAE's own record, of the real model and of the shuffled one."""
    write_run(
        tmp_path,
        harvest={"hooks": "model.layers.1.mlp.down_proj", "block_tokens": 1024},
        grid={"sae.control": ["none", "neurons", "random_model"]},
        train={"epochs": 1, "batch_size": 128, "lr": 1e-3},
        evaluate={"ce_tokens": 0},
    )
    store = tmp_path / "store"
    done = midiscover("sweep", str(tmp_path / "run.yaml"), "--store", str(store))
    assert done.code == 0, done.err
    words = ("features", next((store / "sweeps").iterdir()).name, "--store", str(store))
    done = midiscover(*words)
    assert done.code == 0, done.err
    before = files(store)
    assert len(before) == 6
    for sae in (path.name for path in (store / "saes").iterdir()):
        tokens = open_features(open_store(str(store)), sae).table(["pos_tokens"])["pos_tokens"].to_pylist()
        assert {len(line) for line in tokens} == {0 if "random-model" in sae else 10}
    for gone in ("corpora", "activations"):
        shutil.rmtree(store / gone)
    done = midiscover(*words, "--force")
    assert done.code == 0, done.err
    assert "its activations can't be found in the store and will be made again" in done.err
    assert files(store) == before


def test_a_second_run_reads_nothing(folder: Path, store: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*.parquet")}
    again = midiscover("features", str(folder / "run.yaml"), "--store", str(store))
    assert again.code == 0, again.err
    assert "nothing is read" in again.err
    assert "alive" in again.out
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*.parquet")} == before


def test_they_are_listed_shown_and_used(store: Path) -> None:
    sae = sorted(path.name for path in (store / "saes").iterdir())[0]
    listed = midiscover("feature", "list", sae, "--store", str(store), "--sort", "max", "--limit", "3", "--json")
    rows = json.loads(listed.out)
    assert [row["max"] for row in rows] == sorted((row["max"] for row in rows), reverse=True)
    best = rows[0]["index"]
    shown = midiscover("feature", "show", sae, str(best), "--store", str(store))
    assert f"feature {best} of {sae}" in shown.out
    assert "Highest activations" in shown.out
    read = midiscover("interpret", sae, "the river and the lamp", "--store", str(store), "--json")
    (text,) = json.loads(read.out)
    assert "".join(text["tokens"]) == "the river and the lamp"
    assert text["saes"][sae]["features"]


def test_a_text_goes_on_with_a_feature_changed_beside_the_same_without(store: Path) -> None:
    sae = sorted(path.name for path in (store / "saes").iterdir())[0]
    words = ("steer", sae, "the river and the lamp", "--tokens", "8", "--store", str(store))
    (best,) = json.loads(
        midiscover("feature", "list", sae, "--store", str(store), "--sort", "max", "--limit", "1", "--json").out
    )
    done = midiscover(*words, "--add", f"{best['index']}=500", "--ablate", "0", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["changes"] == [
        {"mode": "add", "feature": best["index"], "value": 500.0},
        {"mode": "ablate", "feature": 0, "value": 0.0},
    ]
    loaded = load_sae(sae, store=str(store))
    lm = load_language_model([loaded], str(store))
    start = start_token(lm, [loaded])
    ids = [start, *lm.tokenizer("the river and the lamp", add_special_tokens=False).input_ids]
    model: Any = lm.model
    plain = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :]
    assert told["default"] == lm.tokenizer.decode(plain)
    assert told["steered"] != told["default"]
    shown = midiscover(*words, "--add", f"{best['index']}=500", "--ablate", "0")
    assert f"steered  add {best['index']}=500, ablate 0" in shown.out
    assert "nothing changed" in shown.out


def test_concepts_beside_baselines(store: Path) -> None:
    sae = sorted(path.name for path in (store / "saes").iterdir())[0]
    done = midiscover("concepts", sae, "--module", "numbers", "--shuffles", "50", "--store", str(store), "--json")
    assert done.code == 0, done.err
    (document,) = json.loads(done.out)
    assert {"sae_scores", "neurons", "untrained"} <= document.keys()
    assert len(document["sae_scores"]["features"]) == 10
    assert "raw neurons" in document["verdict"]
    assert json.loads((store / "saes" / sae / "concepts" / "numbers.json").read_text()) == document
    both = midiscover("concepts", str(store.parent / "run.yaml"), "--module", "questions", "--store", str(store))
    assert both.code == 0, both.err
    assert "Where each concept is carried best" in both.out


def test_exports(store: Path, tmp_path: Path) -> None:
    sae = sorted(path.name for path in (store / "saes").iterdir())[0]
    words = ("export", sae, "--store", str(store), "--to")
    done = midiscover(*words, "neuronpedia", "--out", str(tmp_path / "np"), "--model-id", "tiny")
    assert done.code == 0, done.err
    assert violations(tmp_path / "np") == []
    done = midiscover(*words, "saelens", "--out", str(tmp_path / "folder"))
    assert done.code == 0, done.err
    mine, theirs = load_sae(sae, store=str(store)), load_sae(str(tmp_path / "folder"))
    x = torch.randn(50, mine.module.d_in, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mine.encode(x), theirs.encode(x))
    assert theirs.cfg["metadata"]["hook_name"] == theirs.cfg["metadata"]["hf_hook_name"]
    assert theirs.cfg["metadata"]["hf_hook_name"] == "model.layers.0.mlp.down_proj"
    assert theirs.cfg["metadata"]["model_class_name"] == "AutoModelForCausalLM"  # none that TransformerLens knows
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert midiscover(*words, "saelens", "--out", str(tmp_path / "folder")).code == 0
    refused = midiscover(*words, "saelens", "--out", str(tmp_path / "np"))
    assert (refused.code, "holds something else already" in refused.err) == (2, True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("concepts", "SAE", "--module", "joy"), "'joy' is no concept module; known are commands, "),
        (("concepts", "SAE", "--texts", "/dev/null"), "holds 0 texts; a concept needs 8"),
        (("concepts", "SAE", "--controls", "x"), "--controls goes with --texts"),
        (("export", "SAE", "--to", "paper"), "--to paper is no format; known are saelens, neuronpedia"),
        (("export", "SAE", "--to", "saelens", "--source-set", "a.b"), "can't be a source set of Neuronpedia"),
        (("feature", "show", "SAE", "100000"), "has no feature 100000; its features are 0 to"),
        (("feature", "list", "SAE", "--sort", "beauty"), "--sort beauty is no column of features; known are index"),
        (("feature", "list", "SAE", "--filter", "max~2"), "--filter 'max~2' is not understood"),
        (("feature", "list", "SAE", "--limit", "0"), "--limit is 0; it must be a whole number above 0"),
        (("feature", "list", "nothing"), "There is no config, sweep or SAE 'nothing'"),
        (("features", "nothing"), "There is no config, sweep or SAE 'nothing'"),
        (("features", "SAE", "--train.lr", "1"), "--train.lr does not belong to features"),
        (("features", "SAE", "--features.top_contexts", "0"), "features.top_contexts must be above 0"),
        (("interpret", "SAE", ""), "holds no token"),
        (("interpret", "SAE", "river " * 2000), "reads at most"),
        (("interpret", "SAE", "river", "--top", "-1"), "--top is -1; it must be a whole number above 0"),
        (("interpret", "SAE"), "Give either a text or --file FILE"),
        (("interpret", "SAE", "--file", "/dev/null"), "holds no text"),
        (("steer", "SAE", "river"), "Nothing is to be changed; give --add or --clamp"),
        (("steer", "SAE", "river", "--add", "17"), "--add 17 is no FEATURE=VALUE"),
        (("steer", "SAE", "river", "--clamp", "17=inf"), "--clamp 17=inf is no FEATURE=VALUE"),
        (("steer", "SAE", "river", "--ablate", "rain"), "--ablate rain names no feature"),
        (("steer", "SAE", "river", "--ablate", "100000"), "has no feature 100000; its features are 0 to"),
        (
            ("steer", "SAE", "river", "--ablate", "1", "--tokens", "0"),
            "--tokens is 0; it must be a whole number above 0",
        ),
        (("steer", "SAE", "river", "--ablate", "1", "--tokens", "9999"), "--tokens is 9,999; "),
        (("steer", "SAE", "river " * 200, "--ablate", "1"), "reads at most"),
        (("steer", "SAE", "river", "--ablate", "1", "--temperature", "-1"), "--temperature is -1.0; it must be 0"),
    ],
)
def test_bad_input(store: Path, arguments: tuple[str, ...], sentence: str) -> None:
    sae = sorted(path.name for path in (store / "saes").iterdir())[0]
    done = refused(*(sae if word == "SAE" else word for word in arguments), "--store", str(store))
    assert done.code == 2, done.err
    assert sentence in done.err
    assert "Traceback" not in done.err


def test_a_killed_driver_goes_on_where_it_was(folder: Path, store: Path) -> None:
    before = files(store)
    words = ("features", str(folder / "run.yaml"), "--store", str(store))
    rows = {}
    for manifest in store.glob("saes/*/features/*/manifest.json"):
        told = json.loads(manifest.read_text())
        rows[told["sae"]] = (told["hook"], told["rows"])
        manifest.unlink()
    driver = subprocess.Popen(
        command(*words), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    wait_for(lambda: len(list(store.glob(PARTS))) > 1, driver, "two parts")
    kill_driver(driver)
    assert len(list(store.glob("saes/*/features/*/manifest.json"))) < 4, "the kill fell before everything was done"
    stand = {path.parts[-5] for path in store.glob(PARTS)} | {
        path.parts[-4] for path in store.glob("saes/*/features/*/manifest.json")
    }
    assert len(stand) > 1
    done = midiscover(*words)
    assert done.code == 0, done.err
    read = re.search(r"features: 100 %  ([\d,]+) tokens", done.err)
    assert read is not None
    # Each hook is one chunk here; one whose SAEs all have their part is not read again.
    left = dict(rows[sae] for sae in rows.keys() - stand)
    assert int(read[1].replace(",", "")) == sum(left.values()) < sum(dict(rows.values()).values())
    assert files(store) == before
    assert not list(store.glob(PARTS))
