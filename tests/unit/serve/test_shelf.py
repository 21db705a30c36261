"""What a replica keeps in memory, and what it does with folders that can't be loaded."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import psutil
import pytest
import torch

from midiscover.store.local import LocalStorage
from serve import shelf as shelf_module
from serve.shelf import AGAIN_SECONDS, ActivationCache, SaeShelf, SaeUnavailableError
from tests.unit.publish.folders import SAE, write_sae


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shelf")
    write_sae(root)
    for name in ("second", "third"):
        folder = root / "saes" / name
        folder.mkdir()
        for file in (root / "saes" / SAE).iterdir():
            if file.is_file():
                (folder / file.name).write_bytes(file.read_bytes())
    return root


def size_of(store: Path) -> int:
    shelf = SaeShelf(LocalStorage(store), "cpu", 10**9)
    shelf.get(SAE)
    return shelf.bytes


def test_the_one_asked_longest_ago_makes_room(store: Path) -> None:
    shelf = SaeShelf(LocalStorage(store), "cpu", 2 * size_of(store))
    first = shelf.get(SAE)
    shelf.get("second")
    assert shelf.get(SAE) is first, "loaded once"
    shelf.get("third")
    assert shelf.ids == [SAE, "third"]
    assert shelf.held("second") is None
    assert shelf.loads == 3
    shelf.get("second")
    assert shelf.ids == ["third", "second"]
    assert shelf.bytes <= 2 * size_of(store)


def test_many_who_ask_for_one_load_it_once(store: Path) -> None:
    shelf = SaeShelf(LocalStorage(store), "cpu", 10**9)
    found = []
    threads = [threading.Thread(target=lambda: found.append(shelf.get("second"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shelf.loads == 1
    assert len({id(one) for one in found}) == 1


def test_one_that_fails_is_left_alone_for_a_while_and_the_rest_go_on(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, calls = [0.0], []
    shelf = SaeShelf(LocalStorage(store), "cpu", 10**9, lambda: now[0])
    real = shelf_module.load_stored

    def load(storage: object, name: str, *, device: str) -> object:
        calls.append(name)
        if name == "second" and now[0] < AGAIN_SECONDS:
            raise OSError("the store is away")
        return real(storage, name, device=device)  # type: ignore[arg-type]

    monkeypatch.setattr(shelf_module, "load_stored", load)
    for _ in range(3):
        with pytest.raises(SaeUnavailableError, match="second can't be loaded: OSError"):
            shelf.get("second")
    assert calls == ["second"]
    shelf.get(SAE)
    now[0] = AGAIN_SECONDS
    assert shelf.get("second") is shelf.held("second")


def test_one_larger_than_all_that_may_be_kept_is_not_even_read(store: Path) -> None:
    shelf = SaeShelf(LocalStorage(store), "cpu", 100)
    with pytest.raises(SaeUnavailableError, match="more than sae_bytes allows"):
        shelf.get(SAE)


def test_a_thousand_damaged_folders_cost_an_answer_each_and_no_memory(store: Path, tmp_path: Path) -> None:
    """R20: truncated, with flipped bits, with absurd headers, or something else altogether."""
    chance = random.Random(20)
    source = store / "saes" / SAE
    good = {file.name: file.read_bytes() for file in source.iterdir() if file.is_file()}
    folder = tmp_path / "saes" / "bad"
    folder.mkdir(parents=True)
    before = psutil.Process().memory_info().rss
    refused = 0
    for _ in range(1000):
        data = dict(good)
        name = chance.choice(["sae_weights.safetensors", "cfg.json", "record.json"])
        damaged = bytearray(data[name])
        match chance.randrange(5):
            case 0:
                damaged = damaged[: chance.randrange(len(damaged))]
            case 1:
                for _ in range(chance.randrange(1, 20)):
                    damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
            case 2:
                damaged[:8] = chance.randrange(2**64).to_bytes(8, "little")
            case 3:
                damaged = bytearray(b"\x80\x04cos\nsystem\n(S'touch /tmp/pwned'\ntR.")
            case _:
                damaged += bytes(chance.randrange(1, 100))
        data[name] = bytes(damaged)
        for file, content in data.items():
            (folder / file).write_bytes(content)
        try:
            loaded = SaeShelf(LocalStorage(tmp_path), "cpu", 10**8).get("bad")
        except SaeUnavailableError:
            refused += 1
        else:  # what was changed said nothing about the weights
            assert name != "sae_weights.safetensors"
            assert loaded.module.d_sae > 0
    assert refused > 600
    assert psutil.Process().memory_info().rss - before < 200e6


def test_activations_are_kept_by_hook_and_ids_within_bounds() -> None:
    cache = ActivationCache(1000)
    batch = torch.arange(60, dtype=torch.float32).reshape(3, 5, 4)
    for row in range(3):
        cache.put("h", [row, 1], batch[row])
    assert torch.equal(cache.get("h", [1, 1]), batch[1])  # type: ignore[arg-type]
    assert cache.get("h", [1, 2]) is None
    assert cache.get("other", [1, 1]) is None
    assert cache.bytes == 3 * 80
    for row in range(20):
        cache.put("h", [row, 2], batch[0])
    assert cache.bytes <= 1000
    assert cache.get("h", [0, 1]) is None
    cache.put("h", [9], torch.zeros(100))
    assert cache.get("h", [9]) is None, "too large a part of all"
    assert (cache.hits, cache.misses) == (1, 4)
