"""Activation blocks: how a harvest is cut, how a block is committed, what a manifest promises, how a block is read.

A block is data first, then a marker that is created only if absent and names the winner; the manifest comes last.
Every hook of a harvest, and the tokens they share, are cut alike. Nothing here computes activations or orders rows.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from midiscover.errors import CorruptError, StageError
from midiscover.store import layout
from midiscover.store.blockfile import Spec, byte_view, decode, encode, header
from midiscover.store.manifest import (
    SPLITS,
    BlockRow,
    BlockSpan,
    HookManifest,
    Split,
    TokensManifest,
    commit_manifest,
    dump,
    parse_row,
)
from midiscover.store.manifest import read_manifest as read_manifest
from midiscover.store.manifest import read_tokens_manifest as read_tokens_manifest
from midiscover.store.storage import Bytes, Storage

_MARKER = re.compile(r"block-\d{5,}\.json")
_STATISTICS_ROWS = (
    128  # converted to float64 at a time: at d_in 2,560 they stay in the cache, 1.5 times faster than 1,024
)
_STATISTICS_ROWS_ON_GPU = 8192
_MARKER_READERS = 16

_verified: set[tuple[str, str]] = set()
"""(store, key) of the blocks whose bytes this process has found to be those that were written."""


class Mask(IntEnum):
    """Why a row is skipped. Masked rows stay in their block, so that all hooks and the tokens have the same rows."""

    USABLE = 0
    SPECIAL = 1
    """First position of a window, or a special token such as BOS."""
    PADDING = 2
    OUTLIER = 3
    NONFINITE = 4


class Block(NamedTuple):
    """One block of one hook, in memory."""

    acts: Tensor
    """[rows, d_in] bfloat16"""
    norm: Tensor
    """[rows] float32: the norm of each activation before it was rounded."""
    mask: Tensor
    """[rows] uint8, values of `Mask`."""


class TokenBlock(NamedTuple):
    """What the rows of a block are, the same for all hooks."""

    token_id: Tensor
    """[rows] int32"""
    window: Tensor
    """[rows] int32: window number in the corpus."""
    position: Tensor
    """[rows] int16: place within the window."""


def block_plan(
    train_windows: int, held_out_windows: int, *, context_size: int, block_tokens: int
) -> tuple[BlockSpan, ...]:
    """Cut windows [0, train) and [train, train + held_out) into blocks of at most `block_tokens` rows, one at least."""
    step = max(1, block_tokens // context_size)
    ends = {"train": (0, train_windows), "held_out": (train_windows, train_windows + held_out_windows)}
    spans = []
    for split in SPLITS:
        first, stop = ends[split]
        for start in range(first, stop, step):
            spans.append(BlockSpan(len(spans), split, start, min(start + step, stop)))
    return tuple(spans)


def commit_block(
    storage: Storage, harvest_id: str, hook: str, span: BlockSpan, acts: Tensor, norm: Tensor, mask: Tensor
) -> BlockRow:
    """Write one block and its marker; return the row that stands, which is another writer's where that came first.

    acts: [rows, d_in] bfloat16; norm: [rows] float32; mask: [rows] uint8, values of `Mask`. On any device.
    """
    assert (acts.dtype, norm.dtype, mask.dtype) == (torch.bfloat16, torch.float32, torch.uint8)
    assert norm.shape == mask.shape == acts.shape[:-1], "acts are [rows, d_in], norm and mask [rows]"
    usable = mask == Mask.USABLE
    counts = torch.bincount(mask.long().cpu(), minlength=len(Mask)).tolist()
    masked = {code.name.lower(): counts[code] for code in Mask if code and counts[code]}
    data = encode({"acts": acts, "norm": norm, "mask": mask})
    return _commit(storage, harvest_id, hook, data, _row(span, len(acts), data, masked, row_moments(acts, usable)))


def commit_tokens(storage: Storage, harvest_id: str, span: BlockSpan, ids: Tensor) -> BlockRow:
    """Write the token block of a span; ids: [windows, context_size] integers. Returns the row that stands."""
    windows, context_size = ids.shape
    assert windows == span.stop_window - span.start_window
    window = torch.arange(span.start_window, span.stop_window, dtype=torch.int32)
    position = torch.arange(context_size, dtype=torch.int16)
    tokens = TokenBlock(ids.to(torch.int32).flatten(), window.repeat_interleave(context_size), position.repeat(windows))
    data = encode(tokens._asdict())
    return _commit(storage, harvest_id, layout.TOKENS, data, _row(span, ids.numel(), data, {}))


def committed(storage: Storage, harvest_id: str, hook: str, *, take_back: bool = False) -> dict[int, BlockRow]:
    """The committed blocks of a hook (or of `layout.TOKENS`) by index. CorruptError where a marker's file is gone.

    take_back: such a marker is removed instead, so that its block is made again.
    """
    keys = storage.list(layout.hook_folder(harvest_id, hook))
    markers = [key for key in keys if _MARKER.fullmatch(key.rpartition("/")[2])]
    with ThreadPoolExecutor(1 if storage.is_local else _MARKER_READERS) as readers:
        rows = [parse_row(data, key) for key, data in zip(markers, readers.map(storage.read, markers), strict=True)]
    present = set(keys)
    found = {}
    for row, marker in zip(rows, markers, strict=True):
        if layout.block_file(harvest_id, hook, row.file) in present:
            found[row.index] = row
        elif take_back:
            storage.delete(marker)
        else:
            raise CorruptError(
                f"{marker} in {storage.uri} names {row.file}, which is gone; remove it to redo the block."
            )
    return found


def is_harvested(storage: Storage, harvest_id: str, hook: str) -> bool:
    """Whether a hook (or `layout.TOKENS`) has its manifest and every block that this names.

    The manifest of blocks that are gone, as a removal leaves it that overlapped with a harvest, is taken back, so that
    they are made again.
    """
    of_tokens = hook == layout.TOKENS
    found = read_tokens_manifest(storage, harvest_id) if of_tokens else read_manifest(storage, harvest_id, hook)
    if found is None:
        return False
    present = set(storage.list(layout.hook_folder(harvest_id, hook)))
    if all(layout.block_file(harvest_id, hook, row.file) in present for row in found.blocks):
        return True
    storage.delete(layout.hook_manifest(harvest_id, hook))
    return False


def write_manifest(
    storage: Storage,
    harvest_id: str,
    hook: str,
    plan: Sequence[BlockSpan],
    rows: Mapping[int, BlockRow],
    *,
    lineage: Mapping[str, object],
) -> HookManifest:
    """Declare a hook harvested. `rows` holds every block of `plan`; their sums become the mean and the variance.

    StageError where no training row is usable; ConflictError where a manifest of other blocks already stands.
    """
    blocks = _complete(plan, rows)
    train = [row for row in blocks if row.split == "train"]
    usable = {split: sum(row.usable for row in blocks if row.split == split) for split in SPLITS}
    masked: dict[str, int] = {}
    for row in blocks:
        for name, count in row.masked.items():
            masked[name] = masked.get(name, 0) + count
    if not usable["train"]:
        raise StageError(f"No training row of {hook} is usable; masked: {masked}.")
    moments = [(_from_base64(row.sum), row.sum_sq or 0.0) for row in train]
    mean, variance = mean_and_variance(moments, usable["train"])
    manifest = HookManifest(
        harvest_id=harvest_id,
        hook=hook,
        d_in=len(mean),
        rows=sum(row.rows for row in blocks),
        usable=usable,
        masked=masked,
        mean=tuple(mean.tolist()),
        variance=variance,
        blocks=tuple(row.without_sums() for row in blocks),
        lineage=dict(lineage),
    )
    return commit_manifest(storage, manifest, layout.hook_manifest(harvest_id, hook))


def write_tokens_manifest(
    storage: Storage,
    harvest_id: str,
    plan: Sequence[BlockSpan],
    rows: Mapping[int, BlockRow],
    *,
    lineage: Mapping[str, object],
) -> TokensManifest:
    """Declare the tokens of a harvest complete; errors as in `write_manifest`."""
    blocks = _complete(plan, rows)
    manifest = TokensManifest(
        harvest_id=harvest_id, rows=sum(row.rows for row in blocks), blocks=blocks, lineage=dict(lineage)
    )
    return commit_manifest(storage, manifest, layout.hook_manifest(harvest_id, layout.TOKENS))


def read_block(storage: Storage, harvest_id: str, hook: str, row: BlockRow, *, verify: bool = True) -> Block:
    """One block in memory of its own. CorruptError where its bytes are not those that were written.

    verify: compare the sha256, at the first read of this block in this process.
    """
    return Block(**_read_whole(storage, harvest_id, hook, row, verify))


def read_tokens(storage: Storage, harvest_id: str, row: BlockRow, *, verify: bool = True) -> TokenBlock:
    """The token block of a row of the tokens manifest; otherwise as `read_block`."""
    return TokenBlock(**_read_whole(storage, harvest_id, layout.TOKENS, row, verify))


def read_block_into(
    storage: Storage, harvest_id: str, hook: str, row: BlockRow, acts: Tensor, *, verify: bool = True
) -> Tensor:
    """Read a block's activations straight into `acts` [rows, d_in] bfloat16; returns its mask [rows] uint8."""
    norm, mask = torch.empty(row.rows), torch.empty(row.rows, dtype=torch.uint8)
    tensors = {"norm": norm, "acts": acts, "mask": mask}  # in the order of the file
    head = header({name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})
    found = bytearray(len(head))
    key = layout.block_file(harvest_id, hook, row.file)
    _fill(storage, key, row, [memoryview(found), *map(byte_view, tensors.values())], verify)
    if found != head:
        raise CorruptError(f"{key} in {storage.uri} does not hold {row.rows} rows of {acts.shape[1]} activations.")
    return mask


