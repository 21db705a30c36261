"""Files of text: finding them under a path or prefix, their common digest, and their documents as they stream by.

What the kinds of files mean is said in `texts`. All but parquet objects of a bucket, which are fetched whole, are read
as streams.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from midiscover.digests import files_sha256, mapped_file
from midiscover.errors import CorpusError
from midiscover.ids import canonical_json
from midiscover.store import layout
from midiscover.store.documents import read_json
from midiscover.store.storage import Storage, open_store

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".json.gz", ".txt")

PARAGRAPH_CHARACTERS = 2000
"""Paragraphs of a .txt file that stands alone are joined until a document has so many characters."""

CONTENTS = "_contents.json"
"""Beside files that we put into a store: the sha256 of each, which stands for it as if it were read here."""

_SHA256 = re.compile(r"[0-9a-f]{64}")

OBJECT_BYTES = 1 << 23
"""Bytes of one request to a bucket."""


@dataclass(frozen=True, slots=True)
class TextFile:
    """One file: its name below the source, its address for messages, how to open it, and how to tell it apart."""

    name: str
    where: str
    open: Callable[[], BinaryIO]
    path: Path | None = None
    """Where it lies, for a local file."""
    version: str = ""
    """What tells an object of a bucket from another content under its key."""


def find(source: str) -> list[TextFile] | None:
    """The files that `source` names, sorted; None where it can only be the id of a hub data set.

    CorpusError where it is a path that is not there, a file of another kind, or a folder without such files.
    """
    if source.startswith("s3://"):
        return _in_store(source)
    if "://" in source:
        raise CorpusError(f"{source}: text is read from files, folders, s3:// prefixes and hub data sets, by its id.")
    path = _path(source)
    if path.is_dir():
        return _in_folder(path)
    if path.exists():
        if not source.endswith(SUFFIXES):
            raise CorpusError(f"{source} is of no kind that can be read; text files end in {', '.join(SUFFIXES)}.")
        return [TextFile(path.name, str(path), lambda: open(path, "rb"), path=path)]
    if source.endswith(SUFFIXES) or path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise CorpusError(f"{source} does not exist; corpus.source must name an existing file or folder.")
    return None


def put(source: str, storage: Storage) -> tuple[str, int, bool]:
    """Put local files into a store; their address there, their bytes, and whether they are new there.

    What is read there has the digest that it has here, so that it makes the same corpus. UserError where a file changes
    while it is put there.
    """
    files = find(source) or []
    folder = layout.text_folder(digest(files))
    paths = [file.path for file in files if file.path is not None]
    contents = {file.name: sha256 for file, sha256 in zip(files, _sha256(paths), strict=True)}
    # A removal that overlapped with another put may have left the contents without their files.
    is_new = not {f"{folder}/{name}" for name in (CONTENTS, *contents)} <= set(storage.list(folder))
    if is_new:
        for file, path in zip(files, paths, strict=True):
            with mapped_file(path, contents[file.name]) as data:
                storage.write(f"{folder}/{file.name}", data)
        storage.create(f"{folder}/{CONTENTS}", canonical_json(contents).encode())
    # A file that stands alone is named by itself: a folder of one .txt would be another text.
    only = f"/{files[0].name}" if _path(source).is_file() else ""
    return f"{storage.uri}/{folder}{only}", sum(path.stat().st_size for path in paths), is_new


def name_of(source: str) -> str:
    """What records call the source: the address in a bucket, else the last part of the path."""
    return source if "://" in source else _path(source).resolve().name


def _path(source: str) -> Path:
    return Path(os.path.expanduser(source))  # which leaves a ~ as it is where this machine does not know the user


def digest(files: Sequence[TextFile]) -> str:
    """sha256 over the names and contents of the files; in a bucket, whose objects are not fetched, over their versions.

    Hashes of large local files are remembered between runs.
    """
    paths = [file.path for file in files if file.path is not None]
    contents = dict(zip(paths, _sha256(paths), strict=True))
    total = hashlib.sha256()
    for file in files:
        content = contents[file.path] if file.path is not None else file.version
        total.update(f"{file.name}\n{content}\n".encode(errors="surrogateescape"))
    return total.hexdigest()


def _sha256(paths: Sequence[Path]) -> list[str]:
    try:
        return files_sha256(paths)
    except OSError as error:  # a link to nothing, or a file that is somebody else's
        raise _unreadable(error) from error


def _unreadable(error: OSError) -> CorpusError:
    return CorpusError(f"{error.filename or 'A text file'} can't be read: {error.strerror}.")


def read(files: Sequence[TextFile], field: str) -> Generator[str]:
    """The texts of all files in turn; `field` is the column or key that holds them."""
    alone = len(files) == 1
    for file in files:
        with _opened(file) as stream:
            if file.name.endswith(".parquet"):
                yield from _parquet(stream, field, file.where)
            elif file.name.endswith(".txt"):
                yield from _txt(stream, alone, file.where)
            else:
                yield from _json_lines(stream, field, file.where)


def text_of(row: Mapping[str, Any], field: str, where: str) -> str:
    """The text of one row; "" where it has none. CorpusError without such a field or where it holds no string."""
    if field not in row:
        there = ", ".join(map(str, row)) or "none"
        raise CorpusError(f"{where} has no field {field!r}; it has: {there}. corpus.text_field chooses.")
    text = row[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise CorpusError(f"{where}: {field!r} holds {type(text).__name__}, not text. corpus.text_field chooses.")
    return _encodable(text) if text.strip() else ""


def _in_folder(folder: Path) -> list[TextFile]:
    found, others = [], set()

    def refuse(error: OSError) -> None:
        raise _unreadable(error) from error

    for root, names, files in os.walk(folder, followlinks=True, onerror=refuse):
        names[:] = [
            name for name in names if not name.startswith((".", "_")) and not _leads_back(Path(root, name), folder)
        ]
        for name in files:
            path = Path(root, name)
            if name.startswith((".", "_")):
                continue
            if name.endswith(SUFFIXES):
                found.append(path)
            else:
                others.add(path.suffix or name)
    if not found:
        raise _nothing_in(str(folder), others)
    names = sorted((path.relative_to(folder).as_posix(), path) for path in found)
    return [TextFile(name, str(path), lambda path=path: open(path, "rb"), path=path) for name, path in names]


def _leads_back(path: Path, folder: Path) -> bool:
    """Whether it is a link to a folder that was passed on the way to it, or in which `folder` itself lies."""
    if not path.is_symlink():
        return False
    passed = [above for above in path.parents if above.is_relative_to(folder)]
    return any(path.samefile(above) for above in (*passed, *folder.resolve().parents))


def _nothing_in(where: str, others: set[str]) -> CorpusError:
    there = f"only {', '.join(sorted(others)[:5])}" if others else "nothing"
    return CorpusError(f"{where} holds no text files but {there}; text files end in {', '.join(SUFFIXES)}.")


def _in_store(source: str) -> list[TextFile]:
    """Objects under a prefix, or the one object that `source` names; only those whose names are keys of a store.

    CorpusError where some of a text that was put there are gone: the rest would be another text.
    """
    path = source.removeprefix("s3://").rstrip("/")
    folder, _, name = path.rpartition("/")
    is_object = bool(folder) and name.endswith(SUFFIXES) and open_store(f"s3://{folder}", create=False).exists(name)
    address = f"s3://{folder if is_object else path}"
    storage = open_store(address, create=False)
    there = {name: storage.version(name)} if is_object else {one.key: one.version for one in storage.entries("")}
    keys = list(there)
    texts = [key for key in keys if is_object or (key.endswith(SUFFIXES) and not re.search(r"(^|/)[._]", key))]
    contents = _contents(storage) if is_object or CONTENTS in there else {}
    lost = contents.keys() - there.keys()
    if lost and not is_object:
        raise CorpusError(f"{source} has lost {min(lost)}; submit again from the machine where the text lies.")
    if not texts:
        raise _nothing_in(source, {Path(key).suffix or key for key in keys})
    return [
        TextFile(
            key,
            f"{address}/{key}",
            lambda key=key: _open_object(storage, key),
            version=contents.get(key) or there[key],
        )
        for key in texts
    ]


def _contents(storage: Storage) -> dict[str, str]:
    """The sha256 of each file of a text that was put there. Somebody's own file of that name says none."""
    said = read_json(storage, CONTENTS)
    given = said.items() if isinstance(said, dict) else ()
    return {name: sha256 for name, sha256 in given if isinstance(sha256, str) and _SHA256.fullmatch(sha256)}


