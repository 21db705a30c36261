"""Which model is meant, and where it can be hooked: identity, digest, hook table. Loads no torch.

`resolve_model` turns a `ModelConfig` into a `ModelIdentity`: a hub commit, or the sha256 of a folder's files. What has
to look inside a model (the hook table, a GGUF conversion) runs in a process of its own, `python -m midiscover.lm`, and
is kept under `cache_dir()`. Running a model is `lm.py`'s matter.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from midiscover.config import ModelConfig
from midiscover.digests import cache_dir, file_sha256, files_sha256, write_atomically
from midiscover.embedded import ensure_embedded_model
from midiscover.errors import ModelError
from midiscover.hooks import HookInfo, HookTable, refuse_impossible
from midiscover.ids import canonical_json, hook_layer
from midiscover.modelfiles import (
    MODEL_FILES,
    NAME_FILE,
    WEIGHT_FILES,
    HubSilentError,
    cached_snapshot,
    convert_gguf,
    download,
    has_weights,
    hub_commit,
    made_once,
    run_module,
    tokenizer_files,
    weight_files,
    weight_names,
)
from midiscover.store.storage import open_store
from midiscover.storedmodels import (
    NameTakenError,
    StoredModel,
    model_files,
    put_stored,
    read_part,
    read_stored,
    stored_folder,
)

__all__ = [
    "HookInfo",
    "HookTable",
    "ModelIdentity",
    "cache_dir",
    "hook_table",
    "model_folder",
    "push_model",
    "resolve_model",
]

STORED = "store:"
"""`model.id: store:<name>` is the model `models/<name>/` of the run's store; no hub id and no path looks like it."""

_TABLE_VERSION = 3
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelIdentity:
    """What a model is, independent of the machine it lies on."""

    name: str
    """For people and records: the hub id, or what the folder calls itself."""
    digest: str
    """Hub commit, or sha256 over the sha256 of config, weights and tokenizer files."""
    tokenizer_digest: str
    """sha256 over the tokenizer files alone: equal tokenizers make equal corpora."""
    folder: str | None = None
    """The local folder; None for hub models, whose files lie in the hub cache, and for models in a store."""
    hub_id: str | None = None
    revision: str | None = None
    """The hub commit."""
    stored: StoredModel | None = None
    """The model in a store: enough for any node to fetch it."""


def resolve_model(config: ModelConfig, store: str | None = None) -> ModelIdentity:
    """Find out which model is meant, without loading it; `store` is where `store:<name>` is looked up.

    The first use of `embedded` and of a GGUF file makes a safetensors folder, once. Raises ModelError within 5 seconds
    where a folder is incomplete, the store does not hold the model, or the hub does not know it or does not answer and
    nothing of it is cached.
    """
    if not config.id:
        raise ModelError("model.id is empty; give a hub id, a folder, a .gguf file, store:<name> or 'embedded'.")
    path = Path(os.path.expanduser(config.id))  # which leaves a ~ as it is where the user is not known here
    stored = config.id.startswith(STORED)
    local = config.id == "embedded" or stored or path.exists()
    if local and config.revision is not None:
        raise ModelError(
            f"model.revision is for hub models; {config.id!r} is a local one, whose files are its revision."
        )
    if stored:
        return _stored_identity(read_stored(config.id.removeprefix(STORED), open_store(store, create=False)))
    if config.id == "embedded":
        return _local_identity(ensure_embedded_model())
    if path.is_dir():
        return _local_identity(path.resolve())
    if path.is_file() and path.suffix == ".gguf":
        return _local_identity(_converted(path.resolve()))
    if path.is_file():
        raise ModelError(
            f"Model {config.id!r} is a file; give a folder with config.json and safetensors, or a .gguf file."
        )
    if not _HUB_ID.fullmatch(config.id) or path.suffix == ".gguf":
        raise ModelError(
            f"Model {config.id!r} is neither an existing folder or .gguf file nor a hub id such as 'microsoft/phi-2'."
        )
    return _hub_identity(config.id, config.revision)


def push_model(
    config: ModelConfig, store: str | None, name: str | None = None, *, beside: bool = False
) -> tuple[StoredModel, bool]:
    """Put a local model into a store as `store:<name>`; False: it stood there already. Raises ModelError.

    `name` None is what the model calls itself. What it is called in records is that as well, or `name` where it says
    nothing. beside: where another model stands by that name, this one is put as `store:<name>-<its digest>`.
    """
    identity = resolve_model(config)
    if identity.folder is None:
        raise ModelError(f"{config.id!r} is no local model: give a folder, a .gguf file or 'embedded'.")
    folder, storage = Path(identity.folder), open_store(store)
    key = name or identity.name.rpartition("/")[2]
    stored = StoredModel(
        store=storage.uri,
        key=key,
        name=identity.name if (folder / NAME_FILE).is_file() else key,
        digest=identity.digest,
        tokenizer_digest=identity.tokenizer_digest,
        files=model_files(folder),
    )
    try:
        return stored, put_stored(stored, folder, storage)
    except NameTakenError:
        if not beside:
            raise
    stored = replace(stored, key=f"{key}-{identity.digest[:10]}")
    return stored, put_stored(stored, folder, storage)


def model_folder(identity: ModelIdentity) -> Path:
    """The folder with the model's files on this machine; a hub or stored model is downloaded, once per machine."""
    if identity.stored is not None:
        return stored_folder(identity.stored, weights=True)
    folder = config_folder(identity)
    if identity.hub_id is not None and not has_weights(folder):
        folder = download(identity.hub_id, identity.digest, (*MODEL_FILES, *WEIGHT_FILES))
    weight_files(folder)
    return folder


