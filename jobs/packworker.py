"""The process that trains a pack, as the training loop sees it: its device, its checkpoints, its way to be seen."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from ray.train.torch import get_device

from jobs.board import Board
from jobs.group import TorchGroup
from jobs.runtime import Slots
from midiscover.progress import Progress
from midiscover.resolve import Crew, Pack, Resolved
from midiscover.store import layout
from midiscover.store.storage import Storage


@dataclass(frozen=True, kw_only=True, slots=True)
class PackJob:
    """What a trial needs to know; small, and the same for all packs of a sweep."""

    resolved: Resolved
    crews: tuple[Crew, ...]
    """What a trial trains: one pack, or packs that share a language model where activations are streamed."""
    storage: Storage
    board: Board
    slots: Slots
    trainer: str
    prepend_bos: bool
    streams: bool = False
    """Whether activations come from a language model in the trial's process; else from the store."""


class PackWorker:
    """The process a pack runs in, as the training loop sees it."""

    def __init__(self, job: PackJob, pack: Pack, group: TorchGroup | None = None) -> None:
        self.job, self.pack, self.group = job, pack, group
        self.leads = group is None or group.rank == 0
        self.device = torch.device("cuda" if job.slots.gpus > 0 else "cpu")
        if group is not None and job.slots.gpus > 0:
            self.device = get_device()
        self.writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.writing: Future[None] | None = None

    def load_checkpoint(self) -> bytes | None:
        """The newest checkpoint of this pack in the store, or of the pack it is a part of; of a group the first's."""
        found = self._newest() if self.leads else None
        return found if self.group is None else self.group.from_first(found)

    def _newest(self) -> bytes | None:
        for pack in (self.pack.id, *self.pack.parents):
            keys = self._checkpoints(pack)
            if keys:
                self.job.board.post("resumed", self.pack.id, _step_of(keys[-1]))
                return self.job.storage.read(keys[-1])
        return None

    def newest(self) -> int:
        """The step of the newest checkpoint; 0 where there is none."""
        keys = self._checkpoints(self.pack.id)
        return _step_of(keys[-1]) if keys else 0

    def save_checkpoint(self, step: int, data: bytes) -> None:
        """Written by a background thread, one at a time; older ones go once the new one stands."""
        if not self.leads:
            return
        if self.writing is not None:
            self.writing.result()
        self.writing = self.writer.submit(self._write, step, data)

    def is_saving(self) -> bool:
        """See `Worker`."""
        return self.writing is not None and not self.writing.done()

    def report(self, progress: Progress) -> None:
        """To the board, for the driver's bars and the tracker's curves."""
        if self.leads:
            self.job.board.post("pack", self.pack.id, progress)

    def finish(self) -> None:
        """The pack's SAEs stand, so its checkpoints go."""
        self.close()
        for key in self._checkpoints(self.pack.id) if self.leads else ():
            self.job.storage.delete(key)

    def close(self) -> None:
        """Wait for the writer."""
        self.writer.shutdown(wait=True)

    def _write(self, step: int, data: bytes) -> None:
        old = [key for key in self._checkpoints(self.pack.id) if _step_of(key) < step]
        self.job.storage.write(layout.pack_checkpoint(self.job.resolved.sweep_id, self.pack.id, step), data)
        for key in old:
            self.job.storage.delete(key)

    def _checkpoints(self, pack: str) -> list[str]:
        keys = self.job.storage.list(layout.pack_folder(self.job.resolved.sweep_id, pack))
        return sorted(keys, key=_step_of)


def _step_of(key: str) -> int:
    return int(key.rpartition("step-")[2].partition(".")[0])