def read_masks(storage: Storage, manifest: HookManifest, split: Split) -> dict[int, Tensor]:
    """Block index -> its mask [rows] uint8, of all blocks of a split.

    Reads a byte per row and nothing else, so the blocks are not verified; whoever reads them whole can compare.
    """

    def read(row: BlockRow) -> Tensor:
        key = layout.block_file(manifest.harvest_id, manifest.hook, row.file)
        try:
            data = storage.read(key, row.bytes - row.rows)  # masks are the narrowest tensor, so the last of the file
        except FileNotFoundError as error:
            raise _gone(storage, key, row) from error
        if len(data) != row.rows:
            raise CorruptError(f"{key} in {storage.uri} does not hold {row.rows} rows.")
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)

    rows = manifest.split(split)
    with ThreadPoolExecutor(1 if storage.is_local else _MARKER_READERS) as readers:
        return dict(zip((row.index for row in rows), readers.map(read, rows), strict=True))


def _read_whole(storage: Storage, harvest_id: str, hook: str, row: BlockRow, verify: bool) -> dict[str, Tensor]:
    key, data = layout.block_file(harvest_id, hook, row.file), bytearray(row.bytes)
    _fill(storage, key, row, [memoryview(data)], verify)
    try:
        return decode(data)
    except (ValueError, KeyError) as error:
        raise CorruptError(f"{key} in {storage.uri} is no block file: {error}.") from error


