"""A sweep whose activations are never stored: the same SAEs, measured alike, and what comes after."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import jobs.crews
from jobs.crews import run_crew_tries
from jobs.packworker import PackJob, PackWorker
from jobs.runtime import Slots
from midiscover.corpus import find_corpus
from midiscover.live import LiveSource
from midiscover.resolve import Crew, make_crews, make_packs
from midiscover.store import layout
from tests.boards import LocalBoard
from tests.jobs_cli import midiscover
from tests.runs import prepared_sweep, write_run

pytestmark = [pytest.mark.alone, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

STREAM = ("--resources.activations", "stream")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hooks, two SAEs each, on rows that fit into one pool."""
    train = {"epochs": 2, "batch_size": 128, "lr": 1e-3, "checkpoint_every": 1e-9}
    return write_run(tmp_path_factory.mktemp("stream"), train=train)


@pytest.fixture(scope="module")
def stored(config: Path) -> Path:
    done = midiscover("sweep", str(config), "--store", str(config.parent / "stored"))
    assert done.code == 0, done.err
    return config.parent / "stored"


@pytest.fixture(scope="module")
def streamed(config: Path) -> Path:
    done = midiscover("sweep", str(config), "--store", str(config.parent / "streamed"), *STREAM)
    assert done.code == 0, done.err
    assert "language model" in done.err, "a bar of its own"
    return config.parent / "streamed"


def weights(store: Path) -> dict[str, str]:
    """SAE id -> sha256 of its weights, of every trained SAE."""
    return {
        path.parent.name: hashlib.sha256(path.with_name("sae_weights.safetensors").read_bytes()).hexdigest()
        for path in store.glob("saes/*/training.json")
    }


def facts(store: Path) -> dict[str, Any]:
    """What the records say that does not depend on time and place."""
    found = {}
    for path in sorted(store.glob("saes/*/record.json")):
        record = json.loads(path.read_text())
        assert record["lineage"].get("activations") == ("streamed" if store.name == "streamed" else None)
        kept = ("id", "metrics", "normalisation", "files", "l1")
        found[record["id"]] = {name: record[name] for name in kept}
    return found


def test_saes_and_their_metrics_are_those_of_a_stored_sweep(stored: Path, streamed: Path) -> None:
    assert weights(streamed) == weights(stored)
    assert facts(streamed) == facts(stored)
    assert not (streamed / "activations").exists()


def test_features_harvest_once_for_all_hooks(streamed: Path) -> None:
    sae = next(path.name for path in sorted((streamed / "saes").iterdir()))
    done = midiscover("features", "tiny", "--store", str(streamed))
    assert done.code == 0, done.err
    assert done.err.count("will be made again") == 2
    assert done.err.count("until the first batch was done") == 1
    assert (streamed / "activations").exists()
    assert midiscover("verify", sae, "--store", str(streamed)).code == 0


def crew_of(config: Path, store: str) -> tuple[PackJob, Crew, LocalBoard]:
    """All packs of the config as one crew, on a store that has a corpus only."""
    prepared, board = prepared_sweep(config, config.parent / store, *STREAM), LocalBoard()
    resolved = prepared.resolved
    packs = make_packs(resolved.saes, None, {sae.id for sae in resolved.saes})
    (crew,) = make_crews(packs, 1, list(resolved.table.hooks))
    job: Any = PackJob(
        resolved=resolved,
        crews=(crew,),
        storage=prepared.storage,
        board=board,
        slots=Slots(count=1, cpus=1, gpus=0, threads=1),
        trainer="inline",
        prepend_bos=False,
        streams=True,
    )
    return job, crew, board


def with_corpus(config: Path, stored: Path, name: str) -> None:
    """A store that has the corpus of the stored sweep, and nothing else."""
    shutil.copytree(stored / "corpora", config.parent / name / "corpora")


def test_a_crew_that_failed_once_goes_on_from_its_checkpoints(
    config: Path, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_corpus(config, stored, "again")
    job, crew, board = crew_of(config, "again")
    assert find_corpus(job.storage, job.resolved.corpus_id) is not None
    opened: list[LiveSource] = []

    class Failing(LiveSource):
        """Breaks in the middle of the first source that gets there."""

        def batches(self, start: int) -> Any:
            opened.append(self)
            for number, batch in enumerate(super().batches(start), start=start):
                if len(opened) == 2 and number == 100:
                    raise OSError("the disk is gone")
                yield batch

    monkeypatch.setattr(jobs.crews, "LiveSource", Failing)
    monkeypatch.setattr(PackWorker, "is_saving", lambda _: False)  # waits for each write, however slow the disk
    run_crew_tries(job, crew)
    retries = [data for kind, _, data in board.told if kind == "retry"]
    assert retries == ["try 1 of 4: OSError: the disk is gone"]
    resumed = [data for kind, _, data in board.told if kind == "resumed"]
    assert len(resumed) == 2
    assert min(resumed) >= 99, "both packs went on where they were"
    assert weights(config.parent / "again") == weights(stored)
    assert not job.storage.list(layout.sweep_file(job.resolved.sweep_id, "packs"))


def test_a_pack_that_fails_for_good_leaves_the_others_their_model(
    config: Path, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_corpus(config, stored, "partly")
    job, crew, board = crew_of(config, "partly")

    class Broken(LiveSource):
        def batches(self, start: int) -> Any:
            if self.name == crew[0].id:
                raise OSError("the disk is gone")
            return super().batches(start)

    monkeypatch.setattr(jobs.crews, "LiveSource", Broken)
    run_crew_tries(job, crew)
    failed = {key for kind, key, _ in board.told if kind == "failed"}
    assert failed == {sae.id for sae in crew[0].saes}
    whole = weights(stored)
    assert weights(config.parent / "partly") == {sae.id: whole[sae.id] for sae in crew[1].saes}
