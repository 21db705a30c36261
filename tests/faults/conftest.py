"""What the fault tests share: the sweep that nobody disturbs, made once for all processes of a test run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from filelock import FileLock

from tests.faults.slow import SLOW
from tests.jobs_cli import midiscover
from tests.runs import write_run


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a finished sweep of `SLOW`; beside it is `said`, what that run told."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "undisturbed"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "done").exists():
            config = write_run(folder, **SLOW)
            done = midiscover("sweep", str(config), "--store", str(folder / "store"), env={"MIDISCOVER_CLUSTER": ""})
            assert done.code == 0, done.err
            (folder / "said").write_text(done.err)
            (folder / "done").touch()
    return folder / "store"
