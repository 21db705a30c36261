"""Steps of several SAEs on several CPU cores: small ones side by side, a core each; large ones in turn, on all cores.

Threads that share a small step wait for each other for a third of its time; cores that each take another SAE's do not.
Whether an SAE is small depends on its own size alone, so that its weights do not depend on who shares its pack.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from midiscover.cores import SMALL_BELOW, cores
from midiscover.stacked import Stepper

MOST_STEPS = 8
"""Batches that are looked ahead, so that cores need not wait for each other at every step."""
LARGE_FROM = 2**23
"""Numbers of a matrix from which several SAEs are made, or folded, at once: each takes tenths of a second of a core."""
MADE_AT_ONCE = 2**31
"""Numbers, temporary ones as well, that may be held for that at once."""


class Batch(NamedTuple):
    """A normalised batch and its number."""

    step: int
    x: Tensor
    y: Tensor


Take = Callable[[Stepper, Batch], None]
T = TypeVar("T")
R = TypeVar("R")


def for_each(items: Sequence[T], work: Callable[[T], R], *, numbers: int) -> list[R]:
    """`work` of every item, in their order, several at once where they are large; numbers: of a matrix of one's SAE."""
    at_once = min(len(items), cores(), MADE_AT_ONCE // (4 * max(1, numbers))) if numbers >= LARGE_FROM else 1
    if at_once <= 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(at_once, "maker", torch.set_num_threads, (1,)) as pool:
        return list(pool.map(work, items))


class Cores:
    """Those of this process, for the steps of one pack; `close` it."""

    def __init__(self, count: int) -> None:
        """count: threads of torch. 1: everything in the calling thread."""
        self.count = count
        self.pool: ThreadPoolExecutor | None = None
        if count > 1:
            self.pool = ThreadPoolExecutor(count, "stepper", torch.set_num_threads, (1,))

    def close(self) -> None:
        """End the threads."""
        if self.pool is not None:
            self.pool.shutdown(wait=True)

    def look_ahead(self, steppers: Sequence[Stepper], batch_size: int) -> int:
        """Batches that `run` should be given at once."""
        return MOST_STEPS if any(self._small(one, batch_size) for one in steppers) else 1

    def run(self, steppers: Sequence[Stepper], batches: Sequence[Batch], take: Take) -> None:
        """`take` every stepper through all batches, each in order. Raises the first error of any."""
        small = [one for one in steppers if self._small(one, len(batches[0].x))]
        for one in steppers:
            if one not in small:
                for batch in batches:
                    take(one, batch)
        if not small or self.pool is None:
            return
        shared = _Shared(small, batches, take)
        running = [self.pool.submit(shared.work) for _ in range(min(self.count, len(small)))]
        wait(running)
        for future in running:
            future.result()

    def _small(self, one: Stepper, batch_size: int) -> bool:
        sae = one.slots[0].sae
        return self.pool is not None and batch_size * sae.d_in * sae.d_sae < SMALL_BELOW


class _Shared:
    """What threads take their next step from: always of the stepper that is furthest behind and free."""

    def __init__(self, steppers: Sequence[Stepper], batches: Sequence[Batch], take: Take) -> None:
        self.steppers, self.batches, self.take = steppers, batches, take
        self.done = [0] * len(steppers)
        self.free = set(range(len(steppers)))
        self.lock = threading.Lock()

    def work(self) -> None:
        """Steps until none is left that another thread has not begun."""
        while (begun := self._next()) is not None:
            i, batch = begun
            try:
                self.take(self.steppers[i], batch)
            except BaseException:
                with self.lock:
                    self.batches = ()  # others end with the step that they are in
                raise
            with self.lock:
                self.done[i] += 1
                self.free.add(i)

    def _next(self) -> tuple[int, Batch] | None:
        with self.lock:
            left = [i for i in self.free if self.done[i] < len(self.batches)]
            if not left:
                return None
            found = min(left, key=lambda i: (self.done[i], i))
            self.free.remove(found)
            return found, self.batches[self.done[found]]
