"""storedmodels.py: a model folder put into a store is the same model wherever it is fetched; nothing else gets in."""

from __future__ import annotations

import json
import mmap
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

import midiscover.lm  # noqa: F401  so that hook tables are made in this process
from midiscover import models, storedmodels
from midiscover.config import ModelConfig
from midiscover.errors import CorruptError, ModelError, StoreError
from midiscover.modelfiles import made_once
from midiscover.models import ModelIdentity, config_folder, hook_table, model_folder, push_model, resolve_model
from midiscover.store.local import LocalStorage
from midiscover.store.storage import Bytes, Storage
from midiscover.upkeep import garbage, remove, survey
from tests.tiny import make_tiny_model


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIDISCOVER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_model("phi", tmp_path / "tiny-phi")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def resolve(id: str | Path, store: Path | None = None) -> ModelIdentity:
    return resolve_model(ModelConfig(id=str(id)), None if store is None else str(store))


def push(folder: Path, store: Path, name: str | None = None) -> bool:
    return push_model(ModelConfig(id=str(folder)), str(store), name)[1]


class Bucket:
    """A store whose objects are no files of this machine; counts what is read."""

    def __init__(self, root: Path) -> None:
        self.inner, self.reads = LocalStorage(root), [""]
        self.uri = "s3://bucket"

    def local_path(self, key: str) -> None:
        return None

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        self.reads.append(key)
        return self.inner.read(key, start, length)


@pytest.fixture
def bucket(folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """The store with the model, seen as a bucket."""
    push(folder, store)
    bucket = Bucket(store)

    def open_store(uri: str | None, *, create: bool) -> Storage:
        return bucket  # type: ignore[return-value]  # what is used of a storage

    monkeypatch.setattr(storedmodels, "open_store", open_store)
    monkeypatch.setattr(models, "open_store", open_store)
    return bucket


def test_a_stored_model_is_the_folder_it_was(folder: Path, store: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"may run code")
    (folder / "modeling_phi.py").write_text("print('runs')")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert push(folder, store)
    here, there = resolve(folder), resolve("store:tiny-phi", store)
    assert (there.name, there.digest, there.tokenizer_digest) == (here.name, here.digest, here.tokenizer_digest)
    assert resolve(model_folder(there)).digest == here.digest
    assert hook_table(there) == hook_table(here)
    assert {path.name for path in (store / "models" / "tiny-phi").iterdir()} == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors",
        "chat_template.jinja", "manifest.json",
    }  # fmt: skip


def test_shards_and_the_name_of_a_folder_travel(folder: Path, store: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "midiscover_model.json").write_text('{"name": "org/phi-dequantized", "source": "s", "licence": null}')
    push(folder, store)
    there = resolve("store:phi-dequantized", store)
    assert (there.name, there.digest) == ("org/phi-dequantized", resolve(folder).digest)
    assert resolve(model_folder(there)) == resolve(store / "models" / "phi-dequantized")


def test_what_stands_is_not_written_again_and_never_replaced(folder: Path, store: Path, tmp_path: Path) -> None:
    assert push(folder, store, "phi")
    before = {path: path.stat().st_mtime_ns for path in (store / "models" / "phi").iterdir()}
    assert not push(folder, store, "phi")
    other = make_tiny_model("phi", tmp_path / "other", seed=1)
    with pytest.raises(ModelError, match="holds another model by the name 'phi'; give --name"):
        push(other, store, "phi")
    assert {path: path.stat().st_mtime_ns for path in (store / "models" / "phi").iterdir()} == before
    assert push(other, store, "phi-1")
    with pytest.raises(ModelError, match="can't be a model's name"):
        push(folder, store, "../phi")


