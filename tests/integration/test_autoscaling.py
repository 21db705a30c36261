"""A sweep on a cluster that has no node yet: it asks for three, gets them from Ray's fake provider, and finishes; or it
is stopped, and none is asked for any more.

The provider starts real raylets; only the machines are not real.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from jobs.board import JOIN_SECONDS
from tests.clusters import LocalCluster, local_cluster
from tests.faults.slow import SLOW
from tests.jobs_cli import command, environment, midiscover
from tests.postgres import fresh_database
from tests.processes import frozen, is_called
from tests.runs import weights, write_run
from tests.s3 import s3_server

pytestmark = [
    pytest.mark.long,
    pytest.mark.ray,
    pytest.mark.s3,
    pytest.mark.postgres,
    pytest.mark.slow,
    pytest.mark.timeout(900),
]
NODES = 3


def test_a_sweep_gets_the_nodes_that_it_asks_for(tmp_path: Path, postgres_url: str) -> None:
    with s3_server() as server, fresh_database(postgres_url) as database:
        # Work enough that it is not done before the last node has come.
        slow = SLOW | {"train": SLOW["train"] | {"epochs": 6}}
        config = write_run(tmp_path, **slow, resources={"threads": 1, "nodes": NODES, "pack_size": 1})
        nodes = {**server.environment, "MIDISCOVER_DATABASE_URL": database}
        with local_cluster(tmp_path, 0, nodes, most=NODES) as cluster, pytest.MonkeyPatch.context() as patch:
            assert cluster.alive() == 1, "the head alone"
            driver = environment(cluster.variables | {"RAY_ADDRESS": cluster.gcs})
            out = (tmp_path / "sweep.out").open("wb")
            with out:
                words = command("sweep", str(config), "--store", f"s3://{server.bucket}/store")
                sweep = subprocess.Popen(words, env=driver, stdout=out, stderr=subprocess.STDOUT)
                most = 0
                while sweep.poll() is None:
                    most = max(most, cluster.alive())
                    time.sleep(0.5)
            said = (tmp_path / "sweep.out").read_text()
            assert sweep.returncode == 0, said
            assert most == 1 + NODES, said
            assert f"no node is there yet; {NODES} are asked for" in said
            for name, value in server.environment.items():
                patch.setenv(name, value)
            assert len(weights(f"s3://{server.bucket}/store")) == 4
            # Its provider never counts a node as idle, so that they go can't be seen here; that none is asked for can.
            assert asked_for(cluster) == "(none)"


def asked_for(cluster: LocalCluster) -> str:
    """What `ray status` tells of the requests for nodes."""
    words = [str(Path(sys.executable).with_name("ray")), "status", "--address", cluster.gcs]
    told = subprocess.run(words, env=environment(cluster.variables), capture_output=True, text=True, check=True).stdout
    return told.partition("From request_resources:\n ")[2].partition("\n")[0]


def test_a_job_that_is_slow_to_stop_gives_its_nodes_back_and_tells_the_tracker(
    tmp_path: Path, postgres_url: str
) -> None:
    """What its driver waits for on its way out is frozen, so that it takes longer than Ray's own 3 s."""
    with s3_server() as server, fresh_database(postgres_url) as database:
        config = write_run(tmp_path, train=SLOW["train"], resources={"threads": 1, "nodes": 1})
        nodes = {**server.environment, "MIDISCOVER_DATABASE_URL": database}
        with local_cluster(tmp_path, 0, nodes, most=1) as cluster:
            mine = cluster.client() | server.environment
            store = ("--store", f"s3://{server.bucket}/store")
            # Beforehand: Ray Data, which makes the corpus, puts requests for nodes of its own in the place of ours.
            harvested = midiscover("harvest", str(config), *store, env=nodes)
            assert harvested.code == 0, harvested.err
            sent = midiscover("sweep", str(config), *store, "--detach", env=mine)
            assert sent.code == 0, sent.err
            head, ends, board = psutil.Process(cluster.nodes[0].pid), time.monotonic() + 240, list[psutil.Process]()
            while not board:
                assert time.monotonic() < ends, midiscover("jobs", "logs", sent.out.strip(), env=mine).out
                time.sleep(0.2)
                board = [one for one in head.children(recursive=True) if is_called(one, ("BoardActor",))]
            assert asked_for(cluster).startswith("{'CPU': 1}: 1")
            with frozen(board):
                began = time.monotonic()
                stopped = midiscover("jobs", "stop", sent.out.strip(), env=mine)
                assert time.monotonic() - began > JOIN_SECONDS, "it was waited for"
            assert stopped.code == 0, stopped.err
            assert asked_for(cluster) == "(none)"
            (row,) = json.loads(midiscover("runs", "list", "--json", *store, env=cluster.variables).out)
            assert row["status"] == "interrupted"
