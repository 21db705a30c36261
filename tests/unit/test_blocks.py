"""Block files against the safetensors library, the commit protocol, statistics against numpy, damage."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from midiscover.config import CorpusConfig
from midiscover.errors import ConflictError, CorruptError, StageError, StoreError
from midiscover.store import blocks, layout
from midiscover.store.blockfile import decode, encode
from midiscover.store.blocks import (
    BlockSpan,
    Mask,
    block_plan,
    commit_block,
    commit_tokens,
    committed,
    read_block,
    read_block_into,
    read_manifest,
    read_tokens,
    read_tokens_manifest,
    write_manifest,
    write_tokens_manifest,
)
from midiscover.store.local import LocalStorage
from tests.harvests import HARVEST, HOOK, numbered_rows, usual_mask, write_harvest

SPAN = BlockSpan(0, "train", 0, 4)


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path)


def commit(storage: LocalStorage, acts: torch.Tensor, span: BlockSpan = SPAN) -> blocks.BlockRow:
    return commit_block(storage, HARVEST, HOOK, span, acts, acts.float().norm(dim=1), usual_mask(len(acts), 8))


@pytest.mark.parametrize("shape", [(3, 5), (12, 64), (1, 1), (1000, 3)])
def test_block_files_are_those_of_the_library(shape: tuple[int, int]) -> None:
    tensors = {
        "acts": torch.randn(shape).bfloat16(),
        "norm": torch.rand(shape[0]),
        "mask": torch.randint(0, 5, (shape[0],), dtype=torch.uint8),
        "token_id": torch.randint(0, 99, (shape[0],), dtype=torch.int32),
        "position": torch.randint(0, 99, (shape[0],), dtype=torch.int16),
    }
    data = encode(tensors)
    assert data == safetensors.torch.save(tensors)
    for name, tensor in decode(data).items():
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor, tensors[name])


def test_decode_takes_any_layout_and_refuses_what_is_cut(storage: LocalStorage) -> None:
    data = bytearray(safetensors.torch.save({"b": torch.zeros(2, 0), "a": torch.arange(3.0)}, {"meta": "data"}))
    assert decode(data)["a"].tolist() == [0, 1, 2]
    assert decode(data)["b"].shape == (2, 0)
    for length in (0, 5, 20, len(data) - 1):
        with pytest.raises(ValueError, match=r"shorter|within"):
            decode(data[:length])


def test_plan_covers_each_window_once_and_no_block_crosses_the_split() -> None:
    plan = block_plan(10, 3, context_size=8, block_tokens=30)
    assert [(span.split, span.start_window, span.stop_window) for span in plan] == [
        ("train", 0, 3),
        ("train", 3, 6),
        ("train", 6, 9),
        ("train", 9, 10),
        ("held_out", 10, 13),
    ]
    assert [span.index for span in plan] == list(range(5))
    assert block_plan(2, 0, context_size=128, block_tokens=100) == (
        BlockSpan(0, "train", 0, 1),
        BlockSpan(1, "train", 1, 2),
    )


def test_commit_and_read_back(storage: LocalStorage) -> None:
    acts = numbered_rows(32, 6)
    row = commit(storage, acts)
    block = read_block(storage, HARVEST, HOOK, row)
    assert torch.equal(block.acts, acts)
    assert torch.equal(block.norm, acts.float().norm(dim=1))
    assert torch.equal(block.mask, usual_mask(32, 8))
    into = torch.empty_like(acts)
    assert torch.equal(read_block_into(storage, HARVEST, HOOK, row, into), block.mask)
    assert torch.equal(into, acts)
    assert row.masked == {"special": 4, "outlier": 1, "nonfinite": 1}
    assert row.usable == 26 == int((block.mask == Mask.USABLE).sum())
    assert committed(storage, HARVEST, HOOK) == {0: row}
    assert committed(storage, HARVEST, "another") == {}


def test_the_first_marker_wins_and_the_loser_leaves_nothing(storage: LocalStorage) -> None:
    first, second = numbered_rows(32, 6), numbered_rows(32, 6) + 1
    row = commit(storage, first)
    assert commit(storage, first) == row, "the same block again is no conflict"
    files = storage.list("")
    assert commit(storage, second) == row
    assert storage.list("") == files
    assert torch.equal(read_block(storage, HARVEST, HOOK, row).acts, first)


def test_racing_writers_agree(storage: LocalStorage) -> None:
    rows, start = [], threading.Barrier(4)

    def write(number: int) -> None:
        start.wait()
        rows.append(commit(storage, numbered_rows(32, 6) + number))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(row == rows[0] for row in rows)
    assert len(storage.list("")) == 2, "one block and its marker"
    read_block(storage, HARVEST, HOOK, rows[0])


def test_mean_and_variance_are_those_of_the_naive_computation(storage: LocalStorage) -> None:
    manifest, acts, mask = write_harvest(storage, train_windows=40, d_in=9)
    usable = acts[: 40 * 8][mask[: 40 * 8] == 0].double().numpy()
    np.testing.assert_allclose(manifest.mean, usable.mean(0), rtol=1e-14, atol=1e-14)
    np.testing.assert_allclose(manifest.variance, ((usable - usable.mean(0)) ** 2).sum(1).mean(), rtol=1e-12)
    assert manifest.usable == {"train": len(usable), "held_out": int((mask[320:] == 0).sum())}
    assert manifest.rows == len(acts) == sum(manifest.usable.values()) + sum(manifest.masked.values())


def test_statistics_skip_rows_that_are_not_finite(storage: LocalStorage) -> None:
    acts = torch.ones(32, 4, dtype=torch.bfloat16)
    acts[3] = float("nan")
    mask = torch.zeros(32, dtype=torch.uint8)
    mask[3] = Mask.NONFINITE
    row = commit_block(storage, HARVEST, HOOK, SPAN, acts, acts.float().norm(dim=1), mask)
    manifest = write_manifest(storage, HARVEST, HOOK, [SPAN], {0: row}, lineage={})
    assert manifest.mean == (1.0,) * 4
    assert manifest.variance == 0


def test_manifest_reads_back_and_is_written_once(storage: LocalStorage) -> None:
    assert read_manifest(storage, HARVEST, HOOK) is None
    manifest, _, _ = write_harvest(storage)
    assert read_manifest(storage, HARVEST, HOOK) == manifest
    again, _, _ = write_harvest(storage)
    assert again == manifest
    plan = [row.span for row in manifest.blocks]
    rows = committed(storage, HARVEST, HOOK)
    assert write_manifest(storage, HARVEST, HOOK, plan, rows, lineage={"other": 1}) == manifest, "the first one stands"
    with pytest.raises(ConflictError, match="already names other blocks"):
        write_manifest(storage, HARVEST, HOOK, plan[:-1], rows, lineage={})


def test_manifest_without_usable_rows(storage: LocalStorage) -> None:
    acts = torch.zeros(32, 4, dtype=torch.bfloat16)
    mask = torch.full((32,), Mask.PADDING, dtype=torch.uint8)
    row = commit_block(storage, HARVEST, HOOK, SPAN, acts, torch.zeros(32), mask)
    with pytest.raises(StageError, match=r"No training row of .* is usable; masked: \{'padding': 32\}"):
        write_manifest(storage, HARVEST, HOOK, [SPAN], {0: row}, lineage={})


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (b"{", CorruptError, "is no JSON"),
        (b"[]", CorruptError, "holds no record"),
        (b"{}", CorruptError, "is not such a record"),
        (b'{"v":2}', StoreError, "format version 2"),
    ],
)
def test_manifest_that_is_none(storage: LocalStorage, data: bytes, error: type[Exception], words: str) -> None:
    storage.write(layout.hook_manifest(HARVEST, HOOK), data)
    with pytest.raises(error, match=words):
        read_manifest(storage, HARVEST, HOOK)


def test_tokens(storage: LocalStorage) -> None:
    ids = torch.arange(32, dtype=torch.int32).view(4, 8) + 100
    span = BlockSpan(0, "held_out", 6, 10)
    row = commit_tokens(storage, HARVEST, span, ids)
    tokens = read_tokens(storage, HARVEST, row)
    assert torch.equal(tokens.token_id.view(4, 8), ids)
    assert tokens.window.view(4, 8)[:, 3].tolist() == [6, 7, 8, 9]
    assert tokens.position.view(4, 8)[2].tolist() == list(range(8))
    assert committed(storage, HARVEST, layout.TOKENS) == {0: row}
    manifest = write_tokens_manifest(storage, HARVEST, [span], {0: row}, lineage={})
    assert read_tokens_manifest(storage, HARVEST) == manifest
    assert "sum" not in json.loads(storage.read(layout.block_marker(HARVEST, layout.TOKENS, 0)))


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_flipped_bit_is_found_on_the_first_read(storage: LocalStorage, place: str) -> None:
    row = commit(storage, numbered_rows(32, 6))
    path = storage.local_path(layout.block_file(HARVEST, HOOK, row.file))
    data = bytearray(path.read_bytes())
    data[{"first": 9, "middle": len(data) // 2, "last": -1}[place]] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptError, match=f"Block 0 .*{row.file}.* is damaged"):
        read_block(storage, HARVEST, HOOK, row)
    with pytest.raises(CorruptError, match="is damaged"):
        read_block_into(storage, HARVEST, HOOK, row, torch.empty(32, 6, dtype=torch.bfloat16))


def test_a_block_is_hashed_once_in_a_process(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    row = commit(storage, numbered_rows(32, 6))
    read_block(storage, HARVEST, HOOK, row)
    monkeypatch.setattr(blocks.hashlib, "sha256", None)
    read_block(storage, HARVEST, HOOK, row)


def test_truncated_and_absent_blocks_are_found_on_every_read(storage: LocalStorage) -> None:
    row = commit(storage, numbered_rows(32, 6))
    read_block(storage, HARVEST, HOOK, row)
    path = storage.local_path(layout.block_file(HARVEST, HOOK, row.file))
    path.write_bytes(path.read_bytes()[:-1])
    for read in (
        lambda: read_block(storage, HARVEST, HOOK, row),
        lambda: read_block_into(storage, HARVEST, HOOK, row, torch.empty(32, 6, dtype=torch.bfloat16)),
    ):
        with pytest.raises(CorruptError, match=f"{row.file}.* holds {row.bytes - 1} bytes where {row.bytes}"):
            read()
    path.unlink()
    with pytest.raises(CorruptError, match="Block 0 is gone"):
        read_block(storage, HARVEST, HOOK, row)
    with pytest.raises(CorruptError, match="which is gone; remove it to redo the block"):
        committed(storage, HARVEST, HOOK)


def test_reading_into_the_wrong_width_is_an_error(storage: LocalStorage) -> None:
    row = commit(storage, numbered_rows(32, 6))
    with pytest.raises(CorruptError):
        read_block_into(storage, HARVEST, HOOK, row, torch.empty(32, 5, dtype=torch.bfloat16))


def test_positions_of_the_longest_window_that_is_allowed_fit(tmp_path: Path) -> None:
    longest = CorpusConfig(context_size=32_768).context_size
    storage = LocalStorage(tmp_path)
    (span,) = block_plan(1, 0, context_size=longest, block_tokens=1)
    row = commit_tokens(storage, "h.1", span, torch.zeros(1, longest, dtype=torch.int64))
    position = read_tokens(storage, "h.1", row).position
    assert position.tolist() == list(range(longest))
    with pytest.raises(ValueError, match="context_size"):
        CorpusConfig(context_size=longest + 1)
