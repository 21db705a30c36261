"""Leases of packs: what renews them, what runs them out, and what is killed then."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jobs import leases
from jobs.board import Event
from jobs.leases import Leases, Place, hangs_key, kill_worker


class Board:
    def __init__(self) -> None:
        self.memory: dict[str, Any] = {}

    def exchange(self, key: str, value: Any) -> Any:
        self.memory[key] = value


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[Place]:
    found: list[Place] = []
    monkeypatch.setattr(leases, "_kill_at", found.append)
    return found


def test_a_pack_that_reports_lives_and_one_that_does_not_is_killed(killed: list[Place]) -> None:
    now, said, board = [0.0], [], Board()
    kept = Leases(10, lambda pack, text: said.append((pack, text)), lambda: now[0])
    for pack in ("a", "b"):
        kept.on_event(Event("started", pack, Place(0, "node", 1, pack)))
    kept.on_event(Event("started", "b", Place(1, "other", 2, "b")))
    now[0] = 9
    kept.on_event(Event("pack", "a", None))
    assert not kept.reap(board)
    now[0] = 11
    assert kept.reap(board)
    assert sorted(killed) == [Place(0, "node", 1, "b"), Place(1, "other", 2, "b")]
    assert board.memory == {hangs_key("b"): 1}
    assert [pack for pack, _ in said] == ["b"]
    assert not kept.reap(board), "once killed, it has no lease until it is started again"
    now[0] = 20
    assert kept.reap(board)
    assert killed[-1] == Place(0, "node", 1, "a")


def test_a_hanging_part_counts_against_its_pack_and_one_that_left_is_not_killed(killed: list[Place]) -> None:
    now, board = [0.0], Board()
    kept = Leases(10, lambda *_: None, lambda: now[0])
    kept.on_event(Event("started", "part", Place(0, "node", 1, "whole")))
    kept.on_event(Event("started", "done", Place(0, "node", 3, "done")))
    kept.on_event(Event("left", "done", None))
    now[0] = 11
    kept.reap(board)
    kept.on_event(Event("started", "part", Place(0, "node", 4, "whole")))
    now[0] = 22
    kept.reap(board)
    assert board.memory == {hangs_key("whole"): 2}
    assert [place.pid for place in killed] == [1, 4]


def test_a_pack_that_commits_its_saes_one_after_another_lives(killed: list[Place]) -> None:
    now, board = [0.0], Board()
    kept = Leases(10, lambda *_: None, lambda: now[0])
    kept.on_event(Event("started", "pack", Place(0, "node", 1, "pack")))
    for _ in range(5):
        now[0] += 6
        kept.on_event(Event("committed", "pack", None))
        assert not kept.reap(board)
    now[0] += 11
    assert kept.reap(board)
    kept.on_event(Event("committed", "pack", None))
    assert kept.expired() == [], "a word that comes late takes no lease"


def test_only_a_worker_of_ray_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        kill_worker(other.pid)
        assert other.poll() is None
        other.communicate(b"\n")
        assert other.returncode == 0
    with subprocess.Popen(["ray::pack"], executable="/bin/cat", stdin=subprocess.PIPE) as worker:
        while not Path(f"/proc/{worker.pid}/cmdline").read_bytes():  # the kernel sets it a moment after exec began
            time.sleep(0.01)
        kill_worker(worker.pid)
        assert worker.wait(10) == -9
