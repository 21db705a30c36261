"""kill -9 of a language-model actor, of a pack's worker and of the driver, at random moments.

The final SAEs equal those of an undisturbed run bit for bit, and what was committed before the kill is not made again.
Each test shows that its kill happened while there was work left.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.faults.slow import SLOW
from tests.jobs_cli import command, environment
from tests.processes import TRIAL, frozen, is_called
from tests.runs import blocks, weights, write_run

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

SEED = int(os.environ.get("MIDISCOVER_TEST_SEED", random.SystemRandom().randrange(10**6)))
"""Titles of the process that trains a pack in a Tune trial."""
ONE_PACK = ("--harvest.hooks", "[model.layers.1.mlp.down_proj]", "--resources.pack_size", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    write_run(folder, **SLOW)
    return folder


@pytest.fixture
def moment() -> random.Random:
    print(f"MIDISCOVER_TEST_SEED={SEED}")
    return random.Random(SEED)


def start(folder: Path, store: Path, *flags: str) -> subprocess.Popen[bytes]:
    """The sweep as a process of its own, in its own session."""
    with (store.parent / f"{store.name}.out").open("ab") as out:
        return subprocess.Popen(
            command("sweep", str(folder / "run.yaml"), "--store", str(store), *flags),
            env=environment(),
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_hears_ctrl_c,
        )


def _hears_ctrl_c() -> None:
    """Tests that were started in the background of a script have inherited that it is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def wait_for(condition: Callable[[], object], driver: subprocess.Popen[bytes], what: str, seconds: float = 240) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert driver.poll() is None, f"the driver ended before {what}"
        assert time.monotonic() < ends, f"no {what} within {seconds} s"
        time.sleep(0.05)


def markers(store: Path) -> int:
    return len(list(store.glob("activations/*/model*/block-*.json")))


def checkpoints(store: Path) -> list[Path]:
    return list(store.glob("sweeps/*/packs/*/step-*.safetensors"))


def newest_step(store: Path) -> int:
    return max((int(path.stem.removeprefix("step-")) for path in checkpoints(store)), default=0)


def resumed_at(store: Path) -> int:
    """The highest step that a pack of this store said it resumed from; 0 where none did."""
    said = re.findall(r"resumed at step (\d+)", (store.parent / f"{store.name}.out").read_text())
    return max(map(int, said), default=0)


def named_blocks(store: Path) -> dict[str, int]:
    """Block file -> time of writing, of the blocks that a marker names: what stands."""
    found = {}
    for marker in store.glob("activations/*/*/block-*.json"):
        file = marker.parent / json.loads(marker.read_text())["file"]
        found[str(file)] = file.stat().st_mtime_ns
    return found


def ray_workers(driver: subprocess.Popen[bytes], titles: tuple[str, ...]) -> list[psutil.Process]:
    """The Ray workers below the driver whose titles name one of these, the busiest last."""
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if is_called(process, titles):
                found.append((process.cpu_times().user, process.pid))
    assert found, f"no process called {' or '.join(titles)}"
    return [psutil.Process(pid) for _, pid in sorted(found)]


def ray_worker(driver: subprocess.Popen[bytes], titles: tuple[str, ...]) -> psutil.Process:
    """The busiest of them."""
    return ray_workers(driver, titles)[-1]


def kill_worker(driver: subprocess.Popen[bytes], *titles: str) -> None:
    kill(driver, ray_worker(driver, titles))


def kill(driver: subprocess.Popen[bytes], victim: psutil.Process) -> None:
    victim.kill()
    victim.wait(10)
    assert not psutil.pid_exists(victim.pid) or victim.status() == psutil.STATUS_ZOMBIE
    assert driver.poll() is None, "the driver was still at work when its worker was killed"


def kill_pack(driver: subprocess.Popen[bytes], store: Path, trainer: str, titles: tuple[str, ...], rest: float) -> int:
    """Kill the one pack's worker while it has a checkpoint and SAEs to train; returns the checkpoint's step.

    The process that trains is frozen while the store is looked at, so that it can't end in between.
    """
    wait_for(lambda: bool(checkpoints(store)), driver, "a checkpoint")
    time.sleep(rest)
    # The trial around a TorchTrainer only waits; the worker trains.
    training = ray_worker(driver, ("RayTrainWorker",) if trainer == "ray_train" else TRIAL)
    with frozen([training]):
        newest = newest_step(store)
        assert newest > 0, "the pack had a checkpoint"
        assert not list(store.glob("saes/*/training.json")), "the pack had not ended"
        kill(driver, ray_worker(driver, titles))
    return newest


def kill_driver(driver: subprocess.Popen[bytes]) -> None:
    """The driver and then what it started: a Ray whose driver is gone ends by itself, but not at once."""
    children = psutil.Process(driver.pid).children(recursive=True)
    assert driver.poll() is None, "the driver was still at work when it was killed"
    os.kill(driver.pid, signal.SIGKILL)
    assert driver.wait(10) == -signal.SIGKILL
    for child in children:
        if child.is_running():
            child.kill()
    psutil.wait_procs(children, timeout=10)


