"""Whole nodes of a cluster are killed while a submitted sweep runs: one in the harvest, one in the training.

The SAEs equal, bit for bit, those of an undisturbed run on one machine; the test shows that its kills fell into work.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import boto3
import psutil
import pytest

from midiscover.store.storage import Storage, open_store
from tests.clusters import LocalCluster, local_cluster
from tests.faults.test_kills import SLOW
from tests.jobs_cli import command, environment, midiscover
from tests.postgres import fresh_database
from tests.runs import weights, write_run
from tests.s3 import S3Server, s3_server

pytestmark = [
    pytest.mark.alone,
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
    store: str


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
        write_run(folder)
        client = boto3.client("s3", endpoint_url=server.endpoint, region_name="us-east-1")
        client.upload_file(str(folder / "text.jsonl"), server.bucket, "texts/text.jsonl")
        corpus = {"source": f"s3://{server.bucket}/texts", "context_size": 32, "max_tokens": 24_000}
        config = write_run(folder, corpus=corpus, **SLOW)
        nodes = {**server.environment, "MIDISCOVER_DATABASE_URL": database}
        with local_cluster(folder, 3, nodes) as cluster:
            yield World(cluster, server, config, f"s3://{server.bucket}/store")


def wait_for(condition: Callable[[], object], job: subprocess.Popen[bytes], what: str, seconds: float = 300) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert job.poll() is None, f"the job ended before {what}"
        assert time.monotonic() < ends, f"no {what} within {seconds:.0f} s"
        time.sleep(0.2)


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


def test_a_node_lost_in_the_harvest_and_one_in_the_training(world: World, tmp_path: Path) -> None:
    cluster, storage = world.cluster, open_store(world.store)
    mine = environment(cluster.client() | world.server.environment)
    words = command("sweep", str(world.config), "--store", world.store)
    with (tmp_path / "job.out").open("wb") as out:
        job = subprocess.Popen(words, env=mine, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: len(names(storage, "activations", "/block-0000")) > 4, job, "blocks")
        lost = node_with(cluster, "HarvestActor")
        assert lost is not None
        cluster.kill(lost)
        assert not names(storage, "activations", ".down_proj/manifest.json"), "the kill fell into the harvest"
        wait_for(lambda: names(storage, "sweeps", "/step-"), job, "a checkpoint")
        wait_for(lambda: node_with(cluster, "ImplicitFunc"), job, "a pack on a worker")
        lost = node_with(cluster, "ImplicitFunc")
        assert lost is not None
        cluster.kill(lost)
        assert len(names(storage, "saes", "/training.json")) < 4, "the kill fell into the training"
        job.wait(600)
    finally:
        job.kill()
    said = (tmp_path / "job.out").read_text()
    assert job.returncode == 0, said
    assert len([node for node in cluster.nodes if node.poll() is None]) == 2, "the head and one worker are left"
    there = weights(storage)
    here = world.server.environment | {"MIDISCOVER_CLUSTER": ""}
    done = midiscover("sweep", str(world.config), "--store", str(tmp_path / "store"), env=here, timeout=600)
    assert done.code == 0, done.err
    assert there == weights(str(tmp_path / "store"))
    assert len(there) == 4
