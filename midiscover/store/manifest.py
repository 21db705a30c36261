"""The records of blocks: spans, rows and manifests, and their JSON. Loads no torch, so that `inspect` stays quick.

Manifests carry a format version; a later one is refused with a sentence instead of being half understood.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from midiscover.errors import ConflictError, CorruptError, StoreError
from midiscover.ids import canonical_json
from midiscover.store import layout
from midiscover.store.storage import Storage

VERSION = 1
"""Format of block files, markers and manifests."""

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")


@dataclass(frozen=True, slots=True)
class BlockSpan:
    """The windows of the corpus [start_window, stop_window) that make one block of every hook."""

    index: int
    split: Split
    start_window: int
    stop_window: int


@dataclass(frozen=True, slots=True)
class BlockRow:
    """One committed block."""

    index: int
    split: Split
    start_window: int
    stop_window: int
    rows: int
    """Tokens in the block."""
    usable: int
    """Rows that are not masked."""
    masked: dict[str, int]
    """Mask name in lower case -> rows; names without rows are left out."""
    file: str
    """Name within the hook's folder."""
    sha256: str
    """Of the whole file, in hex."""
    bytes: int
    """Size of the file."""
    sum: str | None = None
    """Sum over usable rows, [d_in] little-endian float64 in base64; in markers of activations only."""
    sum_sq: float | None = None
    """Sum of the squared norms of usable rows; activations only."""

    @property
    def span(self) -> BlockSpan:
        """What the block was cut from."""
        return BlockSpan(self.index, self.split, self.start_window, self.stop_window)

    @property
    def context_size(self) -> int:
        """Rows of one window."""
        return self.rows // (self.stop_window - self.start_window)

    def without_sums(self) -> BlockRow:
        """As manifests hold it."""
        return dataclasses.replace(self, sum=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokensManifest:
    """The token blocks of a harvest, complete."""

    v: int = VERSION
    harvest_id: str
    rows: int
    blocks: tuple[BlockRow, ...]
    lineage: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class HookManifest:
    """The activations of one hook, complete."""

    v: int = VERSION
    harvest_id: str
    hook: str
    d_in: int
    dtype: str = "bfloat16"
    rows: int
    usable: dict[str, int]
    """Split -> usable rows."""
    masked: dict[str, int]
    """Mask name -> rows, both splits."""
    mean: tuple[float, ...]
    """[d_in] over usable training rows."""
    variance: float
    """Mean squared distance of usable training rows to their mean."""
    blocks: tuple[BlockRow, ...]
    lineage: dict[str, Any] = field(default_factory=dict)

    def split(self, name: Split) -> tuple[BlockRow, ...]:
        """Blocks of one split, in order."""
        return tuple(row for row in self.blocks if row.split == name)


ManifestT = TypeVar("ManifestT", HookManifest, TokensManifest)


def read_manifest(storage: Storage, harvest_id: str, hook: str) -> HookManifest | None:
    """The manifest of a harvested hook, or None where the hook is not (wholly) harvested."""
    return _read(storage, layout.hook_manifest(harvest_id, hook), HookManifest)


def read_tokens_manifest(storage: Storage, harvest_id: str) -> TokensManifest | None:
    """The manifest of the tokens of a harvest, or None."""
    return _read(storage, layout.hook_manifest(harvest_id, layout.TOKENS), TokensManifest)


def commit_manifest(storage: Storage, manifest: ManifestT, key: str) -> ManifestT:
    """Create a manifest, or return the one that stands where it names the same blocks; else ConflictError."""
    if storage.create(key, dump(manifest)):
        return manifest
    standing = _read(storage, key, type(manifest))
    if standing is None or standing.blocks != manifest.blocks:
        raise ConflictError(
            f"{key} in {storage.uri} already names other blocks. Remove its folder, then harvest this hook again."
        )
    return standing


def dump(record: BlockRow | HookManifest | TokensManifest) -> bytes:
    """A record as canonical JSON, without fields that are None."""
    return canonical_json(_plain(record)).encode()


def parse_row(data: bytes, key: str) -> BlockRow:
    """The row of a marker; `key` names it in errors."""
    return _parse(data, key, BlockRow)


def _plain(record: Any) -> dict[str, Any]:
    fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    if "blocks" in fields:
        fields["blocks"] = [_plain(row) for row in record.blocks]
    return {name: value for name, value in fields.items() if value is not None}


def _read(storage: Storage, key: str, kind: type[ManifestT]) -> ManifestT | None:
    try:
        return _parse(storage.read(key), f"{key} in {storage.uri}", kind)
    except FileNotFoundError:
        return None


RecordT = TypeVar("RecordT", BlockRow, HookManifest, TokensManifest)


def _parse(data: bytes, where: str, kind: type[RecordT]) -> RecordT:
    try:
        fields = json.loads(data)
    except ValueError as error:
        raise CorruptError(f"{where} is no JSON: {error}.") from error
    if not isinstance(fields, Mapping):
        raise CorruptError(f"{where} holds no record.")
    if fields.get("v", VERSION) != VERSION:
        raise StoreError(f"{where} has format version {fields['v']}; this miDiscover reads version {VERSION}.")
    try:
        if "blocks" in fields:
            fields = {**fields, "blocks": tuple(BlockRow(**row) for row in fields["blocks"])}
        if "mean" in fields:
            fields = {**fields, "mean": tuple(fields["mean"])}
        return kind(**fields)
    except TypeError as error:
        raise CorruptError(f"{where} is not such a record: {error}.") from error
