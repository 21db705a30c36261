"""What tests of several folders share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.postgres import or_skip, postgres
from tests.runs import finished_run

# Of two tests at a time, one may have no Ray: Ray's niceness of 15 leaves the other's workers a thirtieth of a core.
os.environ.setdefault("RAY_worker_niceness", "0")


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A PostgreSQL server that all tests share; see `fresh_database`."""
    with or_skip(), postgres() as url:
        yield url


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, for all tests; nothing may write to it. `copied_run` copies it."""
    return finished_run(tmp_path_factory.getbasetemp())
