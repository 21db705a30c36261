"""The process that trains a pack, as the training loop sees it: its device, its checkpoints, its way to be seen."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from ray.train.torch import get_device

from jobs.board import Board
from jobs.group import TorchGroup
from jobs.runtime import Slots
from midiscover import ids
from midiscover.errors import CorruptError
from midiscover.progress import Progress
from midiscover.resolve import Crew, Pack, Resolved
from midiscover.store import layout
from midiscover.store.storage import Storage

T = TypeVar("T")


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

    def load_checkpoint(self, read: Callable[[bytes], T | None]) -> T | None:
        """Of the newest checkpoint in the store from which this pack can go on; of a group the first's.

        One from which it can't, as of activations that came another way, stays for whoever can, until a newer one
        stands. So does one that can't be read, which is told.
        """
        data, made = self._newest(read) if self.leads else (None, None)
        if self.group is None:
            return made
        data = self.group.from_first(data)
        return made if self.leads or data is None else read(data)

    def _newest(self, read: Callable[[bytes], T | None]) -> tuple[bytes | None, T | None]:
        keys = [key for pack in dict.fromkeys((*self._own(), *self.pack.parents)) for key in self._checkpoints(pack)]
        for key in sorted(keys, key=_step_of, reverse=True):
            try:
                data = self.job.storage.read(key)
                made = read(data)
            except FileNotFoundError:  # the whole pack stands since
                continue
            except CorruptError as error:
                self.job.board.post("retry", self.pack.id, f"{key} is passed over: {error}")
                continue
            if made is not None:
                self.job.board.post("resumed", self.pack.id, _step_of(key))
                return data, made
        return None, None

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
        for pack in set(self._own()) if self.leads else ():
            for key in self._checkpoints(pack):
                self.job.storage.delete(key)

    def close(self) -> None:
        """Wait for the writer."""
        self.writer.shutdown(wait=True)

    def _write(self, step: int, data: bytes) -> None:
        old = [key for key in self._checkpoints(self.pack.id) if _step_of(key) < step]
        self.job.storage.write(layout.pack_checkpoint(self.job.resolved.sweep_id, self.pack.id, step), data)
        self.job.board.reach(self.pack.whole, self.pack.id, step)
        for key in old:
            self.job.storage.delete(key)

    def _own(self) -> tuple[str, str]:
        """Under which ids its checkpoints may lie: a driver that starts again gives what is left of a pack the pack's
        id, and the one before may have trained the same SAEs as a part of it."""
        return self.pack.id, ids.pack_id([sae.id for sae in self.pack.saes])

    def _checkpoints(self, pack: str) -> list[str]:
        return self.job.storage.list(layout.pack_folder(self.job.resolved.sweep_id, pack))


def _step_of(key: str) -> int:
    return int(key.rpartition("step-")[2].partition(".")[0])
