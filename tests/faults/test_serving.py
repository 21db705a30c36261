"""Deployments under load that lose a replica, ingress, proxy or all of it, and one that is asked four times too much.

R10, R11, R12 and R29 of the reliability goals. Each test shows that its process was killed while requests were under
way.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import requests

from tests.served import store_to_serve
from tests.serving import Deployment, deployed

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]
__all__ = ["store_to_serve"]  # a fixture
CLIENTS = 4


class Answer(NamedTuple):
    at: float
    status: int
    """0 where the connection broke."""
    seconds: float


@pytest.fixture(scope="module")
def running(store_to_serve: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    copy = tmp_path_factory.mktemp("serving") / "store"
    shutil.copytree(store_to_serve, copy)
    with deployed(copy, "--replicas", "2", "--limits.concurrent", "16", "--limits.concurrent_per_key", "16") as found:
        yield found


@contextmanager
def load(running: Deployment, clients: int = CLIENTS) -> Iterator[list[Answer]]:
    """Clients that ask one after the other until the body ends."""
    answers: list[Answer] = []
    ended = threading.Event()

    def client(number: int) -> None:
        session = requests.Session()
        count = 0
        while not ended.is_set():
            count += 1
            began = time.monotonic()
            body = {"text": f"Client {number} asks about river {count}.", "per_token": False}
            try:
                found = session.post(f"{running.address}/interpret", headers=running.headers(), json=body, timeout=60)
                status = found.status_code
            except requests.RequestException:
                session, status = requests.Session(), 0
            answers.append(Answer(began, status, time.monotonic() - began))
            if status != 200:
                time.sleep(0.05)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        ended.set()
        for thread in threads:
            thread.join(70)


def killed(running: Deployment, title: str) -> psutil.Process:
    """kill -9 of one process of Serve whose title names this."""
    victim = running.workers(title)[0]
    victim.kill()
    victim.wait(10)
    assert not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE
    return victim


def back_to(running: Deployment, title: str, count: int) -> None:
    ends = time.monotonic() + 120
    while len(running.workers(title)) < count:
        assert time.monotonic() < ends, f"{title} was not replaced"
        time.sleep(0.2)


def test_one_of_two_interpreters_is_killed_and_the_other_answers(running: Deployment) -> None:
    title = "ServeReplica:midiscover:interpreter"
    assert len(running.workers(title)) == 2
    with load(running) as answers:
        time.sleep(5)
        killed(running, title)
        at = time.monotonic()
        time.sleep(10)
        back_to(running, title, 2)
        time.sleep(5)
    told = Counter(answer.status for answer in answers)
    print(told)
    assert len([answer for answer in answers if answer.at < at]) > 20, "there was load when it was killed"
    failed = [answer for answer in answers if answer.status != 200]
    assert len(failed) <= CLIENTS, "at most those that were under way"
    assert all(answer.status == 503 for answer in failed), "told so, and worth asking again"
    assert all(answer.status == 200 for answer in answers if answer.at > at + 5)


@pytest.mark.parametrize(("title", "most"), [("ServeReplica:midiscover:ingress", 30.0), ("ProxyActor", 30.0)])
def test_what_speaks_http_is_killed_and_comes_back(running: Deployment, title: str, most: float) -> None:
    interpreters = {process.pid for process in running.workers("ServeReplica:midiscover:interpreter")}
    with load(running) as answers:
        time.sleep(4)
        killed(running, title)
        at = time.monotonic()
        back_to(running, title, 1)
        ends = at + 90
        while not any(answer.status == 200 and answer.at > at for answer in answers):
            assert time.monotonic() < ends
            time.sleep(0.1)
        time.sleep(3)
    first = min(answer.at + answer.seconds for answer in answers if answer.status == 200 and answer.at > at)
    print(f"{title}: first answer after {first - at:.1f} s; {Counter(answer.status for answer in answers)}")
    assert first - at <= most
    assert {process.pid for process in running.workers("ServeReplica:midiscover:interpreter")} == interpreters


def test_all_in_one_process_is_killed_and_comes_back(store_to_serve: Path, tmp_path: Path) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store_to_serve, copy)
    title = "ServeReplica:midiscover:together"
    with deployed(copy) as running, load(running) as answers:
        time.sleep(4)
        killed(running, title)
        at = time.monotonic()
        while not any(answer.status == 200 and answer.at > at for answer in answers):
            assert time.monotonic() < at + 90
            time.sleep(0.1)
        time.sleep(5)
        assert len(running.workers(title)) == 1
    back = min(answer.at for answer in answers if answer.status == 200 and answer.at > at)
    print(f"first answer after {back - at:.1f} s; {Counter(answer.status for answer in answers)}")
    assert len([answer for answer in answers if answer.at < at and answer.status == 200]) > 20, "there was load"
    assert {answer.status for answer in answers} <= {200, 0}, "an answer, or no connection"
    assert all(answer.status == 200 for answer in answers if answer.at > back + 1)
    assert back - at < 60


def test_four_times_too_much_is_refused_in_order_and_forgotten(running: Deployment) -> None:
    def memory() -> int:
        return sum(process.memory_info().rss for process in running.workers("ServeReplica:midiscover"))

    with load(running, 1) as quiet:
        time.sleep(4)
    before = memory()
    with load(running, 64) as answers:
        time.sleep(20)
    told = Counter(answer.status for answer in answers)
    print(told)
    assert set(told) <= {200, 429, 503}
    assert told[429] + told[503] > 0, "it was too much"
    assert told[200] > 0
    assert memory() < 1.2 * before + 50e6
    time.sleep(5)
    with load(running, 1) as after:
        time.sleep(4)
    usual, now = (sorted(answer.seconds for answer in found)[len(found) // 2] for found in (quiet, after))
    assert all(answer.status == 200 for answer in after)
    assert now < 3 * usual + 0.05
