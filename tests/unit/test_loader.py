"""The stream against a naive version in memory: which rows, in which order, from where on, with how much memory."""

from __future__ import annotations

import gc
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from midiscover.errors import ConfigError, CorruptError, StageError
from midiscover.store import layout, loader
from midiscover.store.blocks import BlockRow, HookManifest
from midiscover.store.loader import ActivationStream, iterate_rows, normalisation
from midiscover.store.local import LocalStorage
from midiscover.store.order import ideal_mates, pools, row_order, same_window_mates, shuffle_quality
from tests.harvests import row_numbers, write_harvest

Harvest = tuple[LocalStorage, HookManifest, Tensor, Tensor]


@pytest.fixture(scope="module")
def harvest(tmp_path_factory: pytest.TempPathFactory) -> Harvest:
    storage = LocalStorage(tmp_path_factory.mktemp("store"))
    return (storage, *write_harvest(storage))


def naive_stream(harvest: Harvest, *, batch_size: int, epochs: int, seed: int, shuffle_tokens: int) -> Tensor:
    """[batches, batch_size, d_in], everything in memory: only the permutations are shared with the loader."""
    _, manifest, acts, mask = harvest
    rows = []
    for epoch in range(epochs):
        plan = pools(manifest.split("train"), shuffle_tokens=shuffle_tokens, seed=seed, epoch=epoch)
        for number, pool in enumerate(plan):
            kept = [i for row in pool for i in range(row.start_window * 8, row.stop_window * 8) if mask[i] == 0]
            rows += [acts[kept[i]] for i in row_order(len(kept), seed=seed, epoch=epoch, pool=number).tolist()]
    full = len(rows) // batch_size * batch_size
    return torch.stack(rows[:full]).view(-1, batch_size, acts.shape[1])


@pytest.mark.parametrize("shuffle_tokens", [1, 24, 60, 160, 10_000])
@pytest.mark.parametrize("batch_size", [1, 7, 50, 130])
def test_stream_is_the_naive_one(harvest: Harvest, batch_size: int, shuffle_tokens: int) -> None:
    settings: Any = {"batch_size": batch_size, "epochs": 3, "seed": 5, "shuffle_tokens": shuffle_tokens}
    stream = ActivationStream(harvest[0], harvest[1], **settings)
    batches = list(stream)
    assert len(batches) == len(stream)
    assert torch.equal(torch.stack(batches), naive_stream(harvest, **settings))


@pytest.mark.parametrize("shuffle_tokens", [60, 10_000])
def test_each_usable_row_appears_once_per_epoch(harvest: Harvest, shuffle_tokens: int) -> None:
    storage, manifest, _, mask = harvest
    usable = (mask[: 20 * 8] == 0).nonzero().flatten()
    stream = ActivationStream(storage, manifest, batch_size=1, epochs=2, shuffle_tokens=shuffle_tokens)
    seen = row_numbers(torch.cat(list(stream))).view(2, -1)
    for epoch in seen:
        assert torch.equal(epoch.sort().values, usable)
    assert not torch.equal(seen[0], seen[1]), "epochs differ in their order"
    assert stream.rows_per_epoch == len(usable) == manifest.usable["train"]


@pytest.mark.parametrize("shuffle_tokens", [24, 60, 10_000])
def test_resumed_at_any_batch_equals_uninterrupted(harvest: Harvest, shuffle_tokens: int) -> None:
    storage, manifest, _, _ = harvest
    settings: Any = {"batch_size": 11, "epochs": 2, "seed": 3, "shuffle_tokens": shuffle_tokens}
    whole = list(ActivationStream(storage, manifest, **settings))
    for start in range(len(whole) + 1):
        rest = list(ActivationStream(storage, manifest, **settings, start=start))
        assert len(rest) == len(whole) - start
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[start:], strict=True))


