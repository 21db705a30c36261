"""The database goes away while a sweep trains, and the disk fills up: what was left undone is done afterwards."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from midiscover.store.storage import open_store
from midiscover.tracking import Tracker, reindex
from tests.faults.slow import SLOW
from tests.faults.test_kills import checkpoints, wait_for
from tests.jobs_cli import command, environment, midiscover
from tests.postgres import fresh_database, or_skip, own_server
from tests.runs import weights, write_run

pytestmark = [pytest.mark.long, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
LONG = {"epochs": 30, "batch_size": 32, "lr": 1e-3, "checkpoint_every": 0.2, "report_every": 5}


def tracked(tracker: Tracker, saes: list[str]) -> dict[str, dict[str, list[float]]]:
    return {sae: tracker.steps(sae) for sae in saes}


@pytest.mark.postgres
def test_a_database_that_goes_away_is_told_when_it_is_back(tmp_path: Path) -> None:
    """R23: the rows are those that another database gets from the store afterwards, and all curves are whole."""
    config = write_run(tmp_path, **SLOW | {"train": LONG})
    with or_skip(), own_server() as server, fresh_database(server.url) as address:
        store, out = tmp_path / "store", tmp_path / "sweep.out"
        with out.open("wb") as file:
            sweep = subprocess.Popen(
                command("sweep", str(config), "--store", str(store)),
                env=environment({"MIDISCOVER_DATABASE_URL": address}),
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        wait_for(lambda: bool(checkpoints(store)), sweep, "a checkpoint")
        server.stop()
        try:
            wait_for(lambda: "waits until the database is back" in out.read_text(), sweep, "a word of the outage")
            before = len(list(store.glob("saes/*/training.json")))
            time.sleep(3)
        finally:
            server.start()
        assert sweep.wait(300) == 0, out.read_text()
        saes = sorted(weights(str(store)))
        assert before < len(saes) == 4, "the outage fell into the training"
        assert "the tracking database is back; it was told" in out.read_text()
        assert "reindex" not in out.read_text()
        with Tracker.open(address) as there, Tracker.open(f"sqlite:///{tmp_path}/again.db") as here:
            reindex(open_store(str(store)), here)
            assert tracked(there, saes) == tracked(here, saes)
            (run,), (other,) = there.list_runs(), here.list_runs()
            assert run["status"] == other["status"] == "done"
            for sae in saes:
                assert there.show(sae)["metrics"] == here.show(sae)["metrics"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(folder)], capture_output=True)
    if os.geteuid() != 0 or mounted.returncode != 0:
        pytest.skip("only root can mount a small disk here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_ends_a_run_that_goes_on_when_there_is_room(
    small_disk: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """R27: the error says what happened, nothing half-written is believed in, and the same line goes on."""
    config = write_run(tmp_path, **SLOW)
    store = small_disk / "store"
    full = midiscover("sweep", str(config), "--store", str(store))
    assert full.code == 1, full.err
    assert full.err.splitlines()[-1].startswith("error: Can't write ")
    assert full.err.splitlines()[-1].endswith("No space left on device.")
    assert "Traceback" not in full.err
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    again = midiscover("sweep", str(config), "--store", str(store))
    assert again.code == 0, again.err
    assert weights(str(store)) == weights(str(undisturbed))
