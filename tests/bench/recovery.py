"""How long a sweep stands still when something of it is killed: from kill -9 to the next thing that is committed.

    python -m tests.bench.recovery [--repeats 3]

The sweep of the fault tests (a small random model, a checkpoint every 0.2 s). Killed are the language model's actor,
the process of a pack inside its trial and in a TorchTrainer, the driver (the same command is given again at once), and
on a cluster of a head and workers on this machine the whole node that trains a pack, by SIGKILL to all its processes.
The clock ends at the first block that a marker names, or at the first checkpoint with a later step. Whether what comes
out is what an undisturbed run makes is the fault tests' business. Judges nothing: the exit code is 0.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

from rich import box
from rich.table import Table

from midiscover import tables
from midiscover.store.storage import open_store
from tests.bench.harvest import machine
from tests.clusters import LocalCluster, local_cluster
from tests.faults import test_kills as kills
from tests.faults.slow import SLOW
from tests.faults.test_nodes import names, node_with
from tests.jobs_cli import command, environment
from tests.postgres import fresh_database, postgres
from tests.runs import write_run
from tests.s3 import S3Server, s3_server

PACK = ("pack_trial", "ImplicitFunc")
Clock = Callable[[Path], float]


def started(folder: Path, *flags: str) -> subprocess.Popen[bytes]:
    """The sweep over one hook, into a new store."""
    return kills.start(folder, folder / "store", *kills.ONE_PACK, *flags)


def next_commit(driver: subprocess.Popen[bytes], now: Callable[[], int], before: int) -> float:
    """Seconds until a count is above `before`."""
    began = time.monotonic()
    kills.wait_for(lambda: now() > before, driver, "the next thing that is committed")
    return time.monotonic() - began


def actor(folder: Path) -> float:
    """The language model's."""
    store, driver = folder / "store", started(folder)
    try:
        kills.wait_for(lambda: kills.markers(store) >= 3, driver, "blocks")
        kills.kill_worker(driver, "HarvestActor", "MapWorker")
        return next_commit(driver, lambda: kills.markers(store), kills.markers(store))
    finally:
        kills.kill_driver(driver)


def pack(folder: Path, trainer: str, title: tuple[str, ...]) -> float:
    """The process that trains."""
    store, driver = folder / "store", started(folder, "--resources.trainer", trainer)
    try:
        step = kills.kill_pack(driver, store, trainer, title, 0.0)
        return next_commit(driver, lambda: kills.newest_step(store), step)
    finally:
        kills.kill_driver(driver)


def driver_again(folder: Path) -> float:
    """The driver, and the same command at once."""
    store, driver = folder / "store", started(folder)
    kills.wait_for(lambda: kills.newest_step(store) > 0, driver, "a checkpoint")
    kills.kill_driver(driver)
    step, driver = kills.newest_step(store), started(folder)
    try:
        return next_commit(driver, lambda: kills.newest_step(store), step)
    finally:
        kills.kill_driver(driver)


CASES: dict[str, Clock] = {
    "the language model's actor": actor,
    "a pack, inside its trial": lambda folder: pack(folder, "inline", PACK),
    "a pack, in a TorchTrainer": lambda folder: pack(folder, "ray_train", ("RayTrainWorker",)),
    "the driver, and its command given again": driver_again,
}


def node(cluster: LocalCluster, server: S3Server, folder: Path, name: str) -> float:
    """A whole node that trains, of a submitted sweep."""
    storage = open_store(f"s3://{server.bucket}/{name}")
    words = command("sweep", str(folder / "run.yaml"), "--store", storage.uri, *kills.ONE_PACK)
    with (folder / f"{name}.out").open("wb") as out:
        variables = environment(cluster.client() | server.environment)
        job = subprocess.Popen(words, env=variables, stdout=out, stderr=subprocess.STDOUT)

    def newest() -> int:
        steps = names(storage, "sweeps", "/step-")
        return max((int(key.rpartition("step-")[2].partition(".")[0]) for key in steps), default=0)

    try:
        kills.wait_for(lambda: newest() > 0, job, "a checkpoint", 300)
        lost = node_with(cluster, "ImplicitFunc")
        assert lost is not None
        cluster.kill(lost)
        step = newest()
        assert not names(storage, "saes", "/training.json"), "the kill fell into the training"
        return next_commit(job, newest, step)
    finally:
        job.wait(600)


def nodes(repeats: int) -> list[float]:
    """The last case, in a cluster that has a worker more than it loses."""
    found = []
    with (
        tempfile.TemporaryDirectory(prefix="midiscover-bench-") as name,
        s3_server() as server,
        postgres() as database,
        fresh_database(database) as address,
        patch.dict("os.environ", server.environment),
    ):
        folder = Path(name)
        write_run(folder, **SLOW)
        with local_cluster(folder, repeats + 1, {**server.environment, "MIDISCOVER_DATABASE_URL": address}) as cluster:
            for repeat in range(repeats):
                found.append(node(cluster, server, folder, f"store{repeat}"))
                print(f"a node: {found[-1]:.1f} s", flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    print(machine())
    found: dict[str, list[float]] = {}
    for case, clock in CASES.items():
        for _ in range(args.repeats):
            with tempfile.TemporaryDirectory(prefix="midiscover-bench-") as folder:
                write_run(Path(folder), **SLOW)
                found.setdefault(case, []).append(clock(Path(folder)))
                print(f"{case}: {found[case][-1]:.1f} s", flush=True)
    found["the node of a pack"] = nodes(args.repeats)
    table = Table("killed", "s until something is committed again", "lowest", "highest", box=box.SIMPLE_HEAD)
    for case, times in found.items():
        table.add_row(case, *(f"{one:.1f}" for one in (statistics.median(times), min(times), max(times))))
    tables.show(table)
    print(machine())
    return 0


if __name__ == "__main__":
    sys.exit(main())
