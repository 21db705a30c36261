"""Where this user's caches lie, and sha256 of files that is computed once per file and not per run.

A cached digest is found by absolute path, size and modification time. The cache is only ever a shortcut: it may be
deleted at any time, and where it can't be written the digests are computed again.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from midiscover.errors import UserError

SMALL_BYTES = 1 << 20
"""Files below this size are hashed each time: that costs less than the look-up in a long cache."""

SETTLED_SECONDS = 2
"""A file that changed more recently is not cached: a further change could leave size and time as they are."""

MAX_ENTRIES = 20_000


def cache_dir() -> Path:
    """The folder of caches that outlive a run: `$MIDISCOVER_HOME`, else `~/.cache/midiscover`. Not created here."""
    home = os.environ.get("MIDISCOVER_HOME")
    return Path(home).expanduser() if home else Path.home() / ".cache" / "midiscover"


def file_sha256(path: str | Path) -> str:
    """sha256 of a file's bytes in hex, from the cache where the file has not changed. OSError as from `open`."""
    return files_sha256([path])[0]


def files_sha256(paths: Sequence[str | Path]) -> list[str]:
    """`file_sha256` of many files, with one read and at most one write of the cache."""
    cache_file = cache_dir() / "digests.json"
    known: dict[str, str] | None = None
    fresh: dict[str, str] = {}
    digests = []
    for path in paths:
        stat = os.stat(path)
        if stat.st_size < SMALL_BYTES:
            digests.append(_hash(path))
            continue
        if known is None:
            known = _read(cache_file)
        key = f"{os.path.realpath(path)}\n{stat.st_size}\n{stat.st_mtime_ns}"
        digest = known.get(key)
        if digest is None:
            digest = _hash(path)
            if time.time_ns() - stat.st_mtime_ns > SETTLED_SECONDS * 1_000_000_000:
                fresh[key] = digest
        digests.append(digest)
    if fresh:
        _add(cache_file, fresh)
    return digests


@contextmanager
def mapped_file(path: Path, sha256: str) -> Iterator[memoryview]:
    """A file's bytes, which the system reads as they are needed: a file of weights may be larger than memory.

    UserError where they are not those that `sha256` was computed of. OSError as from `open`.
    """
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size:
            # Closed with its last view, whoever has it: an error on its way out may hold one.
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            _check(view, path, sha256)
            yield view
        else:  # which can't be mapped
            _check(b"", path, sha256)
            yield memoryview(b"")


def _check(data: bytes | memoryview, path: Path, sha256: str) -> None:
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{path} has changed since it was looked at; run the same command again.")


def _hash(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(cache_file: Path) -> dict[str, str]:
    try:
        entries = json.loads(cache_file.read_bytes())
    except (OSError, ValueError):  # absent, or not ours: the digests are computed again
        return {}
    return entries if isinstance(entries, dict) else {}


def _add(cache_file: Path, fresh: dict[str, str]) -> None:
    """Merge into what stands now. Of two processes that add at once one may lose its entries, never the file."""
    entries = list((_read(cache_file) | fresh).items())[-MAX_ENTRIES:]
    with suppress(OSError):  # a home that is read-only or full costs the shortcut, not the run
        write_atomically(cache_file, json.dumps(dict(entries), indent=0).encode())


def write_atomically(cache_file: Path, data: bytes) -> None:
    """Replace a file of the cache, so that no reader ever sees half of it. OSError where that can't be done."""
    cache_file.parent.mkdir(parents=True, exist_ok=True)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=cache_file.parent, prefix=f".{cache_file.stem}-", delete=False) as file:
            temporary = file.name
            file.write(data)
        os.replace(temporary, cache_file)
    except OSError:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise
