"""Packs that hang: every report of a pack's process renews its lease, and one that lets it run out is killed.

Tune or Ray Train starts it again, and the pack goes on from its checkpoint; one that hangs again and again is given up,
so that it can't hold its slot for ever while others finish.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.board import Board, Event

KILL_SECONDS = 60.0


class Place(NamedTuple):
    """A process of a pack."""

    rank: int
    node: str
    pid: int
    whole: str
    """The pack that Tune knows, where this is a part of it."""


@dataclass(kw_only=True)
class _Lease:
    places: dict[int, Place] = field(default_factory=dict)
    seen: float = 0.0


def here(rank: int, whole: str) -> Place:
    """This process; in one that is no part of Ray, asking Ray for its node would start one."""
    node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
    return Place(rank, node, os.getpid(), whole)


def hangs_key(pack: str) -> str:
    """Where the board keeps how often a pack hung."""
    return f"hangs {pack}"


class Leases:
    """Those of all packs of a stage; lives in the driver."""

    def __init__(self, seconds: float, say: Callable[[str, str], None], clock: Callable[[], float] = time.monotonic):
        """seconds: without a report, after which a pack counts as hung. say: tells people of a pack."""
        self.seconds, self.say, self.clock = seconds, say, clock
        self.leases: dict[str, _Lease] = {}
        self.hangs: dict[str, int] = {}

    def on_event(self, event: Event) -> None:
        """`started` takes a lease, a step forward of the pack or its language model renews it, `left` gives it back."""
        if event.kind == "started":
            lease = self.leases.setdefault(event.key, _Lease())
            lease.places[event.data.rank] = event.data
            lease.seen = self.clock()
        elif event.kind == "left":
            self.leases.pop(event.key, None)
        elif event.kind in ("pack", "read", "committed") and event.key in self.leases:
            self.leases[event.key].seen = self.clock()

    def expired(self) -> list[str]:
        """Packs whose lease has run out."""
        return [pack for pack, lease in self.leases.items() if self.clock() - lease.seen > self.seconds]

    def reap(self, board: Board) -> bool:
        """Kill the processes of packs whose lease has run out; whether there were any."""
        packs = self.expired()
        for pack in packs:
            places = self.leases.pop(pack).places.values()
            for whole in {place.whole for place in places}:
                self.hangs[whole] = self.hangs.get(whole, 0) + 1
                board.exchange(hangs_key(whole), self.hangs[whole])
            self.say(pack, f"it has not moved for {self.seconds:g} s; its process is killed and started again")
            for place in places:
                _kill_at(place)
        return bool(packs)


def _kill_at(place: Place) -> None:
    strategy = NodeAffinitySchedulingStrategy(place.node, soft=False)
    kill: Any = ray.remote(kill_worker).options(num_cpus=0, max_retries=0, scheduling_strategy=strategy)
    with suppress(Exception):  # Ray raises its own kinds for a node that is gone, and with it the process
        ray.get(kill.remote(place.pid), timeout=KILL_SECONDS)


def kill_worker(pid: int) -> None:
    """kill -9 of a Ray worker of this machine; another process that has its number by now is left alone."""
    command = Path(f"/proc/{pid}/cmdline")
    if command.parent.parent.is_dir() and not (command.is_file() and command.read_bytes().startswith(b"ray::")):
        return
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
