"""Databases: an empty one for each test, on SQLite and, marked `postgres`, on a server that all tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from midiscover.store import layout
from midiscover.store.storage import Storage, open_store
from midiscover.tracking.tracker import Tracker
from tests.postgres import fresh_database
from tests.unit.tracking import samples

BOTH = ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)]


@pytest.fixture(params=BOTH)
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'tracker.db'}"
        return
    with fresh_database(request.getfixturevalue("postgres_url")) as url:
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


@pytest.fixture
def demo(tracker: Tracker, storage: Storage) -> dict:
    """A sweep of six SAEs that has started."""
    sweep = samples.sweep()
    samples.put(storage, layout.sweep_record(sweep["id"]), sweep)
    tracker.start_sweep(sweep)
    return sweep