def finish(driver: subprocess.Popen[bytes], store: Path) -> None:
    code = driver.wait(240)
    assert code == 0, (store.parent / f"{store.name}.out").read_text()[-3000:]


def test_a_killed_language_model_actor_and_a_killed_pack(
    folder: Path, undisturbed: Path, moment: random.Random
) -> None:
    store = folder / "workers"
    driver = start(folder, store, "--resources.trainer", "inline", *ONE_PACK)
    wait_for(lambda: markers(store) >= moment.randint(1, 6), driver, "committed blocks")
    kill_worker(driver, "HarvestActor", "MapWorker")
    stamps = named_blocks(store)
    assert 0 < len(stamps) < 2 / 3 * len(blocks(str(undisturbed))), "blocks were left when the actor was killed"
    newest = kill_pack(driver, store, "inline", TRIAL, moment.uniform(0, 0.3))
    finish(driver, store)
    assert stamps.items() <= named_blocks(store).items()
    made = blocks(str(store))
    assert made.items() <= blocks(str(undisturbed)).items()
    assert len(made) == 2 / 3 * len(blocks(str(undisturbed))), "tokens and one hook of two"
    assert resumed_at(store) >= newest
    assert len(weights(str(store))) == 2
    assert weights(str(store)).items() <= weights(str(undisturbed)).items()


def test_a_pack_in_a_torch_trainer_whose_worker_and_then_trial_are_killed(
    folder: Path, undisturbed: Path, moment: random.Random
) -> None:
    store, newest = folder / "pack-ray_train", 0
    driver = start(folder, store, "--resources.trainer", "ray_train", *ONE_PACK)
    for title in ("RayTrainWorker", "ImplicitFunc"):
        wait_for(lambda: newest_step(store) > newest, driver, "a newer checkpoint")  # noqa: B023 - awaited here
        newest = kill_pack(driver, store, "ray_train", (title,), moment.uniform(0, 0.3))
    finish(driver, store)
    assert resumed_at(store) >= newest
    made = weights(str(store))
    assert len(made) == 2
    assert made.items() <= weights(str(undisturbed)).items()


@pytest.mark.long
def test_one_is_killed_of_two_processes_that_share_a_pack(
    folder: Path, undisturbed: Path, moment: random.Random
) -> None:
    """Bit for bit what two that are left alone make, and to the rounding of sums what one makes."""
    flags = (*ONE_PACK, "--resources.workers", "2")
    alone = folder / "group-alone"
    finish(start(folder, alone, *flags), alone)
    store = folder / "group"
    driver = start(folder, store, *flags)
    newest = kill_pack(driver, store, "ray_train", ("RayTrainWorker",), moment.uniform(0, 0.3))
    finish(driver, store)
    assert resumed_at(store) >= newest
    made = weights(str(store))
    assert len(made) == 2
    assert made == weights(str(alone))
    for sae in made:
        both, one = (json.loads((root / "saes" / sae / "record.json").read_text()) for root in (alone, undisturbed))
        assert both["lineage"]["workers"] == 2
        assert both["metrics"]["fvu"] == pytest.approx(one["metrics"]["fvu"], rel=1e-3)
        assert both["metrics"]["l0"] == pytest.approx(one["metrics"]["l0"], rel=1e-3)


@pytest.mark.long
def test_a_driver_that_is_killed_in_the_harvest_and_in_the_training(
    folder: Path, undisturbed: Path, moment: random.Random
) -> None:
    store = folder / "driver"
    driver = start(folder, store)
    wait_for(lambda: markers(store) >= moment.randint(1, 6), driver, "committed blocks")
    kill_driver(driver)
    stamps = named_blocks(store)
    assert 0 < len(stamps) < len(blocks(str(undisturbed))), "blocks were left when the driver was killed"
    driver = start(folder, store)
    wait_for(lambda: bool(checkpoints(store)), driver, "a checkpoint")
    time.sleep(moment.uniform(0, 0.5))
    kill_driver(driver)
    newest = newest_step(store)
    assert len(weights(str(store))) < 4, "SAEs were left to be made when the driver was killed"
    finish(start(folder, store), store)
    assert stamps.items() <= named_blocks(store).items()
    assert newest == 0 or resumed_at(store) >= newest
    assert blocks(str(store)) == blocks(str(undisturbed))
    assert weights(str(store)) == weights(str(undisturbed))


def test_a_sweep_that_is_interrupted_twice_continues(folder: Path, undisturbed: Path) -> None:
    store, newest = folder / "interrupted", 0
    for how, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        driver = start(folder, store)
        wait_for(lambda: newest_step(store) > newest, driver, "a newer checkpoint")  # noqa: B023 - awaited here
        with frozen(ray_workers(driver, TRIAL)):  # no pack ends before the driver does, and takes its checkpoint away
            newest = newest_step(store)
            if how is signal.SIGINT:
                os.killpg(driver.pid, how)  # as a terminal does
            else:
                os.kill(driver.pid, how)  # as a scheduler does
            assert driver.wait(60) == code
    finish(start(folder, store), store)
    assert resumed_at(store) >= newest > 0
    assert weights(str(store)) == weights(str(undisturbed))