def _fill(storage: Storage, key: str, row: BlockRow, targets: list[memoryview], verify: bool) -> None:
    try:
        storage.read_into(key, targets)
    except FileNotFoundError as error:
        raise _gone(storage, key, row) from error
    if not verify or (storage.uri, key) in _verified:
        return
    digest = hashlib.sha256()
    for target in targets:
        digest.update(target)
    if digest.hexdigest() != row.sha256:
        raise CorruptError(
            f"Block {row.index} ({key} in {storage.uri}) is damaged: its sha256 is not that of its manifest. "
            "Remove the folder of this hook and harvest it again."
        )
    _verified.add((storage.uri, key))


def _gone(storage: Storage, key: str, row: BlockRow) -> CorruptError:
    return CorruptError(
        f"Block {row.index} is gone: there is no {key} in {storage.uri}. The next sweep, harvest or features job that "
        "reads this hook makes it again."
    )


def _commit(storage: Storage, harvest_id: str, hook: str, data: Bytes, row: BlockRow) -> BlockRow:
    key, marker = layout.block_file(harvest_id, hook, row.file), layout.block_marker(harvest_id, hook, row.index)
    storage.write(key, data)
    if storage.create(marker, dump(row)):
        return row
    standing = parse_row(storage.read(marker), marker)
    if standing.file != row.file:
        storage.delete(key)
    return standing


def _row(
    span: BlockSpan,
    rows: int,
    data: Bytes,
    masked: dict[str, int],
    moments: tuple[Tensor, float] | None = None,
) -> BlockRow:
    digest = hashlib.sha256(data).hexdigest()
    return BlockRow(
        index=span.index,
        split=span.split,
        start_window=span.start_window,
        stop_window=span.stop_window,
        rows=rows,
        usable=rows - sum(masked.values()),
        masked=masked,
        file=layout.block_name(span.index, digest),
        sha256=digest,
        bytes=len(data),
        sum=_to_base64(moments[0]) if moments else None,
        sum_sq=moments[1] if moments else None,
    )


def _complete(plan: Sequence[BlockSpan], rows: Mapping[int, BlockRow]) -> tuple[BlockRow, ...]:
    missing = [span.index for span in plan if span.index not in rows]
    assert not missing, f"blocks {missing[:5]} are not committed"
    blocks = tuple(rows[span.index] for span in plan)
    for span, row in zip(plan, blocks, strict=True):
        assert row.span == span, f"block {span.index} was cut otherwise: {row.span}, planned {span}"
    return blocks


def mean_and_variance(moments: Sequence[tuple[Tensor, float]], rows: int) -> tuple[Tensor, float]:
    """The mean [d_in] float64 of so many rows, and their variance summed over d_in; moments: of blocks."""
    mean = torch.stack([total for total, _ in moments]).sum(0) / rows
    second = math.fsum(squares for _, squares in moments) / rows
    return mean, max(0.0, second - float(mean @ mean))


def row_moments(acts: Tensor, usable: Tensor) -> tuple[Tensor, float]:
    """Sum [d_in] and sum of squares of the usable rows in float64, which holds both to 1e-15 of the largest term."""
    total = torch.zeros(acts.shape[1], dtype=torch.float64, device=acts.device)
    squares = torch.zeros((), dtype=torch.float64, device=acts.device)
    usable = usable.to(acts.device)
    rows = _STATISTICS_ROWS_ON_GPU if acts.is_cuda else _STATISTICS_ROWS
    for chunk, keep in zip(acts.split(rows), usable.split(rows), strict=True):
        values = chunk[keep].double()
        total += values.sum(0)
        squares += torch.dot(values.flatten(), values.flatten())
    return total.cpu(), float(squares)


def _to_base64(values: Tensor) -> str:
    return base64.b64encode(values.numpy().astype("<f8").tobytes()).decode()


def _from_base64(text: str | None) -> Tensor:
    assert text is not None, "rows of a marker carry their sums"
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float64)
