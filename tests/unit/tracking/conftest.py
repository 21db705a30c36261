"""Databases: an empty one for each test, on SQLite and, marked `postgres`, on a server that all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from midiscover.store.storage import Storage, open_store
from midiscover.tracking.tracker import Tracker
from tests.postgres import NoPostgresError, fresh_database, postgres

BOTH = ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)]


@pytest.fixture(scope="session")
def server_url() -> Iterator[str]:
    """A PostgreSQL server. Without one, tests are skipped on a person's machine and fail in CI."""
    try:
        with postgres() as url:
            yield url
    except NoPostgresError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture(params=BOTH)
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'tracker.db'}"
        return
    with fresh_database(request.getfixturevalue("server_url")) as url:
        yield url


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """An empty local store."""
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def tracker(address: str, storage: Storage) -> Iterator[Tracker]:
    """An empty tracker that keeps annotations in `storage`."""
    with Tracker.open(address, storage) as opened:
        yield opened
