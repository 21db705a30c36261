"""Workers for trainings that need no others: on the CPU, in this process."""

from __future__ import annotations

from typing import Any

import torch

from midiscover.progress import Progress


class SilentWorker:
    """Neither checkpoints nor progress."""

    device = torch.device("cpu")

    def load_checkpoint(self, read: object) -> None:
        return None

    def save_checkpoint(self, step: int, data: bytes) -> None:
        return None

    def is_saving(self) -> bool:
        return False

    def report(self, progress: Progress) -> None:
        return None


class MemoryWorker:
    """Keeps checkpoints in memory; can be made to stop at a step."""

    device = torch.device("cpu")

    def __init__(self, stop_at: int | None = None, data: bytes | None = None) -> None:
        self.stop_at, self.data = stop_at, data
        self.reports: list[Progress] = []

    def load_checkpoint(self, read: Any) -> Any:
        return None if self.data is None else read(self.data)

    def save_checkpoint(self, step: int, data: bytes) -> None:
        self.data = data
        if step == self.stop_at:
            raise KeyboardInterrupt

    def is_saving(self) -> bool:
        return False

    def report(self, progress: Progress) -> None:
        self.reports.append(progress)