def test_a_push_that_was_ended_is_no_model_until_it_is_repeated(folder: Path, store: Path) -> None:
    push(folder, store)
    (store / "models" / "tiny-phi" / "manifest.json").unlink()
    (store / "models" / "tiny-phi" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no manifest, so it is not complete"):
        resolve("store:tiny-phi", store)
    assert push(folder, store)
    assert resolve(model_folder(resolve("store:tiny-phi", store))).digest == resolve(folder).digest


def test_a_push_that_was_ended_says_what_is_not_its_own(
    folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = store / "models" / "phi"
    place.mkdir(parents=True)
    (place / "notes.md").write_text("mine")
    real = LocalStorage.create

    def create(self: LocalStorage, key: str, data: Bytes) -> bool:
        if key.endswith("model.safetensors"):
            raise OSError("the disk is gone")
        return real(self, key, data)

    monkeypatch.setattr(LocalStorage, "create", create)
    for _ in range(2):  # what the first has left is no less ours
        with pytest.raises(OSError, match="the disk is gone"):
            push(folder, store, "phi")
        assert json.loads((place / "unfinished.json").read_text())["others"] == ["notes.md"]
    monkeypatch.setattr(LocalStorage, "create", real)
    storage = LocalStorage(store)
    waste = garbage(survey(storage), grace=0)
    assert {one.key.rpartition("/")[2] for one in waste} >= {"config.json", "tokenizer.json", "unfinished.json"}
    os.utime(place / "unfinished.json", (0, 0))  # times may be whole seconds
    began = survey(storage)
    real_put = storedmodels._put

    def put(key: str, *how: Any) -> bool:
        remove(began, waste)
        return real_put(key, *how)

    monkeypatch.setattr(storedmodels, "_put", put)
    assert push(folder, store, "phi")
    assert {path.name for path in place.iterdir()} >= {"config.json", "model.safetensors", "manifest.json", "notes.md"}
    assert not (place / "unfinished.json").exists()
    assert garbage(survey(storage), grace=0) == []
    assert resolve(model_folder(resolve("store:phi", store))).digest == resolve(folder).digest


@pytest.mark.parametrize("lost", ["model.safetensors", "config.json"])
def test_a_push_puts_back_what_a_finished_model_has_lost(folder: Path, store: Path, lost: str) -> None:
    push(folder, store, "phi")
    (store / "models" / "phi" / lost).unlink()
    assert push(folder, store, "phi")
    assert not push(folder, store, "phi")
    assert resolve(model_folder(resolve("store:phi", store))).digest == resolve(folder).digest


def test_a_model_that_is_not_there_is_named_with_those_that_are(folder: Path, store: Path) -> None:
    with pytest.raises(StoreError, match="no store at"):
        resolve("store:phi", store)
    store.mkdir()
    with pytest.raises(ModelError, match="holds no model 'phi'. Its models: none; `midiscover model push`"):
        resolve("store:phi", store)
    push(folder, store, "one")
    push(folder, store, "two")
    for name in ("phi", "../one", "", "one/config.json"):
        with pytest.raises(ModelError, match=r"Its models: one, two\.$"):
            resolve(f"store:{name}", store)
    with pytest.raises(ModelError, match=r"model\.revision"):
        resolve_model(ModelConfig(id="store:one", revision="main"), str(store))


@pytest.mark.parametrize(
    ("manifest", "error", "sentence"),
    [
        ("{", CorruptError, "can't be read"),
        ('{"v": 1}', CorruptError, "can't be read"),
        ("[]", CorruptError, "can't be read"),
        ('{"v": 2}', StoreError, "another format version"),
    ],
)
def test_manifests_that_cannot_be_read(
    folder: Path, store: Path, manifest: str, error: type[Exception], sentence: str
) -> None:
    push(folder, store)
    (store / "models" / "tiny-phi" / "manifest.json").write_text(manifest)
    with pytest.raises(error, match=sentence):
        resolve("store:tiny-phi", store)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../../x.safetensors", "modeling.py", "sub/x.safetensors"])
def test_a_manifest_brings_no_other_files(folder: Path, store: Path, name: str) -> None:
    push(folder, store)
    file = store / "models" / "tiny-phi" / "manifest.json"
    fields = json.loads(file.read_text())
    fields["files"][name] = {"sha256": "0", "size": 1}
    file.write_text(json.dumps(fields))
    with pytest.raises(ModelError, match="can't travel"):
        resolve("store:tiny-phi", store)


def test_a_bucket_is_asked_for_each_file_once(bucket: Bucket, folder: Path, home: Path) -> None:
    identity = resolve("store:tiny-phi")
    assert bucket.reads[1:] == ["models/tiny-phi/manifest.json"], "naming a model downloads nothing"
    copy = pickle.loads(pickle.dumps(identity))  # noqa: S301  as a worker gets it
    assert "model.safetensors" not in [path.name for path in config_folder(copy).iterdir()]
    fetched = model_folder(copy)
    assert fetched.is_relative_to(home)
    assert resolve(fetched).digest == resolve(folder).digest
    assert sorted(bucket.reads[2:]) == sorted(f"models/tiny-phi/{name}" for name in copy.stored.files)
    count = len(bucket.reads)
    assert model_folder(copy) == fetched
    assert len(bucket.reads) == count
    assert not [path for path in fetched.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("size", [0, 100])
def test_a_file_that_a_power_cut_has_shortened_is_fetched_again(bucket: Bucket, folder: Path, size: int) -> None:
    fetched = model_folder(resolve("store:tiny-phi"))
    for name in ("model.safetensors", "tokenizer.json"):
        os.truncate(fetched / name, size)
    bucket.reads.clear()
    assert resolve(model_folder(resolve("store:tiny-phi"))).digest == resolve(folder).digest
    assert sorted(bucket.reads[1:]) == [f"models/tiny-phi/{name}" for name in ("model.safetensors", "tokenizer.json")]


def test_what_a_killed_fetch_has_left_is_removed_by_the_next(bucket: Bucket) -> None:
    fetched = config_folder(resolve("store:tiny-phi"))
    (fetched / ".fetching-x").mkdir()
    (fetched / ".fetching-x" / "model.safetensors").write_bytes(b"half")
    assert model_folder(resolve("store:tiny-phi")) == fetched
    assert not [path for path in fetched.iterdir() if path.name.startswith(".")]


def test_what_a_killed_conversion_has_left_is_removed_by_the_next(tmp_path: Path) -> None:
    left = tmp_path / ".making-phi" / "phi"
    left.mkdir(parents=True)
    (left / "half.safetensors").write_bytes(b"half")

    def make(made: Path) -> None:
        made.mkdir()
        (made / "config.json").write_text("{}")

    made_once(tmp_path / "phi", make)
    assert [path.name for path in (tmp_path / "phi").iterdir()] == ["config.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".phi.lock", "phi"]


def test_files_are_fetched_in_chunks(bucket: Bucket, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storedmodels, "CHUNK_BYTES", 10_000)
    fetched = model_folder(resolve("store:tiny-phi"))
    assert (fetched / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert bucket.reads.count("models/tiny-phi/model.safetensors") > 5


@pytest.mark.parametrize("harm", ["changed", "short", "absent"])
def test_a_file_that_is_not_the_one_that_was_pushed_is_refused(
    bucket: Bucket, store: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    identity = resolve("store:tiny-phi")
    file = store / "models" / "tiny-phi" / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + (b"" if harm == "short" else bytes([data[-1] ^ 1])))
    if harm == "absent":
        file.unlink()
    for _ in range(2):
        with pytest.raises(CorruptError, match=r"models/tiny-phi/model.safetensors in .* is not the file"):
            model_folder(identity)
    monkeypatch.undo()  # the same store as a folder
    monkeypatch.setenv("MIDISCOVER_HOME", str(store.parent / "another-home"))
    with pytest.raises(CorruptError, match="is not the file that was pushed"):
        model_folder(resolve("store:tiny-phi", store))
    file.write_bytes(data)
    assert model_folder(resolve("store:tiny-phi", store)) == file.parent


def test_only_local_models_are_pushed(folder: Path, store: Path, tmp_path: Path) -> None:
    push(folder, store, "one")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        push(folder, tmp_path / "untouched")
    assert not (tmp_path / "untouched").exists()


def test_weights_are_mapped_and_not_read_into_memory(
    folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "merges.txt").touch()  # an empty file can't be mapped
    written: list[str] = []
    real = LocalStorage.create

    def create(self: LocalStorage, key: str, data: Bytes) -> bool:
        if not key.endswith(("manifest.json", "unfinished.json")):
            assert isinstance(data, memoryview)
            written.append(key.rpartition("/")[2])
            if data:
                assert isinstance(data.obj, mmap.mmap)
        return real(self, key, data)

    monkeypatch.setattr(LocalStorage, "create", create)
    assert push(folder, store, "mine")
    assert {"merges.txt", "model.safetensors"} <= set(written)
    for name in written:
        assert (store / "models" / "mine" / name).read_bytes() == (folder / name).read_bytes()
