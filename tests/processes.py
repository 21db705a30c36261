"""Processes of Ray's workers, by their titles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import psutil

TRIAL = ("pack_trial", "ImplicitFunc")
"""In the title of one that trains a pack."""


def is_called(process: psutil.Process, titles: Sequence[str]) -> bool:
    """Whether a process, if it is still there, has one of these in its title."""
    try:
        return any(title in " ".join(process.cmdline()) for title in titles)
    except psutil.NoSuchProcess:
        return False


@contextmanager
def frozen(processes: Sequence[psutil.Process]) -> Iterator[None]:
    """Processes that do nothing in the body, and go on after it where they are still there."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.suspend()
    try:
        yield
    finally:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.resume()
