"""Submitted sweeps that are disturbed: a driver is killed; nodes are lost in the harvest and the training of two users.

The SAEs equal, bit for bit, those of an undisturbed run on one machine; each test shows that its kill fell into work.
"""

from __future__ import annotations

import functools
import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from midiscover.store.storage import Storage, open_store
from tests.clusters import LocalCluster, local_cluster
from tests.faults.slow import SLOW
from tests.faults.test_kills import wait_for as wait_for_driver
from tests.jobs_cli import command, environment
from tests.postgres import fresh_database
from tests.runs import weights, write_run
from tests.s3 import S3Server, s3_server

pytestmark = [
    pytest.mark.long,
    pytest.mark.ray,
    pytest.mark.s3,
    pytest.mark.postgres,
    pytest.mark.slow,
    pytest.mark.timeout(1500),
]


class World(NamedTuple):
    cluster: LocalCluster
    server: S3Server
    config: Path


@contextmanager
def bucket_of(server: S3Server) -> Iterator[None]:
    """This process may read the bucket as well."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, postgres_url: str) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("nodes")
    with s3_server() as server, fresh_database(postgres_url) as database, bucket_of(server):
        config = write_run(folder, **SLOW)
        nodes = {**server.environment, "MIDISCOVER_DATABASE_URL": database}
        with local_cluster(folder, 3, nodes) as cluster:
            yield World(cluster, server, config)


wait_for = functools.partial(wait_for_driver, seconds=300)


def node_with(cluster: LocalCluster, title: str) -> subprocess.Popen[bytes] | None:
    """The worker node on which a Ray process of this title runs."""
    for node in cluster.nodes[1:]:
        if node.poll() is not None:
            continue
        for process in psutil.Process(node.pid).children(recursive=True):
            try:
                if title in " ".join(process.cmdline()):
                    return node
            except psutil.NoSuchProcess:
                continue
    return None


def names(storage: Storage, prefix: str, part: str) -> list[str]:
    return [key for key in storage.list(prefix) if part in key]


def submitted(world: World, store: str, out: Path, *flags: str, **variables: str) -> subprocess.Popen[bytes]:
    mine = environment(world.cluster.client() | world.server.environment | variables)
    with out.open("wb") as file:
        words = command("sweep", str(world.config), "--store", store, *flags)
        return subprocess.Popen(words, env=mine, stdout=file, stderr=subprocess.STDOUT)


def test_a_driver_is_killed_and_its_job_submitted_again(world: World, undisturbed: Path, tmp_path: Path) -> None:
    store = f"s3://{world.server.bucket}/driver"
    storage = open_store(store)
    # Four packs on two nodes: two hooks side by side would end at the same moment, with all that there is.
    job = submitted(world, store, tmp_path / "first.out", "--resources.pack_size", "1")
    try:
        wait_for(lambda: names(storage, "saes", "/training.json"), job, "a trained SAE")
        head = psutil.Process(world.cluster.nodes[0].pid)
        drivers = [one for one in head.children(recursive=True) if "jobs.sweep" in one.cmdline()]
        assert drivers
        for driver in drivers:
            driver.kill()
        code = job.wait(120)
    finally:
        job.kill()
    first = {key: storage.version(key) for key in names(storage, "saes", "/training.json")}
    assert code != 0, (tmp_path / "first.out").read_text()
    assert 0 < len(first) < 4, "the kill fell into the training"
    again = submitted(world, store, tmp_path / "again.out")
    assert again.wait(600) == 0, (tmp_path / "again.out").read_text()
    assert weights(storage) == weights(str(undisturbed))
    assert {key: storage.version(key) for key in first} == first, "what stood was not made again"


def test_two_users_submit_the_same_sweep_while_nodes_are_lost(world: World, undisturbed: Path, tmp_path: Path) -> None:
    """One node in the harvest and one in the training; one set of artifacts. The last test of its cluster."""
    cluster, storage = world.cluster, open_store(f"s3://{world.server.bucket}/two")
    users = {name: tmp_path / f"{name}.out" for name in ("ada", "ben")}
    jobs = [submitted(world, storage.uri, out, MIDISCOVER_OWNER=name) for name, out in users.items()]
    try:
        wait_for(lambda: len(names(storage, "activations", "/block-0000")) > 4, jobs[0], "blocks")
        lost = node_with(cluster, "HarvestActor")
        assert lost is not None
        cluster.kill(lost)
        assert not names(storage, "activations", ".down_proj/manifest.json"), "the kill fell into the harvest"
        wait_for(lambda: names(storage, "sweeps", "/step-"), jobs[0], "a checkpoint")
        wait_for(lambda: node_with(cluster, "ImplicitFunc"), jobs[0], "a pack on a worker")
        lost = node_with(cluster, "ImplicitFunc")
        assert lost is not None
        cluster.kill(lost)
        assert len(names(storage, "saes", "/training.json")) < 4, "the kill fell into the training"
        codes = [job.wait(600) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    said = "".join(out.read_text() for out in users.values())
    assert codes == [0, 0], said
    assert len([node for node in cluster.nodes if node.poll() is None]) == 2, "the head and one worker are left"
    assert weights(storage) == weights(str(undisturbed))
    assert len(names(storage, "sweeps", "/sweep.json")) == 1
    for marker in names(storage, "activations", "/block-"):
        if marker.endswith(".json"):
            assert storage.exists(f"{marker.rpartition('/')[0]}/{json.loads(storage.read(marker))['file']}")
