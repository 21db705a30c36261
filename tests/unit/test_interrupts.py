"""An interrupt that gets lost is repeated, one that is heard is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
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


STALLS = """
board.ray, board.BoardActor, board.NodeAffinitySchedulingStrategy = MagicMock(), MagicMock(), MagicMock()
board.ray.get.return_value = []
try:
    with board.watched("harvest", lambda event: True, stall_seconds=0.5):
        work()
except StageError as error:
    print(error)
"""
SWALLOWS = """
try:
    with runtime.insisting(0.2):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            work()
        except KeyboardInterrupt:
            pass
        work()
except KeyboardInterrupt:
    print("heard the second")
"""
BACKGROUND = """
import os, signal, time
from unittest.mock import MagicMock
from jobs import board, runtime
from midiscover.errors import StageError

def work():
    for _ in range(100):
        time.sleep(0.1)
    print("not interrupted")

assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
signal.signal(signal.SIGTERM, runtime.terminate)
"""


@pytest.mark.parametrize(
    ("body", "said"), [(STALLS, "Nothing has moved in the harvest for 0.5 s"), (SWALLOWS, "heard the second")]
)
def test_in_a_scripts_background_too(body: str, said: str) -> None:
    """A shell starts `midiscover ... &` of a script with SIGINT ignored, as cluster/slurm.sbatch does."""
    script = 'trap "" INT; exec "$0" -c "$1"'
    done = subprocess.run(
        ["sh", "-c", script, sys.executable, BACKGROUND + body], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    assert "not interrupted" not in done.stdout
