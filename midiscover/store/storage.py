"""One interface for folders and S3 buckets, and `open_store`, which turns an address into one of them.

Knows nothing of what is stored; paths are made in `layout`. Credentials, region and endpoint of a bucket come from
the environment alone (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, …), so that a pickled storage carries no secret.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from midiscover.errors import StoreError

DEFAULT_STORE = "midiscover-store"
"""Folder below the working directory that is the store where nothing else is said."""

Bytes = bytes | bytearray | memoryview


class Entry(NamedTuple):
    """What a listing tells of an object."""

    key: str
    bytes: int
    modified: float
    """Seconds since 1970."""
    version: str
    """As `Storage.version` tells it."""


class Storage(Protocol):
    """Objects by key. All methods may be called from several threads; storages can be pickled.

    A read or write that the environment prevents (rights, full disk, an endpoint that stays away) raises StoreError.
    """

    @property
    def uri(self) -> str:
        """Absolute folder, or `s3://bucket/prefix`, without a slash at its end."""
        ...

    @property
    def is_local(self) -> bool:
        """Whether objects are files of this machine."""
        ...

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes [start, start + length) of an object, fewer where it ends; FileNotFoundError where there is none."""
        ...

    def read_into(self, key: str, targets: Sequence[memoryview]) -> None:
        """Fill `targets`, writable views of bytes, one after another with an object.

        Raises FileNotFoundError where there is none, CorruptError where its size is not that of all targets together.
        """
        ...

    def write(self, key: str, data: Bytes) -> None:
        """Put an object in place of what stood there; readers see the old or the new one, never a part."""
        ...

    def create(self, key: str, data: Bytes) -> bool:
        """Put an object where none stands. True: the key holds exactly `data` now. False: other bytes stand there."""
        ...

    def replace(self, key: str, old: Bytes | None, new: Bytes) -> bool:
        """Put `new` where exactly `old` stands (None: where nothing stands). False: something else stands there.

        For small objects that several people change: whoever gets False reads again. True as well where another writer
        put the same bytes.
        """
        ...

    def list(self, prefix: str) -> list[str]:
        """All keys below the folder `prefix` (`""`: the whole store), at any depth, sorted."""
        ...

    def entries(self, prefix: str) -> list[Entry]:
        """The same with size and time of each object."""
        ...

    def exists(self, key: str) -> bool:
        """Whether an object stands under this key."""
        ...

    def version(self, key: str) -> str:
        """Something that changes when the object does, had without reading it; FileNotFoundError as for `read`."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens where there is none."""
        ...

    def local_path(self, key: str) -> Path | None:
        """Where the file of this key is or would be; None for a bucket."""
        ...


def store_uri(uri: str | None = None) -> str:
    """The address that `open_store` opens for `uri`."""
    return uri or os.environ.get("MIDISCOVER_STORE") or DEFAULT_STORE


def folder_of(address: str) -> Path:
    """The folder of a local store, there or not. StoreError for the home of a user whom this machine does not know."""
    try:
        return Path(address).expanduser()
    except RuntimeError:
        raise StoreError(f"The store {address!r} lies in the home of a user whom this machine does not know.") from None


def open_store(uri: str | None = None, *, create: bool = True, patient: bool = True) -> Storage:
    """Open the store at `uri`, else at $MIDISCOVER_STORE, else at ./midiscover-store.

    A bucket is asked once, with one attempt, whether it is there and lets us in. A folder is made where it is absent
    and freed of what killed writers left, unless `create` is False. Raises StoreError with a sentence for every
    address that can't be used.

    patient: whether requests to a bucket wait minutes for a server that went away, as a job's should, or give up after
    seconds, because somebody waits for an answer.
    """
    address = store_uri(uri)
    scheme, separator, rest = address.partition("://")
    if not separator:
        return _open_folder(folder_of(address), create)
    if scheme != "s3":
        raise StoreError(
            f"The store {address!r} has the unknown scheme {scheme!r}: give a folder or s3://bucket/prefix."
        )
    bucket, _, prefix = rest.partition("/")
    if not bucket:
        raise StoreError(f"The store {address!r} names no bucket: give s3://bucket or s3://bucket/prefix.")
    from midiscover.store.s3 import S3Storage  # boto3 takes 0.3 s to import, and most commands need no bucket

    storage = S3Storage(bucket, prefix.strip("/"), patient)
    storage.check()
    return storage


def _open_folder(folder: Path, create: bool) -> Storage:
    from midiscover.store.local import LocalStorage

    if folder.exists() and not folder.is_dir():
        raise StoreError(f"The store {str(folder)!r} is a file: give a folder or s3://bucket/prefix.")
    if create:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"The store folder {str(folder)!r} can't be made: {error.strerror}.") from error
    elif not folder.is_dir():
        raise StoreError(f"There is no store at {str(folder)!r}: give --store or MIDISCOVER_STORE, or run a job first.")
    storage = LocalStorage(folder.resolve())
    if create:
        storage.sweep()
    return storage
