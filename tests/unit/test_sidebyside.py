"""SAEs stepped on several cores at once against one core: the same bits, every step once, errors not lost."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import midiscover.sidebyside
from midiscover.member import Slot
from midiscover.saeconfig import StandardConfig, TopKConfig
from midiscover.sidebyside import Batch, Cores, for_each
from midiscover.train import Diverged, Member, Retired, Trained, train
from tests.unit.test_train import TRAIN, MemorySource, assert_equal, source, trained
from tests.workers import MemoryWorker

__all__ = ["source"]


@pytest.fixture(autouse=True)
def two_threads() -> Any:
    """As a job sets them; what they are afterwards is what they were before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def members() -> list[Member]:
    kinds = (StandardConfig(l1_coefficient=0.3), TopKConfig(k=4), StandardConfig(l1_coefficient=3))
    return [Member(id=str(i), config=kind, train=TRAIN, d_sae=32) for i, kind in enumerate(kinds)]


def test_weights_do_not_depend_on_the_cores(source: MemorySource) -> None:
    alone = trained(train(members(), source, MemoryWorker()))
    for one, two in zip(trained(train(members(), source, MemoryWorker(), threads=2)), alone, strict=True):
        assert_equal(one, two)
    for member, one in zip(members(), alone, strict=True):
        (single,) = trained(train([member], source, MemoryWorker(), threads=2))
        assert_equal(single, one)


def test_bfloat16_steps_do_not_depend_on_the_steps_beside_them(source: MemorySource) -> None:
    """They did while autocast kept cast weights: one thread's end emptied them in the midst of another's step."""
    halved = [replace(m, id=f"{m.id}{n}", train=replace(TRAIN, dtype="bfloat16")) for n in range(4) for m in members()]
    alone = trained(train(halved, source, MemoryWorker()))
    for _ in range(3):
        for one, two in zip(trained(train(halved, source, MemoryWorker(), threads=2)), alone, strict=True):
            assert_equal(one, two)


def test_large_saes_are_made_and_folded_at_once_and_are_the_same(
    source: MemorySource, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = trained(train(members(), source, MemoryWorker()))
    folding: set[str] = set()
    finish = Slot.finish

    def seen(self: Slot, tokens: int) -> Any:
        folding.add(threading.current_thread().name)
        return finish(self, tokens)

    monkeypatch.setattr(midiscover.sidebyside, "cores", lambda: 2)
    monkeypatch.setattr(midiscover.sidebyside, "LARGE_FROM", 1)
    monkeypatch.setattr(Slot, "finish", seen)
    for one, two in zip(trained(train(members(), source, MemoryWorker())), alone, strict=True):
        assert_equal(one, two)
    assert folding <= {"maker_0", "maker_1"}
    monkeypatch.setattr(midiscover.sidebyside, "MADE_AT_ONCE", 1)
    assert for_each([3, 1, 2], lambda n: (n, threading.current_thread().name), numbers=9)[0] == (3, "MainThread")


def test_a_resumed_pack_goes_on_wherever_its_look_ahead_ended(source: MemorySource) -> None:
    whole = trained(train(members(), source, MemoryWorker()))
    worker = MemoryWorker()
    stops: list[int] = []
    keep = worker.save_checkpoint

    def stop(step: int, data: bytes) -> None:
        keep(step, data)
        stops.append(step)
        if len(stops) == 4:
            raise KeyboardInterrupt

    worker.save_checkpoint = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        train(members(), source, worker, threads=2)
    assert stops == [1, 5, 9, 13], "after each step that is reported"
    for one, two in zip(trained(train(members(), source, MemoryWorker(data=worker.data))), whole, strict=True):
        assert_equal(one, two)


def test_what_diverges_or_retires_does_so_as_on_one_core(source: MemorySource) -> None:
    settings = replace(TRAIN, retire_after=0.4)
    which = [
        Member(id="wild", config=StandardConfig(l1_coefficient=1), train=replace(settings, lr=1e30), d_sae=32),
        Member(id="good", config=StandardConfig(l1_coefficient=0.3), train=settings, d_sae=32),
        Member(id="slow", config=StandardConfig(l1_coefficient=0.3), train=replace(settings, lr=1e-5), d_sae=32),
    ]
    one, two = (train(which, source, MemoryWorker(), threads=count) for count in (1, 2))
    assert [type(end) for end in one] == [type(end) for end in two]
    assert isinstance(one[0], Diverged)
    assert isinstance(one[1], Trained)
    for first, second in zip(one, two, strict=True):
        if isinstance(first, Diverged | Retired):
            assert first == second
        else:
            assert isinstance(second, Trained)
            assert_equal(first, second)


def stepper(d_in: int = 4) -> Any:
    sae = SimpleNamespace(d_in=d_in, d_sae=8)
    return SimpleNamespace(slots=[SimpleNamespace(sae=sae)])


def batches(count: int) -> list[Batch]:
    return [Batch(step, torch.zeros(2, 4), torch.zeros(2, 4)) for step in range(count)]


def test_each_takes_every_step_once_in_order_and_none_waits_long() -> None:
    """Three on two cores: 3 x 8 steps of 10 ms in little more than 120 ms, where one at a time would take 240."""
    steppers, seen, at_once, most = [stepper() for _ in range(3)], [], [0], [0]
    lock = threading.Lock()

    def take(one: Any, batch: Batch) -> None:
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        time.sleep(0.01)
        with lock:
            at_once[0] -= 1
            seen.append((next(i for i, two in enumerate(steppers) if two is one), batch.step))

    cores = Cores(2)
    cores.run(steppers, batches(8), take)
    cores.close()
    assert most[0] == 2
    assert sorted(seen) == [(i, step) for i in range(3) for step in range(8)]
    for i in range(3):
        assert [step for who, step in seen if who == i] == list(range(8))
    # None runs away: at each moment the furthest is at most two steps before the last.
    done = [0, 0, 0]
    for who, _ in seen:
        done[who] += 1
        assert max(done) - min(done) <= 2


def test_a_large_step_has_all_cores_and_a_small_one_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(midiscover.sidebyside, "SMALL_BELOW", 2 * 50 * 8)
    small, large, where = stepper(4), stepper(100), {}

    def take(one: Any, batch: Batch) -> None:
        where[one.slots[0].sae.d_in] = (threading.current_thread() is threading.main_thread(), torch.get_num_threads())

    torch.set_num_threads(2)
    cores = Cores(2)
    assert cores.look_ahead([large], 2) == 1
    assert cores.look_ahead([large, small], 2) > 1
    cores.run([small, large], batches(3), take)
    cores.close()
    assert where == {4: (False, 1), 100: (True, 2)}
    assert torch.get_num_threads() == 2


def test_an_error_of_a_core_ends_the_pack() -> None:
    def take(_one: Any, batch: Batch) -> None:
        if batch.step == 3:
            raise OSError("the disk is gone")

    cores = Cores(2)
    with pytest.raises(OSError, match="the disk is gone"):
        cores.run([stepper(), stepper()], batches(8), take)
    cores.close()
