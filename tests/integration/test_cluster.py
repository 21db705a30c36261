"""Jobs submitted to a Ray cluster of several nodes with a store in S3 and a tracker in PostgreSQL."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import requests

from midiscover.store.storage import open_store
from tests.clusters import LocalCluster, local_cluster
from tests.jobs_cli import ROOT, Done, command, environment, midiscover
from tests.postgres import fresh_database
from tests.processes import TRIAL, frozen, is_called
from tests.runs import weights, write_run
from tests.s3 import S3Server, s3_server

pytestmark = [
    pytest.mark.ray,
    pytest.mark.s3,
    pytest.mark.postgres,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
]


class World(NamedTuple):
    cluster: LocalCluster
    server: S3Server
    config: Path
    """Its model is a folder here and its text a file here."""
    store: str
    mine: dict[str, str]
    """The environment of a user: token and address of the cluster, access to the bucket for model and text."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, postgres_url: str) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("cluster")
    with s3_server() as server, fresh_database(postgres_url) as database:
        config = write_run(folder, publish={"saes": "best", "formats": ["saelens"]})
        store, nodes = f"s3://{server.bucket}/store", {**server.environment, "MIDISCOVER_DATABASE_URL": database}
        with local_cluster(folder, 2, nodes) as cluster:
            yield World(cluster, server, config, store, cluster.client() | server.environment)


@pytest.fixture(scope="module")
def submitted(world: World) -> Done:
    return midiscover("sweep", str(world.config), "--store", world.store, env=world.mine, timeout=900)


def jobs(world: World) -> list[dict[str, str]]:
    done = midiscover("jobs", "list", "--json", env=world.mine)
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_a_sweep_shows_its_progress_and_its_table_and_ends_with_its_code(submitted: Done) -> None:
    assert submitted.code == 0, submitted.out + submitted.err
    assert "submitted sweep-tiny-" in submitted.err
    assert "harvest" in submitted.err
    assert "FVU" in submitted.out
    assert "report.html" in submitted.out.splitlines()[-1]


def test_the_saes_are_those_of_a_run_here_bit_for_bit(world: World, submitted: Done, finished: Path) -> None:
    """Undisturbed, in a folder, without the cluster: model and text are read where they lie. The ids are equal too."""
    assert submitted.code == 0
    with pytest.MonkeyPatch.context() as patch:
        for name, value in world.server.environment.items():
            patch.setenv(name, value)
        there = weights(open_store(world.store))
    assert there == weights(str(finished / "store"))
    assert len(there) == 4


def test_what_was_uploaded_is_code_and_one_yaml(world: World, submitted: Done) -> None:
    (line,) = [line for line in submitted.err.splitlines() if line.startswith("uploading ")]
    assert line.endswith("MB: midiscover, jobs, serve, run.yaml")
    code = [path for name in ("midiscover", "jobs", "serve") for path in (ROOT / name).rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in code if "__pycache__" not in path.parts)
    assert float(line.split()[1]) == pytest.approx(size / 1e6, abs=0.1)
    packages = world.cluster.temp.glob("head/session_*/runtime_resources/working_dir_files/_ray_pkg_*")
    unpacked = next(path for path in packages if path.is_dir())
    assert {path.name for path in unpacked.iterdir()} >= {"midiscover", "jobs", "serve", "run.yaml"}
    text = (unpacked / "run.yaml").read_text()
    assert "id: store:model-llama" in text
    assert f"source: {world.store}/texts/" in text
    assert not [*unpacked.rglob("*.safetensors"), *unpacked.rglob("text.jsonl")]


def test_no_secret_stands_in_what_the_cluster_tells_of_a_job(world: World, submitted: Done) -> None:
    assert submitted.code == 0
    secrets = [world.server.environment["AWS_SECRET_ACCESS_KEY"], world.cluster.token]
    secrets.append(world.cluster.variables["MIDISCOVER_DATABASE_URL"].partition("@")[0])
    header = {"Authorization": f"Bearer {world.cluster.token}"}
    told = requests.get(f"{world.cluster.url}/api/jobs/", headers=header, timeout=10).text
    assert "sweep-tiny-" in told
    logs = midiscover("jobs", "logs", jobs(world)[0]["id"], env=world.mine)
    for secret in secrets:
        assert secret not in told + logs.out + logs.err + submitted.out + submitted.err


