"""A bucket that fails: requests refused, replies lost, bodies cut, the server away, the server killed.

Each test counts the faults, so that it shows they happened. What single requests survive is in integration/test_s3.py.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from midiscover.errors import StoreError
from midiscover.store import s3
from midiscover.store.s3 import S3Storage
from midiscover.store.storage import open_store
from tests.faults.s3proxy import FaultProxy
from tests.faults.slow import SLOW
from tests.jobs_cli import command, environment
from tests.postgres import fresh_database
from tests.runs import weights, write_run
from tests.s3 import S3Server, s3_server

pytestmark = [pytest.mark.s3, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with s3_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def proxy(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


def test_requests_that_are_refused_lost_and_cut(server: S3Server, proxy: FaultProxy) -> None:
    """R14, R16, R17: a third of all requests meets a fault, and nobody sees one."""
    storage = S3Storage(server.bucket, "faults")
    proxy.shares = {"503": 0.15, "lost": 0.15, "cut": 0.15}

    def commit(number: int) -> bool:
        data = f"{number} ".encode() * 3000
        ours = storage.create(f"marker-{number}", data)
        return ours and storage.read(f"marker-{number}") == data

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(commit, range(200)))
    assert min(proxy.broken["503"], proxy.broken["lost"], proxy.broken["cut"]) >= 10, proxy.broken
    proxy.shares = {}
    assert len(storage.list("")) == 200
    storage.close()


def test_a_server_that_is_away_is_waited_for(
    server: S3Server, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R15: for longer than botocore itself would; and one that stays away ends in a sentence."""
    monkeypatch.setattr(s3, "_ATTEMPTS", 2)
    storage = S3Storage(server.bucket, "away")
    storage.write("before", b"1")
    proxy.down = True
    back = threading.Timer(8, setattr, (proxy, "down", False))
    back.start()
    began = time.monotonic()
    storage.write("after", b"2")
    assert time.monotonic() - began >= 7
    assert (storage.read("before"), storage.read("after")) == (b"1", b"2")
    assert proxy.broken["down"] >= 4
    proxy.down = True
    monkeypatch.setattr(s3, "_PATIENCE_SECONDS", 2.0)
    with pytest.raises(StoreError, match="does not answer"):
        storage.read("before")
    storage.close()


@pytest.mark.long
def test_what_a_server_acknowledged_it_has_after_a_crash(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """R18: kill -9 in the middle of writes, twice; the writers wait for it to come back."""
    monkeypatch.setattr(s3, "_ATTEMPTS", 2)  # whose pauses are short
    if server.crash is None:
        pytest.skip("the server is not ours to kill")
    storage = S3Storage(server.bucket, "crash")
    acknowledged: list[int] = []
    ended = threading.Event()

    def write() -> None:
        number = 0
        while not ended.is_set():
            storage.write(f"object-{number}", f"{number} ".encode() * 5000)
            acknowledged.append(number)
            number += 1

    writer = threading.Thread(target=write)
    writer.start()
    for _ in range(2):
        before = len(acknowledged)
        while len(acknowledged) < before + 100:
            time.sleep(0.01)
        server.crash()
    before = len(acknowledged)
    while len(acknowledged) < before + 20:
        time.sleep(0.05)
    ended.set()
    writer.join(60)
    assert len(acknowledged) >= 220
    for number in acknowledged:
        assert storage.read(f"object-{number}") == f"{number} ".encode() * 5000
    storage.close()


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.postgres
def test_a_sweep_whose_bucket_fails_all_the_time_and_goes_away(
    server: S3Server, proxy: FaultProxy, postgres_url: str, undisturbed: Path, tmp_path: Path
) -> None:
    config = write_run(tmp_path, **SLOW)
    with fresh_database(postgres_url) as database:
        proxy.shares = {"503": 0.05, "lost": 0.05, "cut": 0.05}
        mine = server.environment | {"AWS_ENDPOINT_URL": proxy.endpoint, "MIDISCOVER_DATABASE_URL": database}
        uri = server.uri("store")
        with (tmp_path / "out").open("wb") as out:
            sweep = subprocess.Popen(
                command("sweep", str(config), "--store", uri), env=environment(mine), stdout=out, stderr=out
            )
        try:
            storage = open_store(uri)
            ends = time.monotonic() + 300
            while not any("/step-" in key for key in storage.list("sweeps")):
                assert sweep.poll() is None, (tmp_path / "out").read_text()
                assert time.monotonic() < ends
                time.sleep(0.2)
            proxy.down = True
            time.sleep(30)
            assert sweep.poll() is None, "it waits"
            away = proxy.broken["down"]
            proxy.down = False
            code = sweep.wait(400)
        finally:
            sweep.kill()
    assert code == 0, (tmp_path / "out").read_text()
    assert away > 0
    assert min(proxy.broken["503"], proxy.broken["lost"], proxy.broken["cut"]) > 0, proxy.broken
    proxy.shares = {}
    assert weights(open_store(uri)) == weights(str(undisturbed))
