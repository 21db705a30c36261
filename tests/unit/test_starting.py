"""What must not be imported on the way to a job's first step: each costs every process seconds."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from midiscover.errors import StageError

STEP = """
import torch
from midiscover.sae.registry import make_sae
from midiscover.sae.update import make_update
from midiscover.saeconfig import StandardConfig
sae = make_sae(StandardConfig(), 4, 8)
update = make_update(sae, lr=1e-3, betas=(0.9, 0.999), halved=False)
with update.computing():
    sae(torch.ones(2, 4)).sum().backward()
update.step(clip=1.0)
"""


@pytest.mark.parametrize(
    ("program", "unwanted"),
    [
        pytest.param("import jobs.sweep", ("torch", "pandas", "ray.tune", "altair"), id="how a sweep begins"),
        pytest.param("import jobs.board, jobs.leases, midiscover.progress", ("torch", "pandas"), id="the board"),
        pytest.param(STEP, ("torch._dynamo",), id="a step of training"),
    ],
)
def test_is_not_imported(program: str, unwanted: tuple[str, ...]) -> None:
    told = f"{program}\nimport sys; print([name for name in {unwanted} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_a_submitted_jobs_processes_give_way() -> None:
    told = "import jobs, os; print(os.getpriority(os.PRIO_PROCESS, 0))"
    for asked, least in (("15", 15), ("0", os.getpriority(os.PRIO_PROCESS, 0))):
        env = os.environ | {"MIDISCOVER_NICENESS": asked}
        done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True, env=env)
        assert int(done.stdout) == least


@pytest.mark.parametrize(
    ("said", "tries", "asked"),
    [
        ("The current node timed out during startup. This could happen.", 2, 2),
        ("The current node timed out during startup. This could happen.", 1, 1),
        ("no such address", 2, 1),
    ],
)
def test_a_ray_of_our_own_that_comes_too_late_is_started_once_more(
    monkeypatch: pytest.MonkeyPatch, said: str, tries: int, asked: int
) -> None:
    """With a real Ray whose first node was kept from being seen for its 30 s the second one came after 36."""
    from jobs import runtime

    begun: list[int] = []

    def late(**_: object) -> None:
        begun.append(1)
        if asked == 1 or len(begun) == 1:
            raise RuntimeError(said)

    monkeypatch.setattr(runtime.ray, "init", late)
    monkeypatch.setattr(runtime.ray, "shutdown", lambda: None)
    if asked == 1:
        with pytest.raises(StageError, match="Ray did not start: .* Run the same command again"):
            runtime._start({}, tries)
    else:
        runtime._start({}, tries)
    assert len(begun) == asked
