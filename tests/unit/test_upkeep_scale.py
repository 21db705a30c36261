"""Large stores: what `store gc` and `store du` do once, and what at the same time."""

from __future__ import annotations

import json
import threading
import time
from collections import UserDict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from midiscover.store.local import LocalStorage
from midiscover.store.storage import Entry
from midiscover.upkeep import garbage, spent_activations, survey
from tests.unit.test_upkeep import fill, sweep


def test_many_sweeps_are_looked_through_once(tmp_path: Path) -> None:
    """Not every object of the store for each of them."""
    storage = LocalStorage(tmp_path)
    fill(storage)
    for number in range(40):
        storage.write(f"sweeps/t.{number}/sweep.json", json.dumps(sweep(f"t.{number}", ["one", "two"])).encode())
    walks = 0

    class Counted(UserDict[str, Entry]):
        def __iter__(self) -> Iterator[str]:
            nonlocal walks
            walks += 1
            return super().__iter__()

    found = survey(storage)
    counted = replace(found, entries=Counted(found.entries))
    late = time.time() + 60
    assert garbage(counted, grace=0, now=late) == garbage(found, grace=0, now=late)
    assert spent_activations(counted, asked=True, grace=0) == spent_activations(found, asked=True, grace=0)
    assert 0 < walks < 10


def test_documents_of_a_bucket_are_read_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two records can only be read together here."""
    storage = LocalStorage(tmp_path)
    fill(storage)
    both, real = threading.Barrier(2, timeout=20), LocalStorage.read

    def read(self: LocalStorage, key: str, *rest: Any) -> bytes:
        if key.endswith("record.json"):
            both.wait()
        return real(self, key, *rest)

    monkeypatch.setattr(LocalStorage, "read", read)
    monkeypatch.setattr(LocalStorage, "is_local", False)
    assert set(survey(storage).records) == {"one", "two"}
