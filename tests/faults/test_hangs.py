"""Packs that hang and packs that crash, side by side with others: R9 of the reliability goals.

A stopped process (SIGSTOP) hangs as a stuck device does: it can't notice by itself. Each test shows that it was stopped
while it had work left.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import psutil
import pytest

from tests.faults.slow import SLOW
from tests.faults.test_kills import checkpoints, finish, kill, kill_driver, ray_worker, start, wait_for
from tests.processes import TRIAL
from tests.runs import weights, write_run

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]

FLAGS = ("--resources.pack_size", "1", "--resources.trainer")
TITLES = {"inline": TRIAL, "ray_train": ("RayTrainWorker",)}
"""Of the processes that train, by `resources.trainer`."""


@pytest.fixture
def stall_seconds(undisturbed: Path) -> int:
    """For `resources.stall_seconds`: what this machine needs until a new process has begun its work, several times."""
    found = re.search(r"of which ([\d.]+) s until the first batch", (undisturbed.parent / "said").read_text())
    assert found is not None
    return max(25, round(4 * float(found[1])))


@pytest.fixture
def store(tmp_path: Path, undisturbed: Path) -> Path:
    """One whose activations stand, so that under so short a watch are only the packs and the evaluation."""
    write_run(tmp_path, **SLOW)
    for name in ("corpora", "activations"):
        shutil.copytree(undisturbed / name, tmp_path / "store" / name)
    return tmp_path / "store"


def said(store: Path) -> str:
    return (store.parent / f"{store.name}.out").read_text()


def test_one_pack_hangs_and_one_is_killed_and_all_saes_stand(
    tmp_path: Path, store: Path, undisturbed: Path, stall_seconds: int
) -> None:
    driver = start(tmp_path, store, *FLAGS, "inline", "--resources.stall_seconds", str(stall_seconds))
    wait_for(lambda: bool(checkpoints(store)), driver, "a checkpoint")
    hung = ray_worker(driver, TITLES["inline"])
    hung.suspend()
    assert len(weights(str(store))) < 4, "there was work left"
    wait_for(lambda: not psutil.pid_exists(hung.pid), driver, "its end", stall_seconds + 95)
    assert f"has not moved for {stall_seconds} s" in said(store)
    left = set(checkpoints(store))  # by the one that hung
    wait_for(lambda: set(checkpoints(store)) - left, driver, "a checkpoint of what goes on")
    kill(driver, ray_worker(driver, TITLES["inline"]))
    finish(driver, store)
    assert weights(str(store)) == weights(str(undisturbed)), "each SAE once, bit for bit"


@pytest.mark.parametrize("trainer", TITLES)
def test_a_pack_that_hangs_each_time_is_given_up_and_named(
    tmp_path: Path, store: Path, undisturbed: Path, trainer: str, stall_seconds: int
) -> None:
    """By Tune, which starts trials again, and by Ray Train, which does so within one."""
    few = ("--resources.max_failures", "1", "--harvest.hooks", "[model.layers.1.mlp.down_proj]")
    driver = start(tmp_path, store, *FLAGS, trainer, "--resources.stall_seconds", str(stall_seconds), *few)
    stopped: set[int] = set()
    victim = ""
    try:
        while driver.poll() is None:
            # Whichever pack comes first has a checkpoint first, and it alone is stopped each time it trains.
            found = [path.parent.name for path in checkpoints(store)]
            victim = victim or (found[0] if found else "")
            # One that is stopped before it has said that it trains holds no lease.
            if victim and victim in found and len(stopped) < 2 and said(store).count("resumed at step") >= len(stopped):
                try:
                    worker = ray_worker(driver, TITLES[trainer])
                except AssertionError:  # one has ended, and the next has not begun
                    continue
                if worker.pid not in stopped and worker.status() != psutil.STATUS_STOPPED:
                    worker.send_signal(signal.SIGSTOP)
                    stopped.add(worker.pid)
                    wait_for(lambda: not psutil.pid_exists(worker.pid), driver, "its end", stall_seconds + 95)  # noqa: B023 - awaited here
    finally:
        if driver.poll() is None:
            kill_driver(driver)
    assert driver.wait() == 1, said(store)[-2000:]
    assert len(stopped) == 2
    (failures,) = store.glob("sweeps/*/failures.json")
    failed = json.loads(failures.read_text())
    assert len(failed) == 1
    assert "it hung 2 times" in next(iter(failed.values()))
    made = weights(str(store))
    assert len(made) == 1, "the other one stands"
    assert made.items() <= weights(str(undisturbed)).items()
