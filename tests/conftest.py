"""What tests of several folders share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs_cli import NOT_NICE
from tests.postgres import or_skip, postgres
from tests.runs import finished_run

os.environ |= NOT_NICE


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A PostgreSQL server that all tests share; see `fresh_database`."""
    with or_skip(), postgres() as url:
        yield url


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, for all tests; nothing may write to it. `copied_run` copies it."""
    return finished_run(tmp_path_factory.getbasetemp())
