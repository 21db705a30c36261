"""Batches: nothing waits for company, none is too large, and each gets its own answer."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from serve.batching import TokenBatcher


class Runner:
    def __init__(self, seconds: float = 0.0) -> None:
        self.batches: list[list[int]] = []
        self.seconds = seconds
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, items: Sequence[int]) -> list[int | Exception]:
        self.gate.wait(10)
        time.sleep(self.seconds)
        self.batches.append(list(items))
        return [ValueError(f"no {item}") if item % 7 == 0 else item * item for item in items]


def batcher(runner: Runner, limit: int) -> TokenBatcher[int, int]:
    return TokenBatcher(runner, lambda item: item, limit, ThreadPoolExecutor(1))


def test_one_alone_is_run_at_once_and_what_comes_meanwhile_together() -> None:
    async def work() -> None:
        runner = Runner()
        runner.gate.clear()
        of = batcher(runner, 100)
        first = asyncio.create_task(of.submit([10]))
        await asyncio.sleep(0.05)
        rest = [asyncio.create_task(of.submit([length])) for length in (30, 11, 12, 29)]
        await asyncio.sleep(0.05)
        runner.gate.set()
        assert await first == [100]
        assert [await one for one in rest] == [[900], [121], [144], [841]]
        assert runner.batches[0] == [10]
        # 30 waited longest; 29 is nearest to it, and a third of 30 would make 90 tokens, a fourth 120.
        assert runner.batches[1:] == [[30, 29, 12], [11]]

    asyncio.run(work())


def test_no_batch_is_larger_than_a_pass_may_be_but_for_a_single_one() -> None:
    async def work() -> None:
        runner = Runner()
        of = batcher(runner, 64)
        lengths = [5, 60, 33, 1, 1, 1, 30, 31, 200, 9, 8, 16, 15]
        found = await asyncio.gather(*(of.submit([length]) for length in lengths))
        assert [one for (one,) in found] == [length**2 for length in lengths]
        assert sorted(item for batch in runner.batches for item in batch) == sorted(lengths)
        assert all(len(batch) == 1 or max(batch) * len(batch) <= 64 for batch in runner.batches)

    asyncio.run(work())


def test_an_item_that_fails_does_so_alone() -> None:
    async def work() -> None:
        of = batcher(Runner(), 1000)
        good, bad = await asyncio.gather(of.submit([5, 6]), of.submit([14]), return_exceptions=True)
        assert good == [25, 36]
        assert isinstance(bad, ValueError)
        assert await of.submit([]) == []

    asyncio.run(work())


def test_a_batch_that_fails_fails_all_of_it_and_the_next_one_goes_on() -> None:
    async def work() -> None:
        calls = 0

        def run(items: Sequence[int]) -> list[int]:
            nonlocal calls
            calls += 1
            if calls == 1:
                raise RuntimeError("card lost")
            return list(items)

        of: TokenBatcher[int, int] = TokenBatcher(run, lambda item: item, 10, ThreadPoolExecutor(1))
        with pytest.raises(RuntimeError, match="card lost"):
            await of.submit([3])
        assert await of.submit([4]) == [4]

    asyncio.run(work())


def test_what_nobody_waits_for_any_more_is_not_run() -> None:
    async def work() -> None:
        runner = Runner()
        runner.gate.clear()
        of = batcher(runner, 10)
        first = asyncio.create_task(of.submit([9]))
        await asyncio.sleep(0.05)
        gone = asyncio.create_task(of.submit([8]))
        kept = asyncio.create_task(of.submit([10]))
        await asyncio.sleep(0.05)
        gone.cancel()
        runner.gate.set()
        assert (await first, await kept) == ([81], [100])
        assert runner.batches == [[9], [10]]

    asyncio.run(work())