def test_order_depends_on_the_seed_alone(harvest: Harvest, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, manifest, _, _ = harvest
    settings: Any = {"batch_size": 10, "epochs": 2, "shuffle_tokens": 60}
    expected = torch.stack(list(ActivationStream(storage, manifest, **settings, seed=1)))
    assert not torch.equal(expected, torch.stack(list(ActivationStream(storage, manifest, **settings, seed=2))))
    real = loader.read_block_into

    def slow(*arguments: object) -> Tensor:
        row = next(argument for argument in arguments if isinstance(argument, BlockRow))
        time.sleep(0.001 * (row.index * 7 % 5))  # blocks arrive in another order than they were asked for
        return real(*arguments)  # type: ignore[arg-type]  # passed on as they came

    monkeypatch.setattr(loader, "read_block_into", slow)
    monkeypatch.setattr(loader, "_LOCAL_READERS", 5)
    torch.manual_seed(99)
    assert torch.equal(expected, torch.stack(list(ActivationStream(storage, manifest, **settings, seed=1))))


def test_batches_may_be_kept_and_changed(harvest: Harvest) -> None:
    storage, manifest, _, _ = harvest
    stream = ActivationStream(storage, manifest, batch_size=10, epochs=2)
    kept = [batch.clone() for batch in stream]
    for batch, expected in zip(list(stream), kept, strict=True):
        assert torch.equal(batch, expected)
        batch.zero_()
    assert all(torch.equal(a, b) for a, b in zip(stream, kept, strict=True))


@pytest.mark.parametrize(("shuffle_tokens", "buffers"), [(24, 2), (48, 2), (10_000, 1)])
def test_memory_is_bounded_by_two_pools(
    harvest: Harvest, monkeypatch: pytest.MonkeyPatch, shuffle_tokens: int, buffers: int
) -> None:
    storage, manifest, _, _ = harvest
    live: dict[int, int] = {}
    reads = 0
    real = loader.read_block_into

    def counted(*arguments: object) -> Tensor:
        nonlocal reads
        reads += 1
        target = arguments[4]
        assert isinstance(target, Tensor)
        memory = target.untyped_storage()
        live[memory.data_ptr()] = memory.nbytes()
        return real(*arguments)  # type: ignore[arg-type]  # passed on as they came

    monkeypatch.setattr(loader, "read_block_into", counted)
    stream = ActivationStream(storage, manifest, batch_size=10, epochs=3, shuffle_tokens=shuffle_tokens)
    list(stream)
    assert len(live) == buffers
    assert sum(live.values()) == stream.buffer_bytes
    assert stream.buffer_bytes <= buffers * shuffle_tokens * manifest.d_in * 2
    if buffers == 1:
        assert reads == len(manifest.split("train")), "read once for all epochs"


def test_readers_go_on_while_the_first_pool_is_awaited(harvest: Harvest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool of three blocks leaves one of two readers free; the next pool's memory is free by then, too."""
    storage, manifest, _, _ = harvest
    real, begun = loader.read_block_into, threading.Semaphore(0)
    pool = pools(manifest.split("train"), shuffle_tokens=24, seed=0, epoch=0)[0]

    def waiting(*arguments: object) -> Tensor:
        if arguments[3] == pool[0]:
            assert begun.acquire(timeout=10), "the second pool was not begun"
        else:
            begun.release()
        return real(*arguments)  # type: ignore[arg-type]  # passed on as they came

    monkeypatch.setattr(loader, "read_block_into", waiting)
    monkeypatch.setattr(loader, "_LOCAL_READERS", 2)
    assert len(pool) == 1
    assert list(ActivationStream(storage, manifest, batch_size=10, shuffle_tokens=24))


def test_closing_early_leaves_no_threads(harvest: Harvest) -> None:
    storage, manifest, _, _ = harvest
    before = threading.active_count()
    batches = iter(ActivationStream(storage, manifest, batch_size=4, shuffle_tokens=24))
    next(batches)
    assert threading.active_count() > before
    del batches
    gc.collect()
    assert threading.active_count() == before


def test_an_error_while_reading_reaches_the_consumer(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    manifest, _, _ = write_harvest(storage)
    victim = manifest.split("train")[4]
    path = storage.local_path(layout.block_file(manifest.harvest_id, manifest.hook, victim.file))
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    before = threading.active_count()
    for shuffle_tokens in (24, 10_000):
        with pytest.raises(CorruptError, match=r"Block 4 .* is damaged"):
            list(ActivationStream(storage, manifest, batch_size=4, shuffle_tokens=shuffle_tokens))
    assert threading.active_count() == before


def test_too_few_rows_for_a_batch(harvest: Harvest) -> None:
    with pytest.raises(ConfigError, match=r"train.batch_size 500 is more than the \d+ usable train rows"):
        ActivationStream(harvest[0], harvest[1], batch_size=500)


@pytest.mark.parametrize("batch_size", [1, 5, 1000])
@pytest.mark.parametrize("max_rows", [None, 0, 1, 17, 10_000])
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_iterate_rows_gives_the_usable_rows_in_order(
    harvest: Harvest, split: str, batch_size: int, max_rows: int | None
) -> None:
    storage, manifest, acts, mask = harvest
    at = slice(0, 160) if split == "train" else slice(160, None)
    expected = acts[at][mask[at] == 0][:max_rows]
    batches = list(iterate_rows(storage, manifest, split, batch_size, max_rows))  # type: ignore[arg-type]  # parameter
    assert torch.equal(torch.cat([acts[:0], *batches]), expected)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert all(0 < len(batch) <= batch_size for batch in batches)


def test_normalisation_gives_mean_norm_sqrt_d_in(harvest: Harvest) -> None:
    storage, manifest, acts, mask = harvest
    usable = acts[:160][mask[:160] == 0].double()
    mean, scale = normalisation(storage, manifest)
    torch.testing.assert_close(mean, usable.mean(0).float())
    scaled = (usable - usable.mean(0)) * scale
    assert float(scaled.norm(dim=1).mean()) == pytest.approx(6**0.5, rel=1e-6)
    assert normalisation(storage, manifest).mean_norm == pytest.approx(
        float((usable - usable.mean(0)).norm(dim=1).mean()), rel=1e-6
    )
    part = normalisation(storage, manifest, sample_rows=30)
    assert part.mean_norm == pytest.approx(float((usable[:30] - usable.mean(0)).norm(dim=1).mean()), rel=1e-6)


def test_normalisation_of_equal_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.harvests.numbered_rows", lambda count, d_in: torch.ones(count, d_in).bfloat16())
    storage = LocalStorage(tmp_path)
    manifest, _, _ = write_harvest(storage)
    with pytest.raises(StageError, match="are equal"):
        normalisation(storage, manifest)


def test_pools_hold_each_block_once_and_keep_their_bound(harvest: Harvest) -> None:
    blocks = harvest[1].split("train")
    for shuffle_tokens in (1, 24, 50, 100, 159, 160):
        for epoch in range(3):
            plan = pools(blocks, shuffle_tokens=shuffle_tokens, seed=0, epoch=epoch)
            assert sorted(row.index for pool in plan for row in pool) == [row.index for row in blocks]
            assert all(sum(row.rows for row in pool) <= max(24, shuffle_tokens) for pool in plan)
            sizes = [len(pool) for pool in plan]
            assert max(sizes) - min(sizes) <= 1
    assert len(pools(blocks, shuffle_tokens=160, seed=0, epoch=1)) == 1


def test_same_window_mates_by_hand() -> None:
    assert same_window_mates(torch.tensor([[1, 1, 2, 3], [1, 4, 4, 4]])) == pytest.approx((2 * 1 + 3 * 2) / 8)
    assert same_window_mates(torch.tensor([[1, 2], [2, 1]])) == 0


def test_shuffle_quality_reaches_the_ideal_of_its_pool(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    manifest, _, _ = write_harvest(storage, train_windows=600, context_size=16, block_tokens=240, d_in=4)
    settings: Any = {"batch_size": 128, "shuffle_tokens": 2400, "seed": 1}
    quality = shuffle_quality(manifest, **settings)
    assert quality.mates == pytest.approx(quality.ideal_pool, rel=0.1)
    assert quality.ideal_all == pytest.approx(quality.ideal_pool / 4, rel=0.1)
    assert quality.ideal_pool == pytest.approx(127 * (16 * 0.89 - 1) / (2400 * 0.89), rel=0.05)
    stream = ActivationStream(storage, manifest, **settings)
    windows = torch.stack([row_numbers(batch) // 16 for batch in stream])
    assert quality.mates == pytest.approx(same_window_mates(windows), rel=0.05), "as the stream really is"


def test_ideal_mates_of_a_full_window() -> None:
    assert ideal_mates(8, 8, 8) == 7, "a pool that is one window: all others are mates"
    assert ideal_mates(4096, 512, 1_000_000) == pytest.approx(2.09, abs=0.01)
