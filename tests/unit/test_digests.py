"""Cached digests against hashlib."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path

import pytest

from midiscover import digests


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIDISCOVER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(digests, "SMALL_BYTES", 4)
    return tmp_path / "home"


def settled(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    os.utime(path, ns=(10**18, 10**18))
    return path


def test_cache_dir(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert digests.cache_dir() == home
    monkeypatch.delenv("MIDISCOVER_HOME")
    assert digests.cache_dir() == Path.home() / ".cache/midiscover"


def test_a_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = settled(tmp_path / "weights", b"one and only")
    expected = hashlib.sha256(b"one and only").hexdigest()
    assert digests.file_sha256(path) == expected
    monkeypatch.setattr(digests, "_hash", lambda path: pytest.fail("hashed again"))
    assert digests.file_sha256(path) == expected


def test_a_changed_file_is_hashed_again(tmp_path: Path) -> None:
    path = settled(tmp_path / "weights", b"before")
    digests.file_sha256(path)
    path.write_bytes(b"after!")  # of the same size, at another time
    assert digests.file_sha256(path) == hashlib.sha256(b"after!").hexdigest()


def test_a_file_of_this_moment_is_not_remembered(tmp_path: Path, home: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"still being written")
    digests.file_sha256(path)
    assert not home.exists()


@pytest.mark.parametrize("broken", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_broken_cache_costs_only_time(tmp_path: Path, home: Path, broken: bytes) -> None:
    home.mkdir()
    (home / "digests.json").write_bytes(broken)
    path = settled(tmp_path / "weights", b"content")
    assert digests.file_sha256(path) == hashlib.sha256(b"content").hexdigest()
    assert len(json.loads((home / "digests.json").read_text())) == 1


def test_a_home_that_can_not_be_written(tmp_path: Path, home: Path) -> None:
    home.write_text("a file where the folder should be")
    path = settled(tmp_path / "weights", b"content")
    assert digests.file_sha256(path) == hashlib.sha256(b"content").hexdigest()


def test_writers_at_once_leave_a_whole_cache(tmp_path: Path, home: Path) -> None:
    paths = [settled(tmp_path / f"file-{i}", b"content %d" % i) for i in range(40)]
    threads = [threading.Thread(target=digests.files_sha256, args=(paths[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(json.loads((home / "digests.json").read_text()).values()) <= {
        hashlib.sha256(path.read_bytes()).hexdigest() for path in paths
    }
    assert [path.name for path in home.iterdir()] == ["digests.json"]
