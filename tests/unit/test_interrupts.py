"""An interrupt that gets lost is repeated, one that is heard is not."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from jobs import runtime


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, runtime.interrupt)
    signal.signal(signal.SIGTERM, runtime.terminate)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    runtime._terminated.clear()


def deaf(number: signal.Signals) -> None:
    """Ignores the first interrupt, as a destructor does, and works on for ten seconds."""
    with runtime.insisting(0.2):
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        except KeyboardInterrupt:
            pass
        for _ in range(100):
            time.sleep(0.1)


def hearing() -> None:
    with runtime.insisting(0.2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_that_is_swallowed_comes_again(number: signal.Signals) -> None:
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        deaf(number)
    assert time.monotonic() - began < 5
    assert runtime._terminated.is_set() == (number == signal.SIGTERM)


def test_one_that_is_heard_does_not() -> None:
    with pytest.raises(KeyboardInterrupt):
        hearing()
    time.sleep(0.6)
    assert "insisting" not in {thread.name for thread in threading.enumerate()}


def test_nobody_who_was_not_asked_is_interrupted() -> None:
    with runtime.insisting(0.1):
        time.sleep(0.8)
