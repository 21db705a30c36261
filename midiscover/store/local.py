"""A store in a folder. Every file appears whole: temporary file, fsync, then a rename or a hard link."""

from __future__ import annotations

import errno
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from midiscover.errors import CorruptError, StoreError, StoreFailedError
from midiscover.store.layout import FOLDERS, check_key, is_key
from midiscover.store.storage import Bytes, Entry

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}")
_LEFT_SECONDS = 86_400  # a write takes seconds; the rest is for clocks that differ
_ATTEMPTS = 10
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP}


@dataclass(frozen=True, slots=True)
class LocalStorage:
    """Objects as files below `root`, an absolute folder. Names that start with a dot are files being written."""

    root: Path
    is_store: bool = True
    """False of a folder that is one SAE or export, in which no folder is somebody else's."""

    @property
    def uri(self) -> str:
        """The folder."""
        return str(self.root)

    @property
    def is_local(self) -> bool:
        """Always True."""
        return True

    def local_path(self, key: str) -> Path:
        """The file of this key, whether it is there or not."""
        return self.root / check_key(key)

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """See `Storage.read`."""
        with self._explained("read", key), self.local_path(key).open("rb") as file:
            file.seek(start)
            return file.read(-1 if length is None else length)

    def read_into(self, key: str, targets: Sequence[memoryview]) -> None:
        """See `Storage.read_into`."""
        expected = sum(len(target) for target in targets)
        with self._explained("read", key), self.local_path(key).open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size != expected:
                raise CorruptError(f"{key} in {self.uri} holds {size} bytes where {expected} were written.")
            for target in targets:
                done = 0
                while done < len(target):  # one system call moves 2 GiB at most
                    count = file.readinto(target[done:])
                    if not count:
                        raise CorruptError(f"{key} in {self.uri} was cut short while it was read.")
                    done += count

    def write(self, key: str, data: Bytes) -> None:
        """See `Storage.write`."""
        with self._explained("write", key), self._temporary(key, data) as temporary:
            os.replace(temporary, self.local_path(key))

    def create(self, key: str, data: Bytes) -> bool:
        """See `Storage.create`. A hard link either makes the name or fails where it exists: no other call is both.

        In a folder of a file system without them, such as exFAT, a lock beside the file, as of `replace`.
        """
        with self._explained("write", key), self._temporary(key, data) as temporary:
            for _ in range(_ATTEMPTS):
                try:
                    os.link(temporary, self.local_path(key))
                    return True
                except FileExistsError:
                    with suppress(FileNotFoundError):  # taken back since: the place is free again
                        return self.read(key) == data
                except OSError as error:
                    if error.errno not in _NO_LINKS:
                        raise
                    with FileLock(lock_of(self.local_path(key))):
                        if self.exists(key):
                            return self.read(key) == data
                        os.replace(temporary, self.local_path(key))
                        return True
        raise StoreError(f"{key} in {self.uri} could not be created: other writers kept getting in the way.")

    def replace(self, key: str, old: Bytes | None, new: Bytes) -> bool:
        """See `Storage.replace`. A lock beside the file, which stays: a removed one would be two locks for a moment."""
        path = self.local_path(key)
        with self._explained("write", key):
            self._make_folder(path)
            with FileLock(lock_of(path)):
                try:
                    standing = self.read(key)
                except FileNotFoundError:
                    standing = None
                if standing != old:
                    return False
                self.write(key, new)
                return True

    def list(self, prefix: str) -> list[str]:
        """See `Storage.list`."""
        folder = self.local_path(prefix.rstrip("/")) if prefix else self.root
        keys = []
        with self._explained("list", prefix or "what is"):
            for parent, folders, names in _walk(self.root, folder, self._refuse):
                base = Path(parent).relative_to(self.root)
                keys += [(base / name).as_posix() for name in names if is_key(name)]
                folders[:] = [name for name in folders if is_key(name)]
            self._require_root()
        return sorted(keys)

    def entries(self, prefix: str) -> list[Entry]:
        """See `Storage.entries`."""
        found = []
        for key in self.list(prefix):
            with self._explained("look for", key):
                try:
                    stat = self.local_path(key).stat()
                except FileNotFoundError:  # deleted since
                    continue
                found.append(Entry(key, stat.st_size, stat.st_mtime, _version(stat)))
        return found

    def exists(self, key: str) -> bool:
        """See `Storage.exists`."""
        with self._explained("look for", key):
            found = self.local_path(key).is_file()
            if not found:
                self._require_root()
            return found

    def version(self, key: str) -> str:
        """See `Storage.version`: size and time of the last change."""
        with self._explained("look for", key):
            return _version(self.local_path(key).stat())

    def delete(self, key: str) -> None:
        """See `Storage.delete`."""
        with self._explained("delete", key):
            self.local_path(key).unlink(missing_ok=True)

    def leftovers(self) -> list[Entry]:
        """The temporary files of writers that were killed, a day after; their keys are none that `read` takes."""
        before, found = time.time() - _LEFT_SECONDS, []
        for parent, _, names in _walk(self.root, self.root):
            for path in (Path(parent, name) for name in names if _TEMPORARY.fullmatch(name)):
                with suppress(OSError):  # no rights, or somebody else was faster
                    stat = path.stat()
                    if stat.st_mtime < before:
                        key = path.relative_to(self.root).as_posix()
                        found.append(Entry(key, stat.st_size, stat.st_mtime, _version(stat)))
        return found

    def sweep(self) -> int:
        """Remove the leftovers; returns their bytes.

        Another process that was suspended for a day in the middle of a write is told that this write failed.
        """
        size = 0
        for entry in self.leftovers():
            with suppress(OSError):
                (self.root / entry.key).unlink()
                size += entry.bytes
        return size

    @contextmanager
    def _temporary(self, key: str, data: Bytes) -> Iterator[Path]:
        """A synced file with `data` beside the place of `key`; on return its folder is synced and the file gone."""
        path = self.local_path(key)
        self._make_folder(path)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)

    def _make_folder(self, path: Path) -> None:
        """That of `path`; never the store's own, which was moved away or unmounted where it is not there."""
        self._require_root()
        path.parent.mkdir(parents=True, exist_ok=True)

    def _require_root(self) -> None:
        """StoreFailedError where the folder itself is gone: nothing is known of what it held, and it is not empty."""
        if not os.path.isdir(self.root):  # False as well where it may not be looked at
            raise StoreFailedError(f"The store {self.uri} is not there any more.")

    def _refuse(self, error: OSError) -> None:
        """A folder that can't be listed is no empty one: its work would be done again. One at the top of a store that
        is none of ours, as a disk's `lost+found`, holds nothing of it."""
        place = Path(error.filename or self.root)
        is_foreign = self.is_store and place.parent == self.root and place.name not in FOLDERS
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)) and not is_foreign:
            raise error

    @contextmanager
    def _explained(self, verb: str, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, FileNotFoundError) and verb in ("read", "look for"):
                self._require_root()
                raise
            raise StoreFailedError(f"Can't {verb} {key} in the store {self.uri}: {error.strerror}.") from error


def _version(stat: os.stat_result) -> str:
    return f"{stat.st_size}-{stat.st_mtime_ns}"


def lock_of(path: Path) -> Path:
    """The lock of a file that `LocalStorage.replace` has changed."""
    return path.with_name(f".{path.name}.lock")


def _walk(
    root: Path, folder: Path, onerror: Callable[[OSError], None] | None = None
) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` that follows links at the top of a store, as of `activations` to a larger disk, and none below."""
    for parent, folders, names in os.walk(folder, onerror=onerror):
        yield parent, folders, names
        if Path(parent) == root:
            for link in [root / name for name in folders if (root / name).is_symlink()]:
                yield from os.walk(link, onerror=onerror)


def _sync_folder(folder: Path) -> None:
    """Make a new name survive a power failure, not only the bytes behind it, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)
