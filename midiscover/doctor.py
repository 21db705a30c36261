"""What a run needs of a machine, looked at one by one: versions, GPUs, store, database, model, text.

Everything is tried as a run does it, the store's conditional writes included, and nothing is left behind. What fails
says in a sentence what to do.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from midiscover import lineage, tables
from midiscover.config import RunConfig
from midiscover.cores import memory
from midiscover.errors import MiDiscoverError, StoreError
from midiscover.models import hook_table, resolve_model
from midiscover.store.local import lock_of
from midiscover.store.storage import Storage, folder_of, open_store, store_uri
from midiscover.texts import resolve_source
from midiscover.tracking import Tracker
from midiscover.tracking.engine import VARIABLE

Status = Literal["ok", "fails", "none"]


class Finding(NamedTuple):
    """What one look found."""

    machine: str
    what: str
    status: Status
    """`none`: it is not there, and nothing needs it."""
    told: str
    """What was seen, or what is wrong and what would be right."""


class Absent(Exception):
    """Not there, and not needed."""


def examine(store: str | None, config: RunConfig | None = None) -> list[Finding]:
    """Look at this machine. config: whose model and text are looked up as well."""
    looks: list[tuple[str, Callable[[], str]]] = [
        ("versions", _versions),
        ("GPUs", _gpus),
        ("kernels", _kernels),
        ("memory", _memory),
        ("store", lambda: _store(store)),
        ("database", lambda: _database(store)),
        ("hub token", _token),
    ]
    if config is not None:
        looks.append(("model", lambda: _model(config, store)))
        looks.append(("text", lambda: _text(config)))
    return [_looked(what, look) for what, look in looks]


def report(findings: Sequence[Finding], *, as_json: bool) -> int:
    """Print what was found; the exit code: 1 where anything fails."""
    rows = [found._asdict() for found in findings]
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        tables.show(tables.findings_table(rows))
    return 1 if any(found.status == "fails" for found in findings) else 0


def _looked(what: str, look: Callable[[], str]) -> Finding:
    machine = platform.node()
    try:
        return Finding(machine, what, "ok", look())
    except Absent as error:
        return Finding(machine, what, "none", str(error))
    except MiDiscoverError as error:
        return Finding(machine, what, "fails", str(error))
    except Exception as error:  # of a library, whose own words are the best there are
        return Finding(machine, what, "fails", f"{type(error).__name__}: {' '.join(str(error).split())}")


def _versions() -> str:
    return ", ".join(f"{name} {version}" for name, version in lineage.versions().items())


def _gpus() -> str:
    import torch

    if not torch.cuda.is_available():
        raise Absent("no GPU that torch can use: everything runs on the CPU")
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        found.append(f"{name}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free")
    return "; ".join(found)


def _kernels() -> str:
    import torch

    from midiscover.cards import is_out_of_memory, lost_its_card
    from midiscover.sae.pattern import suits_kernels, try_kernel

    if not torch.cuda.is_available() or not suits_kernels(torch.device("cuda")):
        raise Absent("no GPU from Ampere on with Triton: PyTorch's operators take the steps")
    try:
        try_kernel(torch.device("cuda"))
    except Exception as error:  # whatever it is, steps do without kernels, unless it is the card
        if is_out_of_memory(error) or lost_its_card():
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Absent(
            f"Triton can't build kernels here ({reason}), so that steps are slower: install a C compiler and the "
            "headers of this Python (gcc and python3-dev, say)."
        ) from error
    return "Triton builds them"


def _memory() -> str:
    total = memory()
    free = min(total, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return f"{os.cpu_count()} cores, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"


def _store(uri: str | None) -> str:
    address = store_uri(uri)
    if "://" not in address and not folder_of(address).exists():
        parent = next(path for path in folder_of(address).resolve().parents if path.exists())
        if not os.access(parent, os.W_OK):
            raise StoreError(
                f"The store {address} is not there, and {parent} can't be written to; choose another place."
            )
        raise Absent(f"{address} is not there yet; the first run makes it")
    storage = open_store(uri, create=False)
    _try_writes(storage)
    return f"{storage.uri}: reads, writes, and writes only where nothing else stands"


def _try_writes(storage: Storage) -> None:
    """All that runs rely on, with an object of our own that is removed in the end."""
    key, first, second = f"doctor-{secrets.token_hex(8)}.txt", b"first", b"second"
    try:
        storage.write(key, first)
        if storage.read(key) != first:
            raise StoreError(f"{storage.uri} gives back other bytes than were written.")
        if storage.create(key, second):
            raise StoreError(
                f"{storage.uri} puts an object where one stands: the server ignores If-None-Match, so two runs could "
                "overwrite each other. Use a server that honours conditional writes (AWS, SeaweedFS, MinIO, Ceph)."
            )
        if storage.replace(key, second, second) or not storage.replace(key, first, second):
            raise StoreError(f"{storage.uri} does not compare before it replaces: the server ignores If-Match.")
        if storage.read(key) != second or key not in storage.list(""):
            raise StoreError(f"{storage.uri} does not show at once what was written.")
    finally:
        storage.delete(key)
        path = storage.local_path(key)
        if path is not None:
            lock_of(path).unlink(missing_ok=True)


def _database(uri: str | None) -> str:
    address = store_uri(uri)
    if not os.environ.get(VARIABLE) and "://" not in address and not (folder_of(address) / "tracker.db").exists():
        raise Absent("tracker.db is not there yet; the first run makes it")
    with Tracker.for_store(open_store(uri, create=False)) as tracker:
        runs = len(tracker.list_runs())
        return f"{tracker.where}: answers, its tables are current; {runs} sweep{'' if runs == 1 else 's'}"


def _token() -> str:
    from huggingface_hub import get_token

    if not get_token():
        raise Absent("HF_TOKEN is not set: only public models and data sets can be had")
    return "there is one"


def _model(config: RunConfig, store: str | None) -> str:
    identity = resolve_model(config.model, store)
    table = hook_table(identity, context_size=config.corpus.context_size)
    return f"{identity.name}: {table.n_layers} layers, d_model {table.d_model:,}, digest {identity.digest[:12]}"


def _text(config: RunConfig) -> str:
    source = resolve_source(config.corpus)
    return f"{source.name}: digest {source.digest[:12]}"
