"""Language models in a store, `models/<name>/`, so that nodes which share no disk can fetch them. Loads no torch.

A model is a folder as transformers saves it, with a manifest that is written last and never changes. A bucket's files
are fetched once per machine into the cache, each checked against its sha256; a store in a folder is read where it is.
Whose digest a model has is `models.py`'s matter.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from midiscover import lineage
from midiscover.digests import cache_dir, files_sha256, mapped_file
from midiscover.errors import CorruptError, ModelError, StoreError
from midiscover.ids import canonical_json
from midiscover.modelfiles import INDEX_FILE, MODEL_FILES, NAME_FILE, SINGLE_FILE, weight_files
from midiscover.store import layout
from midiscover.store.documents import dump, read_json
from midiscover.store.storage import Storage, open_store

VERSION = 1
"""Format of a model's manifest."""

CHUNK_BYTES = 64 << 20
"""What is held in memory of a file while it is fetched."""

_FETCHING = ".fetching-"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFile:
    """One file of a stored model."""

    sha256: str
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredModel:
    """A model in a store, as its manifest tells."""

    store: str
    """Address of the store; a node that needs the files opens it with its own credentials."""
    key: str
    """Name below `models/`."""
    name: str
    """What the model is called in records."""
    digest: str
    """That of the same files in a local folder."""
    tokenizer_digest: str
    files: Mapping[str, StoredFile]

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(file.size for file in self.files.values())

    def document(self) -> bytes:
        """The manifest: the same bytes wherever the store lies."""
        fields = {name: value for name, value in asdict(self).items() if name not in ("store", "key")}
        return canonical_json({"v": VERSION, **fields}).encode()


def read_stored(name: str, storage: Storage) -> StoredModel:
    """The model `name` of a store; its files are not touched. ModelError names the models that the store holds."""
    where = f"models/{name} in {storage.uri}"
    try:
        if not _NAME.fullmatch(name):
            raise FileNotFoundError
        fields = json.loads(storage.read(layout.model_manifest(name)))
        if fields.pop("v") != VERSION:
            raise StoreError(f"{where} has another format version than {VERSION}, which this miDiscover reads.")
        files = {file: StoredFile(**facts) for file, facts in fields.pop("files").items()}
        stored = StoredModel(store=storage.uri, key=name, files=files, **fields)
    except FileNotFoundError:
        raise ModelError(_absent(name, storage)) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptError(f"The manifest of {where} can't be read: {error}. {_REMEDY}") from error
    _check_names(files, where)
    return stored


def stored_names(storage: Storage) -> list[str]:
    """The names of the complete models of a store."""
    keys = storage.list(layout.MODELS)
    return [key.split("/")[1] for key in keys if key == layout.model_manifest(key.split("/")[1])]


_REMEDY = "Remove its folder from the store, then push the model again."


def _absent(name: str, storage: Storage) -> str:
    if any(key.startswith(f"{layout.MODELS}/{name}/") for key in storage.list(layout.MODELS)):
        return (
            f"The model {name!r} in the store {storage.uri} has no manifest, so it is not complete: "
            "push it again with `midiscover model push`."
        )
    there = ", ".join(stored_names(storage)) or "none; `midiscover model push` puts one there"
    return f"The store {storage.uri} holds no model {name!r}. Its models: {there}."


def model_files(folder: Path) -> dict[str, StoredFile]:
    """The files of a model folder that travel: config, tokenizer and safetensors weights, nothing that can run."""
    weights = [file.relative_to(folder).as_posix() for file in weight_files(folder)]
    index = () if weights == [SINGLE_FILE] else (INDEX_FILE,)
    names = [name for name in (*MODEL_FILES, NAME_FILE, *index) if (folder / name).is_file()] + weights
    _check_names(names, str(folder))
    paths = [folder / name for name in names]
    digests = files_sha256(paths)
    return {
        name: StoredFile(sha256=digest, size=path.stat().st_size)
        for name, path, digest in zip(names, paths, digests, strict=True)
    }


class NameTakenError(ModelError):
    """Another model stands by that name, or is being pushed."""


def put_stored(model: StoredModel, folder: Path, storage: Storage) -> bool:
    """Write a model's files, then its manifest. False: it stands already. NameTakenError: another has that name.

    Files that a push which was ended has left are taken as they are where they are the same, and not replaced:
    somebody else may be pushing them now (of a file that goes to a bucket in parts, one that comes just then is not
    seen). A manifest whose files are gone, as a removal leaves it that overlapped with a push, is taken back first.
    UserError where one changes while it is pushed.
    """
    if not _NAME.fullmatch(model.key):
        raise ModelError(
            f"{model.key!r} can't be a model's name: letters, digits, '_', '.' and '-'; give another one with "
            "`midiscover model push --name`."
        )
    if _stands(model, storage):
        return False
    _begin(model, storage)
    for name, file in model.files.items():
        if not _put(layout.model_file(model.key, name), folder / name, file, storage):
            raise NameTakenError(
                f"The store {storage.uri} holds files of another model by the name {model.key!r}, whose push is not "
                f"finished; give --name, or remove {layout.model_folder(model.key)} from the store."
            )
    is_first = storage.create(layout.model_manifest(model.key), model.document())
    storage.delete(layout.model_file(model.key, layout.STARTED))
    if not is_first:
        _stands(model, storage)
    return True


