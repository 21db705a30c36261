"""`midiscover serve` on Ray Serve, as a user runs it: over HTTP, with a job started by request, until Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests
from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT

from tests.jobs_cli import refused
from tests.runs import write_run
from tests.served import served, store, store_to_serve
from tests.serving import Deployment, deployed

# Jobs of `midiscover serve` stand back from all else on the machine, so from another test too.
pytestmark = [pytest.mark.alone, pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]
__all__ = ["store", "store_to_serve"]  # fixtures
NUMBERS = ("requests", "tokens", "request_ms", "batch_tokens", "sae_loads", "cache_bytes")


@pytest.fixture(scope="module", autouse=True)
def another_ray() -> Iterator[None]:
    """The port that every Ray's agent wants is taken, as by another Ray on this machine."""
    with socket.socket() as taken:
        with contextlib.suppress(OSError):  # there is one in fact
            taken.bind(("", DEFAULT_DASHBOARD_AGENT_LISTEN_PORT))
            taken.listen()
        yield


@pytest.fixture(scope="module")
def running(store: Path) -> Iterator[Deployment]:
    folder = store.parent / "configs"
    folder.mkdir()
    write_run(store.parent).rename(folder / "tiny.yaml")
    with deployed(store, "--configs", str(folder), "--refresh_seconds", "0.5") as found:
        yield found


def test_it_answers_over_http_as_in_this_process(running: Deployment, store: Path) -> None:
    body = {"texts": ["The river ran past the old mill.", "Entry 12."], "top_k": 4}
    with served(store) as here:
        expected = here.post("/interpret", body).json()
        answer = running.post("/interpret", body)
        assert answer.status_code == 200
        got = answer.json()
        assert got["texts"][0]["tokens"] == expected["texts"][0]["tokens"]
        (name,) = got["texts"][0]["saes"]
        for mine, theirs in zip(got["texts"], expected["texts"], strict=True):
            for one, other in zip(mine["saes"][name]["features"], theirs["saes"][name]["features"], strict=True):
                assert one["feature"] == other["feature"]
                assert one["values"] == pytest.approx(other["values"], abs=1e-5)
    assert requests.get(f"{running.address}/health", timeout=10).json()["status"] == "ok"
    assert requests.get(f"{running.address}/saes", timeout=10).status_code == 401
    assert "swagger" in running.get("/docs").text


def test_steering_arrives_piece_by_piece(running: Deployment) -> None:
    body = {"prompt": "The river", "features": [{"feature": 3, "value": 5.0}], "max_new_tokens": 5, "stream": True}
    with running.post("/steer", body, stream=True) as answer:
        frames = [json.loads(line.removeprefix(b"data: ")) for line in answer.iter_lines() if line]
    assert len(frames) >= 2
    assert frames[-1]["done"]
    whole = running.post("/steer", body | {"stream": False}).json()
    assert {side: frames[-1][side] for side in ("steered", "default")} == {s: whole[s] for s in ("steered", "default")}


def test_nothing_of_it_listens_beyond_this_machine(running: Deployment) -> None:
    port = int(running.address.rpartition(":")[2])
    listening = [one.laddr for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN and one.laddr]
    assert {address.ip for address in listening if address.port == port} == {"127.0.0.1"}
    ports = {
        one.laddr.port
        for replica in running.workers("ServeReplica:midiscover")
        for one in replica.net_connections("tcp")
        if one.status == psutil.CONN_LISTEN and one.laddr and one.laddr.port != port
    }
    assert ports, "Ray's own, which ask for its token"
    for port in ports:
        with pytest.raises(requests.RequestException):
            requests.get(f"http://127.0.0.1:{port}/health", timeout=5)


def test_a_second_one_on_its_port_is_refused(running: Deployment, store: Path) -> None:
    done = refused("serve", "--store", str(store), "--port", running.address.rpartition(":")[2])
    assert done.code == 2
    assert "can't be listened on" in done.err


def nice(running: Deployment, title: str) -> dict[int, int]:
    """Process -> its niceness now, of those called so, shells aside."""
    found = {}
    for process in running.workers(title):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name() != "sh" and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = process.nice()
    return found