def config_folder(identity: ModelIdentity) -> Path:
    """The folder with at least the model's config and tokenizer on this machine."""
    if identity.stored is not None:
        return stored_folder(identity.stored, weights=False)
    if identity.hub_id is not None:
        cached = cached_snapshot(identity.hub_id, identity.digest)
        complete = cached is not None and (cached / "config.json").is_file()
        return cached if cached and complete else download(identity.hub_id, identity.digest, MODEL_FILES)
    folder = Path(identity.folder or "")
    if not folder.is_dir():
        raise ModelError(f"The folder of model {identity.name}, {folder}, is not on this machine.")
    return folder


def model_type(identity: ModelIdentity) -> str | None:
    """What its config.json calls its family, as `phi`."""
    return json.loads((config_folder(identity) / "config.json").read_text()).get("model_type")


def hook_table(identity: ModelIdentity, *, context_size: int = 512, wanted: Sequence[str] = ()) -> HookTable:
    """All hooks of a model, from its config alone (seconds, once; then read from the cache).

    `context_size` is the number of tokens in a window, on which attention's share of the FLOPs depends. Of the hooks
    `wanted`, those that can't be there are refused before the table is made; the others are not looked at.
    """
    version = importlib.metadata.version("transformers")
    file = cache_dir() / "hooks" / f"{identity.digest[:40]}-transformers-{version}-v{_TABLE_VERSION}.json"
    table = _kept_table(file)
    if table is None:
        folder = config_folder(identity)
        if wanted:
            config = json.loads((folder / "config.json").read_text())
            refuse_impossible(wanted, model=identity.name, config=config, weights=_weight_names(identity, folder))
        # A process that has torch loaded anyhow needs no other one for it (0.2 s instead of 4 s).
        lm = sys.modules.get("midiscover.lm")
        text = json.dumps(lm.hook_facts(folder)) if lm else run_module("midiscover.lm", "table", str(folder))
        write_atomically(file, text.encode())
        table = json.loads(text)
    recommended = set(table.pop("recommended"))

    def flops(linear: float, attention: float) -> float:
        return linear + attention * context_size

    return HookTable(
        model=identity.name,
        flops_per_token=flops(*table.pop("full")),
        hooks={
            path: HookInfo(
                path=path,
                d_in=d_in,
                layer=hook_layer(path),
                flops_per_token=flops(*cost),
                recommended=path in recommended,
            )
            for path, (d_in, *cost) in table.pop("hooks").items()
        },
        **table,
    )


def _kept_table(file: Path) -> dict[str, Any] | None:
    """None where there is none, or a power cut has left half of it."""
    try:
        return json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def _weight_names(identity: ModelIdentity, folder: Path) -> list[str]:
    def read(name: str, start: int, length: int | None) -> bytes:
        if identity.stored is not None:
            return read_part(identity.stored, name, start, length)
        with (folder / name).open("rb") as file:
            file.seek(start)
            return file.read(-1 if length is None else length)

    return weight_names(read)


def _converted(gguf: Path) -> Path:
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{gguf} is not a GGUF file: it does not begin with the letters GGUF.")
    digest = file_sha256(gguf)
    name = f"{gguf.stem}-dequantized"

    def make(folder: Path) -> None:
        print(f"midiscover: converting {gguf.name} to safetensors, once", file=sys.stderr)
        convert_gguf(gguf, folder, name=name, source=f"{gguf.name} sha256 {digest}", licence=None)

    return made_once(cache_dir() / "models" / f"{name}-{digest[:10]}", make)


def _stored_identity(stored: StoredModel) -> ModelIdentity:
    return ModelIdentity(
        name=stored.name, digest=stored.digest, tokenizer_digest=stored.tokenizer_digest, stored=stored
    )


def _local_identity(folder: Path) -> ModelIdentity:
    if not (folder / "config.json").is_file():
        raise ModelError(f"Model folder {folder} holds no config.json; give a folder saved with save_pretrained.")
    parts = {
        "config": _config_digest(folder / "config.json"),
        "weights": _digests(weight_files(folder)),
        "tokenizer": _digests(tokenizer_files(folder)),
    }
    about = folder / NAME_FILE
    name = json.loads(about.read_text()).get("name") if about.is_file() else None
    return ModelIdentity(
        name=name or folder.name,
        digest=_sha256(parts),
        tokenizer_digest=_sha256(parts["tokenizer"]),
        folder=str(folder),
    )


def _hub_identity(hub_id: str, revision: str | None) -> ModelIdentity:
    try:
        hub_commit(hub_id, revision)  # within seconds, and with the reason where there is none
        # By the name that was given: the cache then knows what it meant when the hub does not answer one day.
        folder = download(hub_id, revision or "main", MODEL_FILES)
    except HubSilentError as silent:
        cached = cached_snapshot(hub_id, revision)
        if cached is None or not has_weights(cached):
            raise ModelError(
                f"Model {hub_id!r}: the hub {silent}, and no copy of it is cached here; give a local folder in "
                "model.id, or try again later, with a connection."
            ) from silent
        folder = cached
    if not (folder / "config.json").is_file():
        raise ModelError(f"Hub model {hub_id!r} holds no config.json: it is not a transformers model.")
    commit, tokenizer = folder.name, _sha256(_digests(tokenizer_files(folder)))
    return ModelIdentity(name=hub_id, digest=commit, tokenizer_digest=tokenizer, hub_id=hub_id, revision=commit)


def _config_digest(file: Path) -> str:
    # Who saved the file, and where, is no part of the model: an upgrade must not orphan what was made before.
    config = json.loads(file.read_text())
    return _sha256({key: config[key] for key in config.keys() - {"transformers_version", "_name_or_path"}})


def _digests(files: Sequence[Path]) -> dict[str, str]:
    return {file.name: digest for file, digest in zip(files, files_sha256(files), strict=True)}


def _sha256(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()
