"""Folders as stores, and keys. Buckets: tests/integration/test_s3.py."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from midiscover.errors import CorruptError, StoreError, StoreFailedError
from midiscover.store import layout
from midiscover.store.local import LocalStorage
from midiscover.store.storage import Storage, open_store
from tests.jobs_cli import environment


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path)


def test_read_gives_what_write_put(storage: LocalStorage) -> None:
    storage.write("a/b.bin", bytearray(b"0123456789"))
    assert storage.read("a/b.bin") == b"0123456789"
    assert storage.read("a/b.bin", 3) == b"3456789"
    assert storage.read("a/b.bin", 3, 2) == b"34"
    assert storage.read("a/b.bin", 8, 5) == b"89"
    assert storage.read("a/b.bin", 20, 5) == b""
    storage.write("a/b.bin", b"new")
    assert storage.read("a/b.bin") == b"new"
    assert storage.local_path("a/b.bin").read_bytes() == b"new"


def test_read_into_fills_all_targets(storage: LocalStorage) -> None:
    storage.write("x", b"0123456789")
    parts = [bytearray(3), bytearray(0), bytearray(7)]
    storage.read_into("x", [memoryview(part) for part in parts])
    assert parts == [b"012", b"", b"3456789"]
    for size in (9, 11):
        with pytest.raises(CorruptError, match=f"holds 10 bytes where {size}"):
            storage.read_into("x", [memoryview(bytearray(size))])


def test_absent_objects(storage: LocalStorage) -> None:
    assert not storage.exists("a/b")
    storage.delete("a/b")
    for reading in (storage.read, storage.version, lambda key: storage.read_into(key, [])):
        with pytest.raises(FileNotFoundError):
            reading("a/b")


def test_a_folder_that_is_gone_is_no_empty_store(storage: LocalStorage) -> None:
    storage.write("saes/a/record.json", b"{}")
    away = storage.root.rename(storage.root.with_name("elsewhere"))
    for asking in (storage.read, storage.version, storage.exists, storage.list, storage.entries):
        with pytest.raises(StoreFailedError, match=r"The store .* is not there any more"):
            asking("saes/a/record.json")
    with pytest.raises(StoreFailedError, match="is not there any more"):
        storage.list("")
    for writing in (storage.write, storage.create, lambda key, data: storage.replace(key, None, data)):
        with pytest.raises(StoreFailedError, match="is not there any more"):
            writing("saes/b/record.json", b"{}")
    assert not storage.root.exists(), "neither asking nor writing makes the folder"
    away.rename(storage.root)
    assert storage.list("") == ["saes/a/record.json"]


def test_create_keeps_the_first(storage: LocalStorage) -> None:
    assert storage.create("a/manifest.json", b"ours")
    assert storage.create("a/manifest.json", b"ours"), "the same bytes again are no conflict"
    assert not storage.create("a/manifest.json", b"theirs")
    assert storage.read("a/manifest.json") == b"ours"


def test_create_has_one_winner_of_many(storage: LocalStorage) -> None:
    start = threading.Barrier(8)
    won: list[int] = []

    def create(number: int) -> None:
        start.wait()
        if storage.create("winner", str(number).encode() * 1000):
            won.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert storage.read("winner") == str(won[0]).encode() * 1000


def test_replace_asks_for_what_stood_there(storage: LocalStorage) -> None:
    assert not storage.replace("x", b"old", b"new"), "nothing stands there"
    assert storage.replace("x", None, b"1")
    assert not storage.replace("x", None, b"2")
    assert not storage.replace("x", b"0", b"2")
    assert storage.read("x") == b"1"
    assert storage.replace("x", b"1", b"2")
    assert storage.read("x") == b"2"
    assert storage.list("") == ["x"]


def test_replace_loses_no_change_of_many(storage: LocalStorage) -> None:
    add_lines(storage, threads=8, times=10)


def add_lines(storage: Storage, *, threads: int, times: int) -> None:
    """Many threads that each add lines of their own; with a plain read and write most would be lost."""
    storage.write("lines", b"")
    start = threading.Barrier(threads)

    def add(thread: int) -> None:
        start.wait()
        for number in range(times):
            while True:
                old = storage.read("lines")
                if storage.replace("lines", old, old + f"{thread}-{number}\n".encode()):
                    break

    running = [threading.Thread(target=add, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    lines = storage.read("lines").decode().split()
    assert sorted(lines) == sorted(f"{thread}-{number}" for thread in range(threads) for number in range(times))


def test_list_is_by_folder_sorted_and_without_half_written_files(storage: LocalStorage) -> None:
    for key in ("a/2", "a/1/x", "ab/1", "a-b", "top"):
        storage.write(key, b"")
    (storage.root / "a" / ".2.0f0f").write_bytes(b"half")
    assert storage.list("a") == ["a/1/x", "a/2"] == storage.list("a/")
    assert storage.list("") == ["a-b", "a/1/x", "a/2", "ab/1", "top"]
    assert storage.list("none") == []


def test_list_leaves_out_what_is_no_key(storage: LocalStorage) -> None:
    storage.write("a/1", b"")
    hidden = storage.root / "a" / ".cache"
    hidden.mkdir()
    (hidden / "2").write_bytes(b"")
    (storage.root / "a" / "b\\c").write_bytes(b"")
    assert storage.list("") == ["a/1"] == [layout.check_key(key) for key in storage.list("a")]
    assert [entry.key for entry in storage.entries("")] == ["a/1"]


def test_what_can_not_be_looked_at_is_not_taken_for_absent(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write("a/b/1", b"")

    def denied(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", denied)
    for prefix, words in (("a", "list a"), ("", "list what is")):
        with pytest.raises(StoreError, match=rf"Can't {words} in the store .*: Permission denied"):
            storage.list(prefix)
    monkeypatch.setattr(Path, "stat", denied)
    for look in (storage.exists, storage.version):
        with pytest.raises(StoreError, match=r"Can't look for a/b/1 in the store .*: Permission denied"):
            look("a/b/1")


def test_folders_at_the_top_that_are_not_ours_need_not_be_readable(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `lost+found` of a disk whose root is the store. Tests may run as root, whom no folder is closed to."""
    real, denied = os.scandir, []

    def scandir(path: str | Path) -> Iterator[os.DirEntry[str]]:
        if Path(path).name in closed:
            denied.append(Path(path).name)
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)  # type: ignore[return-value]

    for key in ("lost+found/x", "saes/a/record.json", "saes/lost+found/x"):
        storage.write(key, b"{}")
    closed = {"lost+found"}
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(StoreError, match=r"Can't list what is in the store .*: Permission denied"):
        storage.list("")
    (storage.root / "saes/lost+found/x").unlink()
    (storage.root / "saes/lost+found").rmdir()
    denied.clear()
    assert storage.list("") == ["saes/a/record.json"] == [entry.key for entry in storage.entries("")]
    assert denied == ["lost+found"] * 2
    with pytest.raises(StoreError, match=r"Can't list what is in the store .*: Permission denied"):
        LocalStorage(storage.root, is_store=False).list("")
    closed = {"saes"}
    with pytest.raises(StoreError, match=r"Can't list what is in the store .*: Permission denied"):
        storage.list("")


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_syncs_no_folders_holds_a_store(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    real, refused = os.fsync, []

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            refused.append(descriptor)
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    storage.write("a/b", b"1")
    assert storage.create("a/c", b"2")
    assert len(refused) == 2
    assert (storage.read("a/b"), storage.read("a/c")) == (b"1", b"2")
    code = errno.EIO
    with pytest.raises(StoreError, match="Can't write a/b"):
        storage.write("a/b", b"1")


def test_create_where_the_first_was_taken_back(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write("x", b"theirs")
    real, gone = LocalStorage.read, []

    def taken_back(self: LocalStorage, key: str) -> bytes:
        if not gone:
            gone.append(key)
            self.delete(key)
        return real(self, key)

    monkeypatch.setattr(LocalStorage, "read", taken_back)
    assert storage.create("x", b"ours")
    assert gone == ["x"]
    assert storage.local_path("x").read_bytes() == b"ours"
    os.symlink("nowhere", storage.root / "y")
    with pytest.raises(StoreError, match="y in .* could not be created"):
        storage.create("y", b"ours")
    assert sorted(os.listdir(storage.root)) == ["x", "y"]


KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from midiscover.store.local import LocalStorage
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
LocalStorage(Path(sys.argv[1])).write("saes/s/record.json", b"half")
"""


def test_opening_sweeps_what_killed_writers_left(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.write("saes/s/cfg.json", b"{}")
    done = subprocess.run([sys.executable, "-c", KILLED_WRITER, str(tmp_path)], env=environment(), check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = (tmp_path / "saes" / "s").glob(".record.json.*")
    others = [tmp_path / ".git", tmp_path / "saes" / ".notes.0f", tmp_path / "saes" / "old.0123456789abcdef"]
    for path in others:
        path.write_bytes(b"")
        _age(path, days=9)

    open_store(str(tmp_path))
    assert left.exists(), "young: it may be one that is being written"
    _age(left, days=2)
    open_store(str(tmp_path), create=False)
    assert left.exists(), "a reader changes nothing"
    open_store(str(tmp_path))
    assert not left.exists()
    assert all(path.exists() for path in others), "files that are not ours"
    assert storage.read("saes/s/cfg.json") == b"{}"


def test_a_write_whose_file_was_swept_fails(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a day's sleep between the bytes and the rename."""
    real = os.fsync

    def sleep(descriptor: int) -> None:
        real(descriptor)
        for path in storage.root.glob(".x.*"):
            _age(path, days=2)
            storage.sweep()

    monkeypatch.setattr(os, "fsync", sleep)
    with pytest.raises(StoreError, match=r"Can't write x in the store .*: No such file"):
        storage.write("x", b"new")
    assert os.listdir(storage.root) == []


def _age(path: Path, *, days: float) -> None:
    then = time.time() - days * 86_400
    os.utime(path, (then, then))


def test_failed_write_leaves_nothing(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write("a/b", b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"Can't write a/b in the store .*: No space left on device"):
        storage.write("a/b", b"new")
    assert storage.read("a/b") == b"old"
    assert os.listdir(storage.root / "a") == ["b"]


def test_version_changes_with_the_object(storage: LocalStorage) -> None:
    storage.write("x", b"1")
    before = storage.version("x")
    assert storage.version("x") == before
    storage.write("x", b"22")
    assert storage.version("x") != before


@pytest.mark.parametrize("key", [
    "", "/a", "a/", "a//b", "../a", "a/../b", "a/./b", "a/.b", "a\\b", "a\nb", "a\0b",
    "a\x1b[2J", "a\x85b", "a\u2028b", "a\udce9b",
])  # fmt: skip
def test_keys_that_would_leave_the_store_are_refused(storage: LocalStorage, key: str) -> None:
    for action in (storage.read, storage.exists, storage.delete, lambda key: storage.write(key, b"")):
        with pytest.raises(StoreError, match="can't be a name in a store"):
            action(key)
    assert list(storage.root.iterdir()) == []


def test_every_layout_key_is_valid_and_distinct() -> None:
    hook = "model.layers.1.mlp:in"
    sha = "0f" * 32
    keys = [
        layout.model_file("m", "config.json"),
        layout.corpus_file("c.1", "shard-0.npy"),
        layout.corpus_manifest("c.1"),
        layout.block_file("h.1", hook, layout.block_name(3, sha)),
        layout.block_marker("h.1", hook, 3),
        layout.hook_manifest("h.1", hook),
        layout.hook_manifest("h.1", layout.TOKENS),
        layout.sae_file("l1.mlp.standard-8.l1-3.0f", "cfg.json"),
        layout.training("s"),
        layout.evaluation("s", "e.1"),
        layout.record("s"),
        layout.sweep_record("w"),
        layout.sweep_file("w", "report.html"),
        layout.pack_checkpoint("w", "p.1", 100),
        layout.PROMOTED,
        layout.TRACKER,
    ]
    assert [layout.check_key(key) for key in keys] == keys
    assert len(set(keys)) == len(keys)
    assert keys[3] == "activations/h.1/model.layers.1.mlp@in/block-00003-0f0f0f0f0f0f.safetensors"


def test_storages_pickle(storage: LocalStorage) -> None:
    assert pickle.loads(pickle.dumps(storage)) == storage  # noqa: S301  bytes of this test