def test_a_job_is_started_followed_and_its_saes_are_served_while_requests_go_on(running: Deployment) -> None:
    before = {sae["id"] for sae in running.get("/saes").json()["saes"]}
    started = running.post("/train", {"config": "tiny", "overrides": {"train.seed": 3}})
    assert started.status_code == 202, started.text
    job, seen, ends = started.json()["id"], [], time.monotonic() + 300
    niceness: dict[int, int] = {}  # as last seen: a driver that has just begun has not imported our package
    while True:
        niceness |= nice(running, "-m jobs.sweep") | nice(running, "ImplicitFunc.train")
        shown = running.get(f"/jobs/{job}").json()
        seen += [line["percent"] for line in shown["progress"]]
        assert running.post("/interpret", {"text": "The river"}).status_code == 200
        if shown["status"] not in ("pending", "running"):
            break
        assert time.monotonic() < ends, f"{shown}\n{running.processes()}"
        time.sleep(1)
    assert shown["status"] == "succeeded", shown["log"]
    assert 100 in seen
    assert set(niceness.values()) == {15}, "training gives way to the model that answers"
    assert set(nice(running, "ServeReplica:midiscover").values()) == {0}
    assert job in [row["id"] for row in running.get("/jobs").json()["jobs"]]
    while len(new := {sae["id"] for sae in running.get("/saes").json()["saes"]} - before) < 4:
        assert time.monotonic() < ends
        time.sleep(0.2)
    assert running.post("/interpret", {"text": "The river", "sae": min(new)}).status_code == 200


def test_a_job_is_stopped(running: Deployment) -> None:
    job = running.post("/train", {"config": "tiny", "overrides": {"train.seed": 4, "train.epochs": 300}}).json()["id"]
    ends = time.monotonic() + 120
    while running.get(f"/jobs/{job}").json()["status"] == "pending":
        assert time.monotonic() < ends
        time.sleep(0.5)
    headers = running.headers()
    assert requests.delete(f"{running.address}/jobs/{job}", headers=headers, timeout=60).json()["stopping"]
    while running.get(f"/jobs/{job}").json()["status"] != "stopped":
        assert time.monotonic() < ends
        time.sleep(0.5)
    assert running.get("/jobs/nothing").status_code == 404


def scraped(port: int, headers: dict[str, str]) -> set[str]:
    """What Prometheus would be told to read, where this port is the dashboard's."""
    try:
        found = requests.get(f"http://127.0.0.1:{port}/api/prometheus/sd", headers=headers, timeout=10).json()
    except (requests.RequestException, ValueError):
        return set()
    return {target for group in found for target in group["targets"]}


def numbers_of(target: str, headers: dict[str, str]) -> str:
    """One target's page, or nothing: Ray names its autoscaler's fixed port where another Ray here has it, too."""
    try:
        return requests.get(f"http://{target}/metrics", headers=headers, timeout=10).text
    except requests.ConnectionError:
        return ""


def test_numbers_reach_prometheus_without_texts_or_keys(running: Deployment) -> None:
    secret = "nobody else's business"
    running.post("/interpret", {"text": secret})
    (dashboard,) = running.workers("ray/dashboard/dashboard.py")
    headers = {"Authorization": f"Bearer {dashboard.environ()['RAY_AUTH_TOKEN']}"}
    ports = {one.laddr.port for one in dashboard.net_connections("tcp") if one.status == psutil.CONN_LISTEN}
    ends, text = time.monotonic() + 60, ""
    while not all(f"midiscover_{name}" in text for name in NUMBERS):
        assert time.monotonic() < ends, text[-500:]
        for target in {target for port in ports for target in scraped(port, headers)}:
            text += numbers_of(target, headers)
        time.sleep(1)
    assert secret not in text
    assert running.key not in text


def test_ctrl_c_ends_it_and_nothing_stays(store_to_serve: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(store_to_serve, tmp_path / "store")
    with deployed(mine) as found:
        assert (mine / "tracker.db-wal").exists()
        children = psutil.Process(found.process.pid).children(recursive=True)
        assert len(children) > 3
        assert found.workers("ServeReplica:midiscover:together")
        assert not found.workers("ProxyActor")
        assert found.end() == 0
        psutil.wait_procs(children, timeout=20)
        assert [child for child in children if child.is_running()] == []
        with pytest.raises(requests.ConnectionError):
            requests.get(f"{found.address}/health", timeout=5)
    assert not [*mine.glob("tracker.db-*")]
