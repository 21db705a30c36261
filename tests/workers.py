"""A worker for trainings that need no other: on the CPU, in this process."""

from __future__ import annotations

import torch

from midiscover.progress import Progress


class SilentWorker:
    """Neither checkpoints nor progress."""

    device = torch.device("cpu")

    def load_checkpoint(self) -> None:
        return None

    def save_checkpoint(self, step: int, data: bytes) -> None:
        return None

    def is_saving(self) -> bool:
        return False

    def report(self, progress: Progress) -> None:
        return None
