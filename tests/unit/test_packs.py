"""When a pack is not started again, in a trial and in a worker that Ray Train starts. No Ray."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jobs import crews, packs
from jobs.leases import hangs_key
from midiscover.resolve import Pack
from midiscover.store import layout
from midiscover.store.local import LocalStorage

PACK = Pack(id="p.0", hook="h", saes=(SimpleNamespace(id="sae"),))  # type: ignore[arg-type]
OTHER = Pack(id="p.1", hook="h", saes=(SimpleNamespace(id="other"),))  # type: ignore[arg-type]


class Board:
    """In this process."""

    def __init__(self) -> None:
        self.memory: dict[str, Any] = {}
        self.failed: dict[str, str] = {}

    def exchange(self, key: str, value: Any) -> Any:
        before = self.memory.get(key)
        self.memory[key] = value
        return before

    def recall(self, key: str) -> Any:
        return self.memory.get(key)

    def post(self, kind: str, key: str, data: Any = None) -> None:
        if kind == "failed":
            self.failed[key] = data


class Group:
    """Of this process alone."""

    rank = 0

    def from_first(self, value: Any) -> Any:
        return value


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Crews that were started, by the ids of their packs."""
    found: list[tuple[str, ...]] = []
    for name in ("run_crew", "run_crew_tries"):
        monkeypatch.setattr(packs, name, lambda _job, crew, _group=None: found.append(tuple(p.id for p in crew)))
    monkeypatch.setattr(packs, "TorchGroup", Group)
    monkeypatch.setattr(packs, "get_current_placement_group", lambda: None)
    monkeypatch.setattr(packs, "_in_torch_trainer", lambda job, crew: packs._train_worker({"job": job, "crew": crew}))
    monkeypatch.setattr(packs.tune, "report", lambda _: None)
    monkeypatch.setattr(crews, "has_ended", lambda *_: False)
    return found


def job(tmp_path: Path, trainer: str, workers: int) -> Any:
    config = SimpleNamespace(resources=SimpleNamespace(max_failures=3))
    return SimpleNamespace(
        board=Board(),
        trainer=trainer,
        crews=((PACK, OTHER),),
        slots=SimpleNamespace(workers=workers, gpus=0),
        storage=LocalStorage(tmp_path),
        resolved=SimpleNamespace(config=config, sweep_id="s.0"),
    )


WAYS = pytest.mark.parametrize(("trainer", "workers"), [("inline", 1), ("ray_train", 1), ("ray_train", 2)])


@WAYS
def test_a_pack_that_hung_too_often_is_given_up(
    tmp_path: Path, started: list[tuple[str, ...]], trainer: str, workers: int
) -> None:
    given = job(tmp_path, trainer, workers)
    for hangs in range(5):
        given.board.exchange(hangs_key(PACK.id), hangs)
        packs.pack_trial({"crew": 0}, given)
    assert started == [(PACK.id, OTHER.id)] * 4 + [(OTHER.id,)]
    assert given.board.failed == {
        "sae": "it hung 4 times; resources.stall_seconds sets how long a pack may stand still"
    }


@WAYS
def test_a_pack_that_dies_at_one_place_is_given_up(
    tmp_path: Path, started: list[tuple[str, ...]], trainer: str, workers: int
) -> None:
    """Ten starts without a newer checkpoint; one that makes them may die as often as it likes."""
    given = job(tmp_path, trainer, workers)
    for start in range(packs.MAX_DEATHS + 1):
        given.storage.write(layout.pack_checkpoint("s.0", OTHER.id, start), b"x")
        packs.pack_trial({"crew": 0}, given)
    assert started == [(PACK.id, OTHER.id)] * packs.MAX_DEATHS + [(OTHER.id,)]
    assert given.board.failed == {"sae": "its process died 10 times without a new checkpoint"}


def test_several_workers_do_not_try_for_ever_what_no_card_holds(
    tmp_path: Path, started: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = job(tmp_path, "ray_train", 2)

    def run(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(packs, "run_crew", run)
    with pytest.raises(torch.OutOfMemoryError):  # so that Train starts all workers again
        packs._train_worker({"job": given, "crew": (PACK,)})
    monkeypatch.setattr(packs, "run_crew", lambda _job, crew, _group: started.append(tuple(p.id for p in crew)))
    packs._train_worker({"job": given, "crew": (PACK,)})
    assert started == [()]
    assert "1 SAEs are too many for a card" in given.board.failed["sae"]