def test_the_next_stages_find_it_and_a_second_run_does_nothing(world: World, submitted: Done) -> None:
    assert submitted.code == 0
    done = midiscover("pipeline", str(world.config), "--store", world.store, env=world.mine, timeout=900)
    assert done.code == 0, done.err
    assert "every SAE of the grid is trained" in done.err or "harvest" not in done.err
    assert "exports/saelens" in done.out
    sweep = midiscover("runs", "list", "--json", "--store", world.store, env=world.cluster.variables)
    (row,) = json.loads(sweep.out)
    features = midiscover("features", row["id"], "--store", world.store, env=world.mine, timeout=300)
    assert (features.code, "nothing is read" in features.err) == (0, True), features.err


def test_the_doctor_looks_at_every_node(world: World) -> None:
    done = midiscover("doctor", str(world.config), "--store", world.store, env=world.mine, timeout=300)
    assert done.code == 0, done.out + done.err
    assert "(driver)" in done.out
    # Of the driver and of both workers; the head, which runs no work, has no line of its own.
    assert done.out.count("reads, writes, and writes only where nothing") == 3
    assert done.out.count("its tables are") == 3
    assert world.server.environment["AWS_SECRET_ACCESS_KEY"] not in done.out
    told = midiscover("doctor", "--json", "--store", world.store, env=world.mine, timeout=300)
    machines = {found["machine"] for found in json.loads(told.out)}
    assert sum("(driver)" in machine for machine in machines) == 1
    assert len(machines) == 3


def stop_at_a_checkpoint(world: World, job: str, following: subprocess.Popen[bytes]) -> Done:
    """What trains is frozen from before a checkpoint is seen until the job is stopped, so that it can't end before."""
    storage = open_store(world.store)
    ends = time.monotonic() + 240
    while True:
        below = [one for node in world.cluster.nodes for one in psutil.Process(node.pid).children(recursive=True)]
        with frozen([one for one in below if is_called(one, TRIAL)]):
            if any("/packs/" in key for key in storage.list("sweeps")):
                return midiscover("jobs", "stop", job[:12], env=world.mine)
        assert time.monotonic() < ends, "no checkpoint within 240 s"
        assert following.poll() is None, "the job ended before a checkpoint"
        time.sleep(0.2)


def test_a_job_is_stopped_and_goes_on_later(world: World) -> None:
    slow = ("--name", "slow", "--train.epochs", "40", "--train.checkpoint_every", "0.2", "--store", world.store)
    done = midiscover("sweep", str(world.config), *slow, "--detach", env=world.mine)
    assert done.code == 0, done.err
    job = done.out.strip()
    following = subprocess.Popen(
        command("jobs", "logs", "-f", job), env=environment(world.mine), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert following.stderr is not None
    for line in following.stderr:
        if b"SAEs of" in line:
            break
    with pytest.MonkeyPatch.context() as patch:
        for name, value in world.server.environment.items():
            patch.setenv(name, value)
        stopped = stop_at_a_checkpoint(world, job, following)
    assert stopped.code == 0, stopped.err
    assert f"{job}: stopped" in stopped.out
    following.communicate(timeout=60)
    assert following.returncode == 143
    assert {found["id"]: found["status"] for found in jobs(world)}[job] == "stopped"
    again = midiscover("sweep", str(world.config), *slow, env=world.mine, timeout=600)
    assert again.code == 0, again.err
    assert "resumed at step" in again.err
    assert "report.html" in again.out.splitlines()[-1]


def test_a_job_that_fails_gives_its_code(world: World) -> None:
    """What only the driver can know is said by it, once, with the code that it would have had here."""
    done = midiscover(
        *("sweep", str(world.config), "--store", world.store, "--harvest.hooks", "model.layers.9.mlp"), env=world.mine
    )
    assert (done.code, "layer 9 is out of range" in done.err) == (2, True), done.err
