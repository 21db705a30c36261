"""Pairs of two hooks against a naive version in memory: the rows that both may use, in one order, from any batch on.

How rows get to the device."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from midiscover.config import TrainConfig
from midiscover.errors import ConfigError, CorruptError, NotFoundError
from midiscover.source import PairSource, StoreSource, iterate_pairs, joint_masks, open_source
from midiscover.store import layout, loader
from midiscover.store.blocks import HookManifest
from midiscover.store.loader import normalisation
from midiscover.store.local import LocalStorage
from midiscover.store.order import pools, row_order
from midiscover.train import Pair, _sent
from tests.harvests import HARVEST, HOOK, row_numbers, write_harvest

OUTPUT, D_IN, D_OUT = "model.layers.1.mlp", 6, 10
TRAIN_ROWS = 20 * 8


class Hooks(NamedTuple):
    storage: LocalStorage
    inputs: HookManifest
    outputs: HookManifest
    x: Tensor
    y: Tensor
    usable: Tensor
    """[rows] bool: at both hooks."""


def write_hooks(folder: Path) -> Hooks:
    storage = LocalStorage(folder)
    inputs, x, mask_x = write_harvest(storage, d_in=D_IN)
    outputs, y, mask_y = write_harvest(storage, hook=OUTPUT, d_in=D_OUT, outlier=11)
    usable = (mask_x == 0) & (mask_y == 0)
    assert usable.sum() < min((mask_x == 0).sum(), (mask_y == 0).sum()), "each hook leaves out rows that the other uses"
    return Hooks(storage, inputs, outputs, x, y, usable)


@pytest.fixture(scope="module")
def hooks(tmp_path_factory: pytest.TempPathFactory) -> Hooks:
    return write_hooks(tmp_path_factory.mktemp("store"))


def settings(batch_size: int = 11, epochs: int = 2, shuffle_tokens: int = 120, seed: int = 3) -> TrainConfig:
    return TrainConfig(batch_size=batch_size, epochs=epochs, shuffle_tokens=shuffle_tokens, seed=seed)


def source(hooks: Hooks, train: TrainConfig) -> PairSource:
    found = open_source(hooks.storage, HARVEST, HOOK, OUTPUT, train)
    assert isinstance(found, PairSource)
    return found


@pytest.mark.parametrize("shuffle_tokens", [1, 48, 120, 320, 10_000])
@pytest.mark.parametrize("batch_size", [1, 7, 130])
def test_pairs_are_the_naive_ones(hooks: Hooks, batch_size: int, shuffle_tokens: int) -> None:
    train = settings(batch_size, 3, shuffle_tokens, seed=5)
    rows: list[int] = []
    for epoch in range(3):
        plan = pools(hooks.inputs.split("train"), shuffle_tokens=max(1, shuffle_tokens // 2), seed=5, epoch=epoch)
        for number, pool in enumerate(plan):
            kept = [i for row in pool for i in range(row.start_window * 8, row.stop_window * 8) if hooks.usable[i]]
            rows += [kept[i] for i in row_order(len(kept), seed=5, epoch=epoch, pool=number).tolist()]
    found = source(hooks, train)
    assert found.rows_per_epoch == int(hooks.usable[:TRAIN_ROWS].sum()) == len(rows) // 3
    assert len(found) == len(rows) // batch_size
    chosen = torch.tensor(rows[: len(found) * batch_size]).view(-1, batch_size)
    batches = list(found.batches(0))
    assert torch.equal(torch.stack([pair.x for pair in batches]), hooks.x[chosen])
    assert torch.equal(torch.stack([pair.y for pair in batches]), hooks.y[chosen])


def test_each_row_that_both_use_comes_once_per_epoch_with_its_partner(hooks: Hooks) -> None:
    pairs = list(source(hooks, settings(batch_size=1)).batches(0))
    x, y = (row_numbers(torch.cat(part)) for part in zip(*pairs, strict=True))
    assert torch.equal(x, y)
    for epoch in x.view(2, -1):
        assert torch.equal(epoch.sort().values, hooks.usable[:TRAIN_ROWS].nonzero().flatten())


@pytest.mark.parametrize("shuffle_tokens", [48, 120, 10_000])
def test_resumed_at_any_batch_equals_uninterrupted(hooks: Hooks, shuffle_tokens: int) -> None:
    train = settings(shuffle_tokens=shuffle_tokens)
    whole = list(source(hooks, train).batches(0))
    for start in range(len(whole) + 1):
        rest = list(source(hooks, train).batches(start))
        assert len(rest) == len(whole) - start
        for found, expected in zip(rest, whole[start:], strict=True):
            assert torch.equal(found.x, expected.x)
            assert torch.equal(found.y, expected.y)


def test_each_hook_is_normalised_as_by_itself(hooks: Hooks) -> None:
    found = source(hooks, settings())
    for own, manifest in ((found.inputs, hooks.inputs), (found.outputs, hooks.outputs)):
        mean, scale = normalisation(hooks.storage, manifest)
        assert torch.equal(own.mean, mean)
        assert (own.scale, own.variance) == (scale, manifest.variance)
    assert found.inputs.mean.shape != found.outputs.mean.shape


def test_one_hook_is_the_plain_stream(hooks: Hooks) -> None:
    train = settings()
    found, plain = open_source(hooks.storage, HARVEST, HOOK, HOOK, train), StoreSource(*hooks[:2], train)
    assert isinstance(found, StoreSource)
    for batch, expected in zip(found.batches(1), plain.batches(1), strict=True):
        assert torch.equal(batch, expected)
    assert found.inputs is found.outputs


def test_a_hook_that_is_not_harvested(hooks: Hooks) -> None:
    for names in ((HOOK, "model.layers.2.mlp"), ("model.layers.2.mlp", HOOK), ("model.layers.2.mlp",) * 2):
        with pytest.raises(NotFoundError, match=r"'model.layers.2.mlp' is not harvested"):
            open_source(hooks.storage, HARVEST, *names, settings())


def test_too_few_pairs_for_a_batch(hooks: Hooks) -> None:
    rows = int(hooks.usable[:TRAIN_ROWS].sum())
    assert hooks.inputs.usable["train"] > rows
    with pytest.raises(ConfigError, match=rf"more than the {rows} usable train rows"):
        source(hooks, settings(batch_size=rows + 1, epochs=1))


def test_masks_are_read_without_the_activations(hooks: Hooks, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = 0
    read = LocalStorage.read

    def counted(self: LocalStorage, key: str, start: int = 0, length: int | None = None) -> bytes:
        nonlocal taken
        data = read(self, key, start, length)
        taken += len(data)
        return data

    monkeypatch.setattr(LocalStorage, "read", counted)
    masks = joint_masks(hooks.storage, hooks.inputs, hooks.outputs, "train")
    assert taken == 2 * TRAIN_ROWS
    assert torch.equal(torch.cat([masks[i] for i in sorted(masks)]) == 0, hooks.usable[:TRAIN_ROWS])


@pytest.mark.parametrize("shuffle_tokens", [48, 120, 10_000])
def test_both_streams_share_the_memory_of_one(
    hooks: Hooks, monkeypatch: pytest.MonkeyPatch, shuffle_tokens: int
) -> None:
    live: dict[int, int] = {}
    real = loader.read_block_into

    def counted(*arguments: object) -> Tensor:
        target = arguments[4]
        assert isinstance(target, Tensor)
        memory = target.untyped_storage()
        live[memory.data_ptr()] = memory.nbytes()
        return real(*arguments)  # type: ignore[arg-type]  # passed on as they came

    monkeypatch.setattr(loader, "read_block_into", counted)
    found = source(hooks, settings(shuffle_tokens=shuffle_tokens, epochs=3))
    list(found.batches(0))
    assert sum(live.values()) == found.x.buffer_bytes + found.y.buffer_bytes
    assert sum(live.values()) <= shuffle_tokens * (D_IN + D_OUT) * 2


def test_closing_early_leaves_no_threads(hooks: Hooks) -> None:
    before = threading.active_count()
    batches = source(hooks, settings(batch_size=4, shuffle_tokens=48)).batches(0)
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("place", ["activation", "mask"])
def test_a_damaged_block_reaches_the_consumer(tmp_path: Path, place: str) -> None:
    """Its mask was used before the block was verified, so a mask that changes is damage too."""
    hooks = write_hooks(tmp_path)
    victim = hooks.outputs.split("train")[4]
    path = hooks.storage.local_path(layout.block_file(HARVEST, OUTPUT, victim.file))
    data = bytearray(path.read_bytes())
    data[-1 if place == "mask" else -victim.rows - 3] ^= 1
    path.write_bytes(data)
    before = threading.active_count()
    with pytest.raises(CorruptError, match=r"Block 4 .* is damaged"):
        list(source(hooks, settings()).batches(0))
    with pytest.raises(CorruptError, match=r"Block 4 .* is damaged"):
        list(iterate_pairs(hooks.storage, hooks.inputs, hooks.outputs, "train", 50))
    assert threading.active_count() == before


def test_a_shortened_block_is_named(tmp_path: Path) -> None:
    hooks = write_hooks(tmp_path)
    path = hooks.storage.local_path(layout.block_file(HARVEST, HOOK, hooks.inputs.split("train")[2].file))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptError, match="does not hold 24 rows"):
        source(hooks, settings())
    path.unlink()
    with pytest.raises(CorruptError, match="Block 2 is gone"):
        source(hooks, settings())


@pytest.mark.parametrize("batch_size", [1, 5, 1000])
@pytest.mark.parametrize("max_rows", [None, 0, 1, 17, 10_000])
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_iterate_pairs_gives_the_common_rows_in_order(
    hooks: Hooks, split: str, batch_size: int, max_rows: int | None
) -> None:
    at = slice(0, TRAIN_ROWS) if split == "train" else slice(TRAIN_ROWS, None)
    keep = hooks.usable[at]
    pairs = list(iterate_pairs(*hooks[:3], split, batch_size, max_rows))  # type: ignore[arg-type]  # parameter
    assert all(isinstance(pair, Pair) and 0 < len(pair.x) == len(pair.y) <= batch_size for pair in pairs)
    for found, acts in ((0, hooks.x), (1, hooks.y)):
        expected = acts[at][keep][:max_rows]
        assert torch.equal(torch.cat([acts[:0], *(pair[found] for pair in pairs)]), expected)


class Rows:
    """A pretended tensor; says what was done to get it to a device."""

    def __init__(self, place: str, *done: object) -> None:
        self.device, self.done = torch.device(place), done

    def pin_memory(self) -> Rows:
        """PyTorch refuses what is no CPU's."""
        assert self.device.type == "cpu"
        return Rows("cpu", *self.done, "pinned")

    def to(self, device: torch.device, *, non_blocking: bool) -> Rows:
        """With the word that lets a copy go on by itself."""
        assert non_blocking
        return Rows(str(device), *self.done, "copied")


@pytest.mark.parametrize(
    ("place", "device", "done"),
    [("cpu", "cuda", ("pinned", "copied")), ("cuda", "cuda", ("copied",)), ("cpu", "cpu", ("copied",))],
)
def test_rows_go_to_a_gpu_from_memory_that_nobody_waits_for(place: str, device: str, done: tuple[str, ...]) -> None:
    sent: Any = _sent(Rows(place), torch.device(device))  # type: ignore[arg-type]  # pretended: there may be no GPU
    assert (sent.device, sent.done) == (torch.device(device), done)