class _ObjectStream(io.RawIOBase):
    """An object of a bucket, read from front to back."""

    def __init__(self, storage: Storage, key: str) -> None:
        self._storage, self._key, self._position = storage, key, 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        data = self._storage.read(self._key, self._position, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _open_object(storage: Storage, key: str) -> BinaryIO:
    if key.endswith(".parquet"):  # its index stands at the end
        return io.BytesIO(storage.read(key))
    return io.BufferedReader(_ObjectStream(storage, key), OBJECT_BYTES)


@contextmanager
def _opened(file: TextFile) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked; what goes wrong while they are read becomes a CorpusError that names the file."""
    try:
        with file.open() as raw:
            if file.name.endswith(".gz"):
                with gzip.open(raw) as unpacked:
                    yield cast(BinaryIO, unpacked)
            else:
                yield raw
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise CorpusError(f"{file.where} is no complete gzip file: {error}.") from error
    except OSError as error:
        raise CorpusError(f"{file.where} can't be read: {error}.") from error


def _parquet(stream: BinaryIO, field: str, where: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(stream)
        schema = table.schema_arrow
        if field not in schema.names:
            raise CorpusError(
                f"{where} has no column {field!r}; it has: {', '.join(schema.names)}. corpus.text_field chooses."
            )
        if schema.names.count(field) > 1:
            raise CorpusError(f"{where} has several columns {field!r}; only one may have the name of the text.")
        kind = schema.field(field).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if pa.types.is_null(kind):  # a file in which every text is missing
            return
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise CorpusError(f"{where}: column {field!r} holds {kind}, not text. corpus.text_field chooses.")
        for batch in table.iter_batches(batch_size=256, columns=[field]):
            for text in batch.column(0).to_pylist():
                if text and text.strip():
                    yield text
    except UnicodeDecodeError as error:
        raise CorpusError(f"{where}: column {field!r} holds text that is not UTF-8: {error.reason}.") from error
    except pa.ArrowException as error:
        raise CorpusError(f"{where} is no parquet file: {str(error).splitlines()[0]}") from error


def _json_lines(stream: BinaryIO, field: str, where: str) -> Iterator[str]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        place = f"{where}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CorpusError(f"{place} is not JSON: {error}.") from error
        except RecursionError as error:
            raise CorpusError(f"{place} holds a field that is nested too deeply to be read.") from error
        if not isinstance(row, dict):
            raise CorpusError(f'{place} holds no JSON object; one with the text would be {{"{field}": "..."}}.')
        text = text_of(row, field, place)
        if text:
            yield text


def _txt(stream: BinaryIO, alone: bool, where: str) -> Iterator[str]:
    """One document, or, for a file that stands alone, its paragraphs joined into documents of some length."""
    gathered, size = [], 0
    with io.TextIOWrapper(stream, encoding="utf-8-sig") as lines:
        try:
            for line in lines:
                if alone and not line.strip() and size >= PARAGRAPH_CHARACTERS:
                    yield "".join(gathered).strip()
                    gathered, size = [], 0
                elif line.strip() or gathered:
                    gathered.append(line)
                    size += len(line)
        except UnicodeDecodeError as error:
            place = stream.tell() - len(error.object) + error.start  # the decoder counts from where it read last
            raise CorpusError(f"{where} is not UTF-8 text: {error.reason} at byte {place}.") from error
    text = "".join(gathered).strip()
    if text:
        yield text


def _encodable(text: str) -> str:
    """JSON can escape half a surrogate pair; UTF-8 and the tokenizers can't hold it."""
    return re.sub(r"[\ud800-\udfff]", "\ufffd", text)
