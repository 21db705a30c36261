"""Buckets as stores, against a real server: what test_storage.py asks of folders, and what only a network can do."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from midiscover.config import ModelConfig
from midiscover.errors import CorruptError, StoreError
from midiscover.models import push_model, resolve_model
from midiscover.store import s3
from midiscover.store.blocks import committed, read_block, read_manifest
from midiscover.store.loader import ActivationStream
from midiscover.store.local import LocalStorage
from midiscover.store.s3 import S3Storage
from midiscover.store.storage import open_store
from tests.faults.s3proxy import FaultProxy
from tests.harvests import HARVEST, HOOK, write_harvest
from tests.s3 import S3Server, s3_server
from tests.tiny import make_tiny_model
from tests.unit.test_storage import add_lines

pytestmark = pytest.mark.s3


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def environment(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.fixture
def storage(server: S3Server, environment: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[S3Storage]:
    storage = open_store(server.uri(request.node.name.translate({ord(char): "-" for char in "[]/ "})))
    assert isinstance(storage, S3Storage)
    yield storage
    storage.close()


@pytest.fixture
def proxied(
    server: S3Server, environment: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[S3Storage, FaultProxy]]:
    monkeypatch.setattr(s3, "_wait", lambda attempt: None)
    with FaultProxy(server.endpoint) as proxy:
        environment.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        storage = S3Storage(server.bucket, "proxied")
        yield storage, proxy
        storage.close()


def test_objects(storage: S3Storage) -> None:
    storage.write("a/b.bin", bytearray(b"0123456789"))
    assert storage.read("a/b.bin") == b"0123456789"
    assert storage.read("a/b.bin", 3) == b"3456789"
    assert storage.read("a/b.bin", 3, 2) == b"34"
    assert storage.read("a/b.bin", 3, 0) == b""
    assert storage.read("a/b.bin", 8, 5) == b"89"
    assert storage.read("a/b.bin", 20, 5) == b""
    before = storage.version("a/b.bin")
    storage.write("a/b.bin", b"")
    assert storage.read("a/b.bin") == b""
    assert storage.version("a/b.bin") != before
    assert storage.exists("a/b.bin")
    assert storage.local_path("a/b.bin") is None
    storage.delete("a/b.bin")
    storage.delete("a/b.bin")
    assert not storage.exists("a/b.bin")
    for reading in (storage.read, storage.version, lambda key: storage.read_into(key, [])):
        with pytest.raises(FileNotFoundError):
            reading("a/b.bin")
    with pytest.raises(StoreError, match="can't be a name"):
        storage.read("../a")


def test_read_into_fills_all_targets(storage: S3Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "_CHUNK", 4)
    storage.write("x", b"0123456789")
    parts = [bytearray(3), bytearray(0), bytearray(7)]
    storage.read_into("x", [memoryview(part) for part in parts])
    assert parts == [b"012", b"", b"3456789"]
    for size in (9, 11):
        with pytest.raises(CorruptError, match=f"holds 10 bytes where {size}"):
            storage.read_into("x", [memoryview(bytearray(size))])


def test_list_is_by_folder_and_paged(storage: S3Storage) -> None:
    for key in ("a/2", "a/1/x", "ab/1", "top", "z/\u65e5\u3000\u8a9e"):
        storage.write(key, b"")
    assert storage.list("a") == ["a/1/x", "a/2"] == storage.list("a/")
    assert storage.list("") == ["a/1/x", "a/2", "ab/1", "top", "z/\u65e5\u3000\u8a9e"]
    assert storage.list("none") == []


def test_create_keeps_the_first(storage: S3Storage) -> None:
    assert storage.create("manifest.json", b"ours")
    assert storage.create("manifest.json", b"ours")
    assert not storage.create("manifest.json", b"theirs")
    assert storage.read("manifest.json") == b"ours"


def test_create_has_one_winner_of_many(storage: S3Storage) -> None:
    start, won = threading.Barrier(8), []

    def create(number: int) -> None:
        start.wait()
        if storage.create("winner", str(number).encode()):
            won.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [str(number).encode() for number in won] == [storage.read("winner")]


def test_replace_asks_for_what_stood_there(storage: S3Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not storage.replace("x", b"old", b"new"), "nothing stands there"
    assert storage.replace("x", None, b"1")
    assert not storage.replace("x", None, b"2")
    assert not storage.replace("x", b"0", b"2")
    assert storage.read("x") == b"1"
    assert storage.replace("x", b"1", b"2")
    assert storage.read("x") == b"2"
    real = S3Storage.read

    def read_before_another(self: S3Storage, key: str) -> bytes:
        found = real(self, key)
        if found == b"2":
            self.write(key, b"theirs")
        return found

    monkeypatch.setattr(S3Storage, "read", read_before_another)
    assert not storage.replace("x", b"2", b"ours"), "another came between the reading and the PUT"
    assert real(storage, "x") == b"theirs"


def test_replace_loses_no_change_of_many(storage: S3Storage) -> None:
    add_lines(storage, threads=4, times=5)


def test_large_objects_go_in_parts(storage: S3Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "_MULTIPART_ABOVE", 8 << 20)
    monkeypatch.setattr(s3, "_PART", 5 << 20)
    data = bytearray(torch.randint(0, 256, (12 << 20,), dtype=torch.uint8).numpy().tobytes())
    storage.write("large", data)
    assert storage.read("large") == data
    assert "-" in storage.version("large"), "the ETag of an upload in parts"
    assert storage.create("new", data)
    assert "-" in storage.version("new")
    assert storage.create("new", data)
    assert not storage.create("new", data[1:])
    assert storage.read("new") == data
    storage.write("mapped", memoryview(data))
    assert storage.read("mapped") == data
    storage.write("small", memoryview(data)[: 3 << 20])
    assert storage.read("small") == data[: 3 << 20]


def test_storages_pickle_without_secrets(storage: S3Storage, server: S3Server) -> None:
    storage.write("x", b"1")
    data = pickle.dumps(storage)
    assert server.environment["AWS_SECRET_ACCESS_KEY"].encode() not in data
    copy = pickle.loads(data)  # noqa: S301  bytes of this test
    assert copy.uri == storage.uri
    assert copy.read("x") == b"1"
    copy.close()


@pytest.mark.alone
def test_bad_buckets_and_keys(server: S3Server, environment: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    with pytest.raises(StoreError, match="no bucket 'absent-bucket' for the store s3://absent-bucket/p"):
        open_store("s3://absent-bucket/p")
    environment.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StoreError, match="refuses these credentials"):
        open_store(server.uri())
    assert time.monotonic() - began < 4


def test_harvest_and_stream_are_those_of_a_folder(storage: S3Storage, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = LocalStorage(tmp_path_factory.mktemp("store"))
    expected, _, _ = write_harvest(folder)
    manifest, _, _ = write_harvest(storage)
    assert manifest == expected == read_manifest(storage, HARVEST, HOOK)
    assert committed(storage, HARVEST, HOOK) == committed(folder, HARVEST, HOOK)
    for shuffle_tokens in (60, 10_000):
        settings: Any = {"batch_size": 7, "epochs": 2, "seed": 1, "shuffle_tokens": shuffle_tokens}
        ours = torch.stack(list(ActivationStream(storage, manifest, **settings)))
        assert torch.equal(ours, torch.stack(list(ActivationStream(folder, expected, **settings))))
    row = manifest.blocks[0]
    key = next(key for key in storage.list("") if key.endswith(row.file))
    storage.write(key, storage.read(key)[:-1])
    with pytest.raises(CorruptError, match=f"holds {row.bytes - 1} bytes"):
        read_block(storage, HARVEST, HOOK, row)


def test_a_model_is_fetched_once_by_two_processes(storage: S3Storage, tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "tiny")
    assert push_model(ModelConfig(id=str(folder)), storage.uri)[1]
    assert not push_model(ModelConfig(id=str(folder)), storage.uri)[1]
    program = (
        "from midiscover.models import *; from midiscover.config import ModelConfig\n"
        f"identity = resolve_model(ModelConfig(id='store:tiny'), {storage.uri!r})\n"
        "print(identity.digest, model_folder(identity))"
    )
    env = os.environ | {"MIDISCOVER_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", program]
    both = [subprocess.Popen(command, env=env, stdout=-1, stderr=-1, text=True) for _ in range(2)]
    (out, err), (other_out, other_err) = [process.communicate(timeout=60) for process in both]
    assert out == other_out, err + other_err
    assert (err + other_err).count("fetching tiny from s3://") == 1
    digest, fetched = out.split()
    assert digest == resolve_model(ModelConfig(id=str(folder))).digest == resolve_model(ModelConfig(id=fetched)).digest
    storage.delete("models/tiny/model.safetensors")
    again = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert (again.stdout, again.stderr) == (out, "")


def test_bodies_that_break_off_are_continued(proxied: tuple[S3Storage, FaultProxy]) -> None:
    storage, proxy = proxied
    data = bytes(range(256)) * 1000
    storage.write("x", data)
    proxy.cut_bodies = 5
    assert storage.read("x") == data
    assert proxy.broken["cut"] == 5
    proxy.cut_bodies = 3
    assert storage.read("x", 100, 5000) == data[100:5100]
    proxy.cut_bodies = 3
    target = bytearray(len(data))
    storage.read_into("x", [memoryview(target)])
    assert target == data


@pytest.mark.parametrize("how", ["whole", "part", "into"])
def test_an_object_that_is_replaced_after_its_body_broke_off_is_read_anew(
    proxied: tuple[S3Storage, FaultProxy], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    storage, proxy = proxied
    old, new = bytes(range(256)) * 1000, bytes(reversed(range(256))) * 1000
    storage.write("x", old)
    waits: list[int] = []

    def replace(attempt: int) -> None:
        if not waits:
            storage.write("x", new)
        waits.append(attempt)

    monkeypatch.setattr(s3, "_wait", replace)
    proxy.cut_bodies = 1
    target = bytearray(len(new))
    match how:
        case "whole":
            assert storage.read("x") == new
        case "part":
            assert storage.read("x", 100, 5000) == new[100:5100]
        case _:
            storage.read_into("x", [memoryview(target)[:7], memoryview(target)[7:]])
            assert target == new
    assert len(waits) == 2, "once for the body, once for the other object"


def test_bodies_that_break_off_for_ever_end_in_an_error(proxied: tuple[S3Storage, FaultProxy]) -> None:
    storage, proxy = proxied
    storage.write("x", bytes(100_000))
    proxy.cut_bodies = 1000
    with pytest.raises(StoreError, match=r"x in s3://.* broke off 10 times while it was read"):
        storage.read("x")
    assert proxy.broken["cut"] == 10


def test_a_lost_reply_is_no_conflict(proxied: tuple[S3Storage, FaultProxy]) -> None:
    storage, proxy = proxied
    for number in range(5):
        proxy.lose_replies = 1
        assert storage.create(f"marker-{number}", b"ours"), "our own repeated PUT was answered with 412"
    assert proxy.broken["lost"] == 5
    assert not storage.create("marker-0", b"theirs")
    proxy.lose_replies = 1
    assert storage.replace("marker-0", b"ours", b"ours again"), "and so was a repeated one under If-Match"
    assert storage.read("marker-0") == b"ours again"
    assert proxy.broken["lost"] == 6


def test_a_reader_reads_and_can_change_nothing(storage: S3Storage, server: S3Server, monkeypatch: Any) -> None:
    """The identity that `cluster/policies/store-reader.json` describes: for deployments."""
    if server.reader is None:
        pytest.skip("the server is not ours, and nobody said who may only read")
    storage.write("a", b"stands")
    for name, value in server.reader.items():
        monkeypatch.setenv(name, value)
    reader = open_store(storage.uri)
    assert reader.read("a") == b"stands"
    assert reader.list("") == ["a"]
    for change in (
        lambda: reader.write("b", b"new"),
        lambda: reader.create("b", b"new"),
        lambda: reader.replace("a", b"stands", b"new"),
        lambda: reader.delete("a"),
    ):
        with pytest.raises(StoreError, match="refused|denied|not allowed|AccessDenied"):
            change()
    assert storage.list("") == ["a"]
    assert storage.read("a") == b"stands"
