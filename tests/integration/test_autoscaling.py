"""A sweep on a cluster that has no node yet: it asks for three, gets them from Ray's fake provider, and finishes.

The provider starts real raylets; only the machines are not real.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.clusters import local_cluster
from tests.faults.slow import SLOW
from tests.jobs_cli import command, environment
from tests.postgres import fresh_database
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
            ray = Path(sys.executable).with_name("ray")
            status = subprocess.run(
                [str(ray), "status", "--address", cluster.gcs], env=driver, capture_output=True, text=True, check=True
            ).stdout
            assert "From request_resources:\n (none)\n" in status, status
