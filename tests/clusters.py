"""A Ray cluster of several nodes on this machine: a head that runs no work, and workers, each a raylet of its own."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import requests

from tests.jobs_cli import environment
from tests.ports import free_port, free_ports

START_SECONDS = 180.0


@dataclass
class LocalCluster:
    """Its address, and the processes of its nodes."""

    folder: Path
    token: str
    gcs: str
    url: str
    """Of the dashboard."""
    variables: dict[str, str]
    """Of the nodes."""
    temp: Path
    """Ray's own files."""
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    """The head, then the workers that were added."""

    def client(self) -> dict[str, str]:
        """Variables of a user who submits: the token and the address, and nothing else that nodes have."""
        return {"RAY_AUTH_TOKEN": self.token, "MIDISCOVER_CLUSTER": self.url}

    def add_worker(self, cpus: int = 2, core: int | None = None) -> subprocess.Popen[bytes]:
        """One more node; core: the only one it may use; a raylet takes it from its starter and hands it on."""
        if core is None:
            return self._add(cpus)
        mine = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {core})
        try:
            return self._add(cpus)
        finally:
            os.sched_setaffinity(0, mine)

    def _add(self, cpus: int) -> subprocess.Popen[bytes]:
        before = self.alive()
        # A folder of its own: in a shared one, a node that unpacks a job's code takes the other's from under it.
        temp = self.temp / f"w{len(self.nodes)}"
        node = self._start("--address", self.gcs, "--num-cpus", str(cpus), "--temp-dir", str(temp))
        wait_until(lambda: self.alive() > before, "a worker", node)
        return node

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """kill -9 of all processes of a node."""
        tree = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
        for process in tree:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        node.wait()

    def alive(self) -> int:
        """Nodes that the cluster counts, the head among them."""
        try:
            answer = requests.get(f"{self.url}/nodes?view=summary", headers=self._header(), timeout=5).json()
            return sum(node["raylet"].get("state") == "ALIVE" for node in answer["data"]["summary"])
        except (requests.RequestException, LookupError, ValueError):
            return 0

    def _header(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def _start(self, *flags: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *flags, "--block", "--disable-usage-stats"]
        # Agents have fixed ports by default, which two nodes of one machine can't share; the head's starts jobs.
        agent = free_port()
        command += ["--object-store-memory", str(100 * 2**20), "--dashboard-agent-listen-port", str(agent)]
        with (self.folder / f"node-{len(self.nodes)}.out").open("wb") as out:
            node = subprocess.Popen(
                command, env=self.variables, cwd=self.folder, stdout=out, stderr=out, start_new_session=True
            )
        self.nodes.append(node)
        return node


def autoscaling(gcs: int, most: int, cpus: int) -> dict[str, Any]:
    """A cluster of Ray's fake provider, which starts its nodes as processes on this machine, from none up to `most`."""
    nodes = {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {
            "resources": {"CPU": cpus, "object_store_memory": 100 * 2**20},
            "node_config": {},
            "min_workers": 0,
            "max_workers": most,
        },
    }
    return {
        "cluster_name": "grows",
        "max_workers": most,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.1,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": f"127.0.0.1:{gcs}",
            "launch_multiple": True,
            # Nobody logs in to its nodes.
            **dict.fromkeys(("disable_node_updaters", "disable_launch_config_check"), True),
        },
        "available_node_types": nodes,
        "head_node_type": "ray.head.default",
        **dict.fromkeys(("auth", "docker", "file_mounts"), {}),
        **dict.fromkeys(
            (
                *("initialization_commands", "setup_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter"),
                *(f"{role}_{what}" for role in ("head", "worker") for what in ("setup_commands", "start_ray_commands")),
            ),
            [],
        ),
    }


@contextmanager
def local_cluster(
    folder: Path, workers: int, extra: Mapping[str, str], *, cpus: int = 2, most: int = 0
) -> Iterator[LocalCluster]:
    """A head without CPUs and `workers` nodes, whose environment has `extra`; ended by pid, whatever happens.

    most: how many nodes an autoscaler may add.
    """
    gcs, dashboard = free_ports(2)
    token = secrets.token_hex(32)
    temp = Path(f"/tmp/mdc-{secrets.token_hex(4)}")  # sockets have short paths
    temp.mkdir(mode=0o700)
    variables = environment(extra) | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    variables.pop("PYTHONPATH")  # what runs there is what was uploaded
    grows: list[str] = []
    if most:
        plan = folder / "autoscaling.yaml"
        plan.write_text(json.dumps(autoscaling(gcs, most, cpus)))
        grows = ["--autoscaling-config", str(plan)]
        variables |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    cluster = LocalCluster(folder, token, f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", variables, temp)
    try:
        head = cluster._start(
            *("--head", "--port", str(gcs), "--num-cpus", "0"),
            *("--include-dashboard", "true", "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)),
            *("--temp-dir", str(temp / "head")),
            *grows,
        )
        wait_until(lambda: cluster.alive() >= 1, "the head", head)
        for _ in range(workers):
            cluster.add_worker(cpus)
        yield cluster
    finally:
        for node in reversed(cluster.nodes):
            if node.poll() is None:
                cluster.kill(node)
            try:
                os.killpg(node.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        shutil.rmtree(temp, ignore_errors=True)


def wait_until(condition: Callable[[], bool], what: str, node: subprocess.Popen[bytes]) -> None:
    ends = time.monotonic() + START_SECONDS
    while not condition():
        assert node.poll() is None, f"the node ended before {what} was there"
        assert time.monotonic() < ends, f"no {what} within {START_SECONDS:.0f} s"
        time.sleep(0.3)