def _begin(model: StoredModel, storage: Storage) -> None:
    """Say that the folder is being filled, anew where a push was ended, and what stood there before the first."""
    key, folder = layout.model_file(model.key, layout.STARTED), layout.model_folder(model.key)
    there = [name.removeprefix(f"{folder}/") for name in storage.list(folder) if name != key]
    fresh = {"v": VERSION, "began": lineage.now(), "others": there}
    if not storage.create(key, dump(fresh)):  # what another push has put there is no less ours
        said = read_json(storage, key)
        others = said.get("others") if isinstance(said, dict) else None
        storage.write(key, dump(fresh | ({"others": others} if isinstance(others, list) else {})))


def _put(key: str, path: Path, file: StoredFile, storage: Storage) -> bool:
    """Put a file where none stands; whether it stands now, False where another does."""
    if storage.exists(key):
        sha256 = hashlib.sha256()
        for chunk in _chunks(storage, key, file.size + 1):
            sha256.update(chunk)
        return sha256.hexdigest() == file.sha256
    with mapped_file(path, file.sha256) as data:
        return storage.create(key, data)


def _stands(model: StoredModel, storage: Storage) -> bool:
    if not storage.exists(layout.model_manifest(model.key)):
        return False
    standing = read_stored(model.key, storage)
    if standing.digest != model.digest:
        raise NameTakenError(f"The store {storage.uri} holds another model by the name {model.key!r}; give --name.")
    named = {layout.model_file(model.key, name) for name in standing.files}
    if named <= set(storage.list(layout.model_folder(model.key))):
        return True
    storage.delete(layout.model_manifest(model.key))
    return False


def stored_folder(model: StoredModel, *, weights: bool) -> Path:
    """A folder on this machine with a model's files, all or all but its weights; fetched once, and verified.

    CorruptError: a file is not the one that was pushed.
    """
    names = [name for name in model.files if weights or not _is_weights(name)]
    folder = cache_dir() / "models" / f"{model.key}-{model.digest[:10]}"
    if not _missing(model, names, folder):
        return folder
    storage = open_store(model.store, create=False)
    local = storage.local_path(layout.model_folder(model.key))
    if local is not None:
        _verify(model, names, local)
        return local
    from filelock import FileLock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            for left in folder.glob(f"{_FETCHING}*"):  # by a process that was killed: the lock is ours
                shutil.rmtree(left, ignore_errors=True)
            missing = _missing(model, names, folder)
            if any(_is_weights(name) for name in missing):
                size = sum(model.files[name].size for name in missing) / 1e9
                print(f"midiscover: fetching {model.name} from {model.store}, once ({size:.1f} GB)", file=sys.stderr)
            for name in missing:
                _fetch(model, name, storage, folder)
    except OSError as error:
        raise ModelError(f"Model {model.name} can't be kept in {folder}: {error.strerror}.") from error
    return folder


def _missing(model: StoredModel, names: Iterable[str], folder: Path) -> list[str]:
    """Names of files that are not there whole; a file's end may be lost where the power was cut after a fetch."""

    def is_whole(name: str) -> bool:
        file = folder / name
        return file.is_file() and file.stat().st_size == model.files[name].size

    return [name for name in names if not is_whole(name)]


def read_part(model: StoredModel, name: str, start: int, length: int | None) -> bytes:
    """Bytes of a file where it lies, without fetching it; FileNotFoundError where the model has none by that name."""
    if name not in model.files:
        raise FileNotFoundError(name)
    storage = open_store(model.store, create=False)
    return storage.read(layout.model_file(model.key, name), start, length)


def _fetch(model: StoredModel, name: str, storage: Storage, folder: Path) -> None:
    expected, key = model.files[name], layout.model_file(model.key, name)
    sha256, done = hashlib.sha256(), 0
    with tempfile.TemporaryDirectory(dir=folder, prefix=_FETCHING) as temporary:
        with (Path(temporary) / name).open("xb") as file:
            for chunk in _chunks(storage, key, expected.size):
                file.write(chunk)
                sha256.update(chunk)
                done += len(chunk)
            file.flush()
            os.fsync(file.fileno())  # what is fetched is not looked into again
        if done != expected.size or sha256.hexdigest() != expected.sha256:
            raise CorruptError(_corrupt(model, name))
        (Path(temporary) / name).replace(folder / name)


def _chunks(storage: Storage, key: str, size: int) -> Iterator[bytes]:
    """An object up to at least `size` bytes, as far as it goes; nothing where there is none."""
    done = 0
    while done < size:
        try:
            chunk = storage.read(key, done, CHUNK_BYTES)
        except FileNotFoundError:
            return
        if not chunk:
            return
        yield chunk
        done += len(chunk)


def _verify(model: StoredModel, names: list[str], folder: Path) -> None:
    for name in names:
        file = folder / name
        if not file.is_file() or files_sha256([file]) != [model.files[name].sha256]:
            raise CorruptError(_corrupt(model, name))


def _corrupt(model: StoredModel, name: str) -> str:
    return f"{layout.model_file(model.key, name)} in {model.store} is not the file that was pushed. {_REMEDY}"


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors")


def _check_names(names: Iterable[str], where: str) -> None:
    for name in names:
        plain = _NAME.fullmatch(name) and _is_weights(name)
        if not plain and name not in (*MODEL_FILES, NAME_FILE, INDEX_FILE):
            raise ModelError(
                f"The model at {where} has a file {name!r}, which can't travel: no plain safetensors file."
            )
