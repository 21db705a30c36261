"""What a sweep's driver writes down while packs train: bars, the tracker, TensorBoard files, wandb, failures.

A database that goes away never stops a sweep. What it should have been told waits in memory until it is back; the store
is the truth, and `midiscover runs reindex` makes up for a database that was away to the end. What it refuses is left
out, and said.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tensorboardX import SummaryWriter

from jobs.board import Event
from jobs.mirror import Mirror
from jobs.progress import Bars
from midiscover.errors import TrackingError, TrackingRefusedError
from midiscover.ids import hook_label, sparsity_label
from midiscover.progress import Progress
from midiscover.resolve import Pack
from midiscover.store import layout
from midiscover.store.storage import Storage
from midiscover.tracking import Tracker

FLUSH_SECONDS = 5.0
AGAIN_SECONDS = 5.0
"""How long a database that went away is left alone before it is asked again; a thread that asks waits for seconds."""


class Recorder:
    """Handles the events of a sweep's packs."""

    def __init__(self, sweep_id: str, tracker: Tracker, storage: Storage, bars: Bars) -> None:
        self.sweep_id, self.tracker, self.storage, self.bars = sweep_id, tracker, storage, bars
        self.names: dict[str, str] = {}
        self.furthest: dict[str, int] = {}
        self.failures: dict[str, str] = {}
        self.points: dict[str, dict[str, list[float]]] = {}
        self.flushed = time.monotonic()
        self.lock = threading.RLock()  # the board's thread tells, and so does the driver's own
        self.waiting: deque[Callable[[Tracker], None]] = deque()
        self.away_until: float | None = None
        self.refused = 0
        self.mirror = Mirror(sweep_id, bars.say)
        self.read = 0
        self.to_read = 0

    def expect_reading(self, tokens: int) -> None:
        """Packs will run the language model over so many tokens."""
        self.to_read = tokens

    def name_packs(self, packs: Sequence[Pack]) -> None:
        """Give each pack the name of its line: hook, sparsities and, where another pack has the same, its id."""
        for pack in packs:
            self.mirror.plan(pack.saes)
            label = "/".join(sparsity_label(sae.point.sae) for sae in pack.saes)
            name = f"{hook_label(pack.hook)} {label}"
            self.names[pack.id] = f"{name} {pack.id}" if name in self.names.values() else name

    def on_event(self, event: Event) -> bool:
        """One event of the board; whether it is a step forward."""
        match event.kind:
            case "pack":
                self._progress(event.key, event.data)
                further = event.data.step > self.furthest.get(event.key, -1)
                self.furthest[event.key] = max(event.data.step, self.furthest.get(event.key, -1))
                return further
            case "read":
                self.read += event.data
                self.bars.update("language model", min(self.read, self.to_read), self.to_read, f"{self.read:,} tokens")
                return event.data > 0
            case "resumed":
                self.say_of(event.key, f"resumed at step {event.data}")
            case "trained":
                self.points.pop(event.key, None)
                self.track(lambda tracker: tracker.record_steps(event.key, event.data))
                self.track(lambda tracker: tracker.sae_status(event.key, "trained"))
                self.mirror.points(event.key, event.data)
                self._tensorboard(event.key, event.data)
            case "failed":
                again = event.key in self.failures  # by a process that was started anew: no step forward
                self.failures[event.key] = event.data
                self.track(lambda tracker: tracker.sae_status(event.key, "failed", event.data))
                self.mirror.dropped(event.key, "failed", event.data)
                self.bars.say(f"{event.key} failed: {event.data}")
                return not again
            case "retired":
                self.track(lambda tracker: tracker.sae_status(event.key, "retired", event.data))
                self.mirror.dropped(event.key, "retired", event.data)
                self.bars.say(f"{event.key} {event.data}")
            case "retry":
                self.say_of(event.key, event.data)
        return event.kind in ("trained", "retired")

    def say_of(self, pack: str, text: str) -> None:
        """A line about a pack."""
        self.bars.say(f"{self.names.get(pack, pack)}: {text}")

    def track(self, write: Callable[[Tracker], None]) -> None:
        """One write to the tracker, after those that wait for a database that went away."""
        with self.lock:
            self.waiting.append(write)
            if self.away_until is None or time.monotonic() >= self.away_until:
                self._catch_up()

    def settle(self) -> None:
        """At the end: once more what still waits, and a word where it stays undone."""
        with self.lock:
            if self.waiting:
                self._catch_up()
            if self.refused > 1:
                self.bars.say(f"the tracker refused {self.refused} entries")
            if self.waiting:
                self.bars.say(
                    f"{len(self.waiting)} entries did not reach the tracker; `midiscover runs reindex` brings it up to "
                    "date."
                )

    def _catch_up(self) -> None:
        """Writes are idempotent, so one whose answer was lost may be made again."""
        waited = len(self.waiting) - 1
        while self.waiting:
            try:
                self.waiting[0](self.tracker)
            except TrackingRefusedError as error:  # it would be refused again, and nothing after it be told
                if not self.refused:
                    self.bars.say(f"{error} The sweep goes on without this entry.")
                self.refused += 1
            except TrackingError as error:
                if self.away_until is None:
                    self.bars.say(f"{error} The sweep goes on; what it records waits until the database is back.")
                self.away_until = time.monotonic() + AGAIN_SECONDS
                return
            self.waiting.popleft()
        if self.away_until is not None:
            self.away_until = None
            self.bars.say(f"the tracking database is back; it was told the {waited} entries that waited")

    def _progress(self, pack: str, progress: Progress) -> None:
        points = progress.latest.values()
        l0 = "/".join(f"{point['l0']:.0f}" for point in points)
        fvu = "/".join(f"{point['fvu']:.2f}" for point in points)
        note = f"L0 {l0}  FVU {fvu}  {progress.tokens_per_second:,.0f} tokens/s"
        self.bars.update(self.names.get(pack, pack), progress.step, progress.steps, note)
        for sae, point in progress.latest.items():
            columns = self.points.setdefault(sae, {name: [] for name in point})
            for name, value in point.items():
                columns[name].append(value)
        if time.monotonic() - self.flushed >= FLUSH_SECONDS:
            for sae, columns in self.points.items():
                self.track(lambda tracker, sae=sae, columns=columns: tracker.record_steps(sae, columns))
                self.mirror.points(sae, columns)
            self.points, self.flushed = {}, time.monotonic()

    def _tensorboard(self, sae: str, history: Mapping[str, Sequence[float]]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            with SummaryWriter(folder) as writer:
                for name in ("loss", "mse", "sparsity", "l0", "fvu", "lr"):
                    for step, value in zip(history["step"], history[name], strict=True):
                        writer.add_scalar(name, value, int(step))
            (file,) = Path(folder).glob("*tfevents*")
            # One name, so that a sweep that is run again replaces the curve instead of adding a second one.
            key = layout.sweep_file(self.sweep_id, f"tensorboard/{sae}/events.out.tfevents.0.midiscover")
            self.storage.write(key, file.read_bytes())
