"""How long a sweep took in all: the minutes of each of its runs that made something, as `runs/*.json` in its folder."""

from __future__ import annotations

import time
import uuid
from typing import Any

from midiscover import lineage
from midiscover.store import layout
from midiscover.store.documents import dump, read_json
from midiscover.store.storage import Storage


class Stopwatch:
    """Of one run of a sweep, from its birth on. The file of one that died has no minutes, as nobody stopped it."""

    def __init__(self, storage: Storage, sweep_id: str) -> None:
        self.storage, self.sweep_id = storage, sweep_id
        self.began = time.monotonic()
        self.run: dict[str, Any] = {"v": 1, "began": lineage.now()}
        self.name: str | None = None

    def start(self, *, first: bool) -> None:
        """This run makes something. first: nothing of the sweep was made before it."""
        self.name = uuid.uuid4().hex
        self.run |= {"first": first}
        self._write(None)

    def stop(self) -> None:
        """This run is at its end, unless a later call moves that. Nothing of a run that never started."""
        if self.name is not None:
            self._write((time.monotonic() - self.began) / 60)

    def minutes(self) -> float | None:
        """Of all runs of the sweep; None where that is not known: one died, or what it made was there before them."""
        keys = self.storage.list(layout.sweep_runs(self.sweep_id))
        runs = [run for key in keys if (run := read_json(self.storage, key)) is not None]
        if not any(run["first"] for run in runs) or any(run["minutes"] is None for run in runs):
            return None
        return sum(run["minutes"] for run in runs)

    def _write(self, minutes: float | None) -> None:
        key = f"{layout.sweep_runs(self.sweep_id)}/{self.name}.json"
        self.storage.write(key, dump(self.run | {"minutes": minutes}))
