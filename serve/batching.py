"""What waits is run together: a batch at a time, as large as a forward pass may be, items of like length side by side.

Nothing waits for company: a batch begins as soon as the one before has ended, with whatever has come until then. So a
lone request is not delayed, and batches grow by themselves with the load.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclass(eq=False)
class _Waiting(Generic[Item, Answer]):
    item: Item
    length: int
    answer: asyncio.Future[Answer] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class TokenBatcher(Generic[Item, Answer]):
    """Runs items in batches whose number times the longest length is at most `limit`.

    run: called in `executor` with the items of a batch; gives for each its answer, or the exception it ends with.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Sequence[Answer | Exception]],
        length: Callable[[Item], int],
        limit: int,
        executor: Executor,
    ) -> None:
        self._run, self._length, self._limit, self._executor = run, length, limit, executor
        self._waiting: list[_Waiting[Item, Answer]] = []
        self._worker: asyncio.Task[None] | None = None

    async def submit(self, items: Sequence[Item]) -> list[Answer]:
        """The answers of these items, in order; raises the first exception among them."""
        if not items:
            return []
        mine = [_Waiting[Item, Answer](item, self._length(item)) for item in items]
        self._waiting += mine
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        try:
            return await asyncio.gather(*(one.answer for one in mine))
        except BaseException:
            for one in mine:  # nobody waits for the others any more
                one.answer.cancel()
            raise

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._waiting = [one for one in self._waiting if not one.answer.done()]
            if not self._waiting:
                return
            batch = self._next_batch()
            try:
                answers = await loop.run_in_executor(self._executor, self._run, [one.item for one in batch])
            except Exception as error:  # of the batch as a whole
                answers = [error] * len(batch)
            for one, answer in zip(batch, answers, strict=True):
                if one.answer.done():
                    continue
                if isinstance(answer, Exception):
                    one.answer.set_exception(answer)
                else:
                    one.answer.set_result(answer)

    def _next_batch(self) -> list[_Waiting[Item, Answer]]:
        """The one that has waited longest, with those nearest to it in length, as many as fit."""
        first = self._waiting[0]
        by_nearness = sorted(self._waiting[1:], key=lambda one: abs(one.length - first.length))
        batch, longest = [first], first.length
        for one in by_nearness:
            if max(longest, one.length) * (len(batch) + 1) > self._limit:
                break
            batch.append(one)
            longest = max(longest, one.length)
        chosen = set(map(id, batch))
        self._waiting = [one for one in self._waiting if id(one) not in chosen]
        return batch
