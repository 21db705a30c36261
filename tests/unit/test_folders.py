"""Stores in folders of other file systems: without hard links, on two disks, with names in any script."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from midiscover.store.local import LocalStorage
from tests.unit.test_storage import test_create_has_one_winner_of_many as one_winner_of_many


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path)


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_create_in_a_folder_without_hard_links(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    asked: list[int] = []

    def link(*_: object) -> None:
        asked.append(code)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", link)
    one_winner_of_many(storage)
    assert len(asked) == 8
    assert storage.create("a/b", b"ours")
    assert storage.create("a/b", b"ours")
    assert not storage.create("a/b", b"theirs")
    assert storage.list("") == ["a/b", "winner"]


def test_names_in_any_script_are_keys(storage: LocalStorage) -> None:
    """Ideographic and narrow spaces, joined characters, and one of a font's own."""
    keys = ["a/\u65e5\u672c\u3000\u8a9e", "a/9\u202fAM", "a/b\xa0c", "a/\U0001f469\u200d\U0001f4bb", "a/\ue000"]
    assert not any(key.isprintable() for key in keys)
    for key in keys:
        storage.write(key, key.encode())
        assert storage.read(key) == key.encode()
    assert storage.list("") == sorted(keys) == [entry.key for entry in storage.entries("a")]


def test_a_folder_at_the_top_may_be_a_link(storage: LocalStorage, tmp_path_factory: pytest.TempPathFactory) -> None:
    """As `activations` to a scratch disk. Links below are not followed, so a round ends."""
    scratch = tmp_path_factory.mktemp("scratch")
    (storage.root / "activations").symlink_to(scratch)
    (scratch / "again").symlink_to(storage.root)
    for key in ("activations/h.1/block", "saes/one"):
        storage.write(key, b"rows")
    half = scratch / "h.1" / f".block.{'0' * 16}"
    half.write_bytes(b"ro")
    os.utime(half, (0, 0))
    assert storage.list("") == ["activations/h.1/block", "saes/one"]
    assert [entry.key for entry in storage.entries("activations")] == ["activations/h.1/block"]
    assert [entry.key for entry in storage.leftovers()] == [f"activations/h.1/{half.name}"]
    assert storage.sweep() == 2
    assert not half.exists()
