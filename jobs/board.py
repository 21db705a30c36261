"""How workers are seen: they post events to one small actor, and a thread of the driver shows and records them.

The same board serves language-model actors, Tune trials and Ray Train workers, so that progress does not depend on
which of them does the work. The driver's thread is also the watchdog: a stage in which nothing moves is ended.
"""

from __future__ import annotations

import _thread
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from midiscover.errors import StageError

POLL_SECONDS = 0.3
JOIN_SECONDS = 10.0
MAX_DEATHS = 10
"""Deaths of a process in a row, none of them further than one before, after which its work counts as failed."""


class Event(NamedTuple):
    """One thing that happened in a worker."""

    kind: str
    """`tokens`, `started`, `left`, `resumed`, `pack`, `read`, `committed`, `retry`, `trained`, `retired`, `failed`,
    `loaded`, `measured` or `spliced`."""
    key: str
    """The pack, SAE or hook it is about."""
    data: Any


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class BoardActor:
    """A queue of events. Lost events cost a line of progress, never a result.

    What events are made of must not import torch: this process would do so while everything else starts.
    """

    def __init__(self) -> None:
        self.events: deque[Event] = deque()
        self.memory: dict[str, Any] = {}
        self.starts: dict[str, int] = {}
        self.furthest: dict[str, int] = {}

    def post(self, events: list[Event]) -> None:
        """Add events; called by workers, who do not wait."""
        self.events.extend(events)

    def drain(self) -> list[Event]:
        """Take all events so far."""
        taken = list(self.events)
        self.events.clear()
        return taken

    def exchange(self, key: str, value: Any) -> Any:
        """Remember `value` under `key`; returns what was remembered before, or None."""
        before = self.memory.get(key)
        self.memory[key] = value
        return before

    def recall(self, key: str) -> Any:
        """What is remembered under `key`, or None."""
        return self.memory.get(key)

    def start(self, work: str) -> int:
        """Count a start of `work`; returns how many there were since it last came further."""
        self.starts[work] = self.starts.get(work, 0) + 1
        return self.starts[work]

    def reach(self, work: str, part: str, step: int) -> None:
        """A part of `work` stands at `step`, from which it goes on wherever it is started again.

        Where an earlier try has come so far, that is no progress: it is what this one made again.
        """
        if step > self.furthest.get(part, -1):
            self.furthest[part] = step
            self.starts.pop(work, None)


class Board:
    """A worker's handle on the board. Pickles."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def post(self, kind: str, key: str, data: Any = None) -> None:
        """Say that something happened, without waiting."""
        self.actor.post.remote([Event(kind, key, data)])

    def exchange(self, key: str, value: Any) -> Any:
        """Leave a word for the next process that does this work; returns the last one's, or None. Waits."""
        return ray.get(self.actor.exchange.remote(key, value))

    def recall(self, key: str) -> Any:
        """The word that stands there; waits."""
        return ray.get(self.actor.recall.remote(key))

    def start(self, work: str) -> int:
        """Count a start of `work`; returns how many there were since it last came further. Waits."""
        return ray.get(self.actor.start.remote(work))

    def reach(self, work: str, part: str, step: int) -> None:
        """Say that a part of `work` stands at `step` for good, without waiting; if no try came so far before, the
        starts of `work` are counted anew."""
        self.actor.reach.remote(work, part, step)


@contextmanager
def watched(
    stage: str,
    on_event: Callable[[Event], bool],
    *,
    stall_seconds: float,
    look: Callable[[Board], bool] = lambda _: False,
) -> Iterator[Board]:
    """A board whose events reach `on_event` in a thread of the driver while the body runs.

    `on_event` returns whether the event is a step forward, and so does `look`, called after each round of events;
    StageError when there was none for `stall_seconds`. An error in either ends the stage with that error.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor: Any = BoardActor.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]  # ray adds it
    watcher = _Watcher(stage, actor, on_event, stall_seconds, look)
    watcher.start()
    try:
        yield Board(actor)
        watcher.finish()
    except KeyboardInterrupt:
        if watcher.error is not None:  # the interrupt was the watcher's
            raise watcher.error from None
        raise
    finally:
        # The thread must be out of Ray before Ray is shut down; it polls and never waits longer than a call takes.
        watcher.ended.set()
        watcher.join(JOIN_SECONDS)
        ray.kill(actor)
    if watcher.error is not None:
        raise watcher.error


class _Watcher(threading.Thread):
    def __init__(
        self,
        stage: str,
        actor: Any,
        on_event: Callable[[Event], bool],
        stall_seconds: float,
        look: Callable[[Board], bool],
    ) -> None:
        super().__init__(name=f"{stage}-watcher", daemon=True)
        self.stage, self.actor, self.on_event, self.stall_seconds, self.look = (
            stage,
            actor,
            on_event,
            stall_seconds,
            look,
        )
        self.error: BaseException | None = None
        self.ended = threading.Event()
        self.moved = time.monotonic()

    def run(self) -> None:
        while not self.ended.wait(POLL_SECONDS):
            try:
                self._drain()
                if self.look(Board(self.actor)):
                    self.moved = time.monotonic()
                if time.monotonic() - self.moved > self.stall_seconds:
                    raise StageError(
                        f"Nothing has moved in the {self.stage} for {self.stall_seconds:g} s, so it was ended. Run the "
                        "same command again to go on; resources.stall_seconds sets how long to wait."
                    )
            except Exception as error:  # handed to the main thread, which waits inside Ray
                self.error = error
                if not self.ended.is_set():
                    # A driver in a script's background ignores SIGINT, and interrupt_main does then nothing.
                    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
                    _thread.interrupt_main(signal.SIGTERM if ignored else signal.SIGINT)
                return

    def finish(self) -> None:
        """Stop polling, after the last events are handled."""
        self.ended.set()
        self.join()
        if self.error is None:
            self._drain()

    def _drain(self) -> None:
        events = ray.get(self.actor.drain.remote(), timeout=60)
        for event in events:
            if self.on_event(event):
                self.moved = time.monotonic()
