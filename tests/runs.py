"""A whole small run: a random model, text of its own, a grid of four SAEs; and what two runs must share."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import yaml
from filelock import FileLock

from midiscover.launch import Prepared, parse_job, prepare
from midiscover.store.storage import Storage, open_store
from tests.jobs_cli import midiscover
from tests.tiny import Kind, make_tiny_model

HOOKS = {
    "llama": "model.layers.{0,1}.mlp.down_proj",
    "phi": "model.layers.{0,1}.mlp.fc2",
}


def write_text(path: Path, documents: int = 400) -> Path:
    """A jsonl file of sentences that differ."""
    words = ["river", "stone", "lamp", "engine", "garden", "theory", "window", "signal", "harbour", "number"]
    lines = []
    chance = random.Random(0)
    for i in range(documents):
        sentence = " ".join(chance.choices(words, k=40 + i % 17))
        lines.append(json.dumps({"text": f"Entry {i}: {sentence}. It follows that {i * i} is not {i + 1}."}))
    path.write_text("\n".join(lines))
    return path


def write_run(folder: Path, *, kind: Kind = "llama", **changes: object) -> Path:
    """A config whose sweep takes seconds; `changes` replace whole sections of its YAML. Returns its path."""
    model = folder / f"model-{kind}"
    if not model.exists():
        make_tiny_model(kind, model)
    text = folder / "text.jsonl"
    if not text.exists():
        write_text(text)
    tree: dict[str, object] = {
        "name": "tiny",
        "model": {"id": str(model), "dtype": "float32"},
        "corpus": {"source": str(text), "context_size": 32, "max_tokens": 24_000},
        "harvest": {"hooks": HOOKS[kind], "block_tokens": 1024},
        "sae": {"expansion_factor": 4},
        "grid": {"sae.l1_coefficient": [0.5, 2]},
        "train": {"epochs": 2, "batch_size": 128, "lr": 1e-3},
        "evaluate": {"ce_tokens": 256},
        "resources": {"threads": 1},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree | changes))
    return path


def prepared_sweep(config: Path, store: Path, *flags: str) -> Prepared:
    """The sweep of a config as its driver holds it, but for the tracker: packs tell it nothing, and it is closed."""
    with prepare(parse_job("sweep", [str(config), "--store", str(store), *flags])) as prepared:
        return prepared


def finished_run(base: Path) -> Path:
    """A run of four SAEs on a random model with their features and a concept, made once a test run; see `finished`.

    base: the temporary folder of this pytest process.
    """
    folder = Path(
        os.environ.get("MIDISCOVER_TEST_FINISHED")
        or (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "finished"
    )
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "done").exists():
            config = write_run(folder)
            for verb in (("sweep",), ("features",), ("concepts", "--module", "numbers")):
                words = (verb[0], str(config), *verb[1:], "--store", str(folder / "store"))
                done = midiscover(*words, env={"MIDISCOVER_CLUSTER": ""})
                assert done.code == 0, done.err
            (folder / "done").touch()
    return folder


def copied_run(finished: Path, folder: Path) -> Path:
    """Model, text and store of a finished run in a folder of their own; returns its config."""
    for name in ("store", "model-llama"):
        shutil.copytree(finished / name, folder / name)
    shutil.copy(finished / "text.jsonl", folder)
    return write_run(folder)


def harvested_run(finished: Path, folder: Path, **changes: object) -> Path:
    """The same as it was before training: corpus and activations stand. `changes` as for `write_run`."""
    copied_run(finished, folder)
    for name in ("saes", "sweeps"):
        shutil.rmtree(folder / "store" / name)
    for path in (folder / "store").glob("tracker.db*"):
        path.unlink()
    return write_run(folder, **changes)


def weights(store: str | Storage) -> dict[str, str]:
    """SAE id -> sha256 of its weights, of every committed SAE."""
    storage = open_store(store, create=False) if isinstance(store, str) else store
    records = [key for key in storage.list("saes") if key.endswith("/record.json")]
    return {
        key.split("/")[1]: hashlib.sha256(
            storage.read(key.replace("record.json", "sae_weights.safetensors"))
        ).hexdigest()
        for key in records
    }


def blocks(store: str | Storage) -> dict[str, str]:
    """Block file -> sha256, of every activation block."""
    storage = open_store(store, create=False) if isinstance(store, str) else store
    keys = [key for key in storage.list("activations") if key.endswith(".safetensors")]
    return {key: hashlib.sha256(storage.read(key)).hexdigest() for key in keys}
