"""When a pack is not started again, in a trial and in a worker that Ray Train starts. No Ray."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from jobs import crews, packs
from jobs.harvest import ensure_corpus
from jobs.leases import hangs_key
from jobs.packworker import PackJob, PackWorker
from jobs.runtime import Slots
from midiscover.errors import CorruptError
from midiscover.resolve import Pack, make_packs
from midiscover.store import layout
from midiscover.store.local import LocalStorage
from tests.boards import LocalBoard
from tests.runs import prepared_sweep, write_run

PACK = Pack(id="p.0", hook="h", saes=(SimpleNamespace(id="sae"),))  # type: ignore[arg-type]
OTHER = Pack(id="p.1", hook="h", saes=(SimpleNamespace(id="other"),))  # type: ignore[arg-type]


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
    monkeypatch.setattr(packs, "broadcast_from_rank_zero", lambda allowed: allowed)
    monkeypatch.setattr(packs, "get_current_placement_group", lambda: None)
    monkeypatch.setattr(packs, "_in_torch_trainer", lambda job, crew: packs._train_worker({"job": job, "crew": crew}))
    monkeypatch.setattr(packs.tune, "report", lambda _: None)
    monkeypatch.setattr(crews, "has_ended", lambda *_: False)
    return found


def job(tmp_path: Path, trainer: str, workers: int) -> Any:
    config = SimpleNamespace(resources=SimpleNamespace(max_failures=3))
    return SimpleNamespace(
        board=LocalBoard(),
        trainer=trainer,
        crews=((PACK, OTHER),),
        slots=SimpleNamespace(workers=workers, gpus=0),
        storage=LocalStorage(tmp_path),
        resolved=SimpleNamespace(config=config, sweep_id="s.0"),
    )


def write_checkpoint(job: Any, pack: Pack, step: int) -> None:
    """As the process of a pack does."""
    worker = PackWorker(job, pack)
    worker.save_checkpoint(step, str(step).encode())
    worker.close()


def failed(job: Any) -> dict[str, str]:
    """SAE id -> why it was given up."""
    return {key: data for kind, key, data in job.board.told if kind == "failed"}


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
    assert failed(given) == {"sae": "it hung 4 times; resources.stall_seconds sets how long a pack may stand still"}


@WAYS
def test_a_pack_that_dies_at_one_place_is_given_up(
    tmp_path: Path, started: list[tuple[str, ...]], trainer: str, workers: int
) -> None:
    """Ten starts without a newer checkpoint; one that makes them may die as often as it likes."""
    given = job(tmp_path, trainer, workers)
    for start in range(packs.MAX_DEATHS + 1):
        packs.pack_trial({"crew": 0}, given)
        write_checkpoint(given, OTHER, start)
        write_checkpoint(given, PACK, 0)
    assert started == [(PACK.id, OTHER.id)] * (packs.MAX_DEATHS + 1)
    packs.pack_trial({"crew": 0}, given)
    assert started[-1] == (OTHER.id,), "the same checkpoint made again is no progress"
    assert failed(given) == {"sae": "its process died 10 times without a new checkpoint"}


def test_a_pack_in_parts_lives_as_long_as_one_of_them_comes_further(
    tmp_path: Path, started: list[tuple[str, ...]]
) -> None:
    """By a checkpoint of a part, or by an SAE that stands. What is made again after every death keeps nothing alive,
    as a part whose one SAE diverges, so that it never ends."""
    wide = Pack(id="p.2", hook="h", saes=tuple(SimpleNamespace(id=f"sae{i}") for i in range(4)))  # type: ignore[arg-type]
    first, second = wide.halves()
    given = job(tmp_path, "inline", 1)
    given.crews = ((wide,),)
    for start in range(3 * packs.MAX_DEATHS):
        packs.pack_trial({"crew": 0}, given)
        write_checkpoint(given, first, 100)
        write_checkpoint(given, second, start // packs.MAX_DEATHS)
    assert started == [(wide.id,)] * 3 * packs.MAX_DEATHS
    given.board.reach(wide.id, second.saes[0].id, 0)
    for _ in range(packs.MAX_DEATHS + 1):
        packs.pack_trial({"crew": 0}, given)
        write_checkpoint(given, first, 100)
    assert started == [(wide.id,)] * 4 * packs.MAX_DEATHS + [()]
    assert set(failed(given).values()) == {"its process died 10 times without a new checkpoint"}
    assert set(failed(given)) == {sae.id for sae in wide.saes}


def test_what_is_left_of_a_pack_goes_on_from_its_newest_checkpoint(tmp_path: Path) -> None:
    """A driver that starts again gives it the id of the whole; as a part it had the id of its SAEs."""
    whole = Pack(id="p.2", hook="h", saes=tuple(SimpleNamespace(id=f"sae{i}") for i in range(4)))  # type: ignore[arg-type]
    _, part = whole.halves()
    left = dataclasses.replace(whole, saes=part.saes)
    given = job(tmp_path, "inline", 1)
    for pack, step in ((whole, 100), (part, 200)):
        write_checkpoint(given, pack, step)
    assert PackWorker(given, left).load_checkpoint(bytes) == b"200"
    write_checkpoint(given, left, 300)
    for pack in (left, part):
        assert PackWorker(given, pack).load_checkpoint(bytes) == b"300", "the newest, whoever wrote it"
    assert given.board.data("resumed") == [200, 300, 300]
    PackWorker(given, left).finish()
    assert given.storage.list(layout.sweep_file("s.0", "packs")) == []


def test_a_checkpoint_that_does_not_fit_hides_none_that_does(tmp_path: Path) -> None:
    """As one of stored activations where they are streamed, one that is damaged, and one of another version."""
    given = job(tmp_path, "inline", 1)
    for step in (400, 300, 200):
        write_checkpoint(given, PACK, step)
    keys = given.storage.list(layout.pack_folder("s.0", PACK.id))
    assert len(keys) == 3, "a write removes only what is older"

    def read(data: bytes) -> int | None:
        if data == b"400":
            raise CorruptError("It is damaged.")
        return None if data == b"300" else int(data)

    class Second(Group):
        rank = 1

        def from_first(self, value: Any) -> Any:
            assert value is None
            return b"200"

    for group in (None, Group(), Second()):
        assert PackWorker(given, PACK, group).load_checkpoint(read) == 200  # type: ignore[arg-type]
    assert given.board.data("resumed") == [200] * 2
    damaged = layout.pack_checkpoint("s.0", PACK.id, 400)
    assert given.board.data("retry") == [f"{damaged} is passed over: It is damaged."] * 2
    assert PackWorker(given, PACK).load_checkpoint(lambda _: None) is None
    assert given.board.data("resumed") == [200] * 2
    assert given.storage.list(layout.pack_folder("s.0", PACK.id)) == keys, "somebody else may go on from them"
    write_checkpoint(given, PACK, 500)
    assert given.storage.list(layout.pack_folder("s.0", PACK.id)) == [layout.pack_checkpoint("s.0", PACK.id, 500)]


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
    assert "1 SAEs are too many for a card" in failed(given)["sae"]


def test_workers_that_can_not_talk_to_each_other_end(
    tmp_path: Path, started: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes through torch.distributed fails: after ten tries nothing does, and Train has no more to start."""
    given = job(tmp_path, "ray_train", 2)

    def fails(*_: Any) -> None:
        raise RuntimeError("NCCL error: Duplicate GPU detected")

    def run(_job: Any, crew: tuple[Pack, ...], group: Group) -> None:
        for _ in crew:
            group.from_first(None)

    monkeypatch.setattr(Group, "from_first", fails)
    monkeypatch.setattr(packs, "run_crew", run)
    for _ in range(packs.MAX_DEATHS):
        with pytest.raises(RuntimeError, match="Duplicate GPU"):
            packs._train_worker({"job": given, "crew": (PACK,)})
    packs._train_worker({"job": given, "crew": (PACK,)})
    assert failed(given) == {"sae": "its process died 10 times without a new checkpoint"}


class Ended(BaseException):
    """The process ended."""


LOST = [
    torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered\nCompile with `TORCH_USE_CUDA_DSA`."),
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
]


def on_a_card(job: Any, monkeypatch: pytest.MonkeyPatch, errors: list[Exception | None], *, lost: bool) -> list[int]:
    """The job on a pretended card, whose tries end in `errors`, then in nothing; returns how many SAEs each had."""
    sizes: list[int] = []

    def run(_job: Any, crew: tuple[Pack, ...]) -> None:
        sizes.append(sum(len(pack.saes) for pack in crew))
        error = errors.pop(0) if errors else None
        if error is not None:
            raise crews._Failed(crew, error)

    def synchronize() -> None:
        if lost:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def end(code: int) -> None:
        raise Ended(code)

    job.slots.gpus = 1
    monkeypatch.setattr(crews, "_parts", lambda _job, crew: [crew])
    monkeypatch.setattr(crews, "_run", run)
    monkeypatch.setattr(crews, "has_ended", lambda *_: False)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(os, "_exit", end)
    return sizes


@pytest.mark.parametrize("error", LOST, ids=["torch", "triton"])
def test_a_process_that_lost_its_card_ends_and_burns_no_tries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """All that it asks of the card fails from then on; what starts anew has the card again."""
    given = job(tmp_path, "inline", 1)
    tries = on_a_card(given, monkeypatch, [error] * 9, lost=True)
    with pytest.raises(Ended):
        crews.run_crew_tries(given, (PACK, OTHER))
    assert tries == [2]
    (told,) = given.board.data("retry")
    assert told.startswith("its process has lost the card, and another goes on: ")
    assert told.endswith(str(error).partition("\n")[0]), "in one line"
    assert failed(given) == {}


NO_IMAGE = "CUDA error: no kernel image is available for execution on the device"


@pytest.mark.parametrize("error", [RuntimeError("a bug"), torch.AcceleratorError(NO_IMAGE)], ids=["any", "torch"])
def test_an_error_that_leaves_the_card_is_tried_again_in_the_same_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    given = job(tmp_path, "inline", 1)
    tries = on_a_card(given, monkeypatch, [error, OSError("a disk")], lost=False)
    crews.run_crew_tries(given, (PACK, OTHER))
    assert tries == [2, 2, 2]
    assert failed(given) == {}
    assert str(error) in given.board.data("retry")[0], "in its own words"


def test_a_process_that_loses_its_card_each_time_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a card that is broken: as often as a process may die."""
    given = job(tmp_path, "inline", 1)
    tries = on_a_card(given, monkeypatch, [LOST[0]] * 99, lost=True)
    monkeypatch.setattr(packs.tune, "report", lambda _: None)
    for _ in range(packs.MAX_DEATHS):
        with pytest.raises(Ended):
            packs.pack_trial({"crew": 0}, given)
    packs.pack_trial({"crew": 0}, given)
    assert tries == [2] * packs.MAX_DEATHS
    assert set(failed(given)) == {"sae", "other"}


def test_memory_that_another_allocator_lacks_halves_a_pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = Pack(id="p.2", hook="h", saes=tuple(SimpleNamespace(id=f"sae{i}") for i in range(4)))  # type: ignore[arg-type]
    given = job(tmp_path, "inline", 1)
    cublas = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    sizes = on_a_card(given, monkeypatch, [cublas, torch.AcceleratorError("CUDA error: out of memory")], lost=False)
    crews.run_crew_tries(given, (wide,))
    assert sizes == [4, 2, 1, 1, 2]
    assert given.board.data("retry") == [
        f"{n} SAEs are too many for the memory here; half of them at a time" for n in (4, 2)
    ]


def test_a_language_model_that_no_card_holds_is_loaded_once_and_no_pack_is_halved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card, pretended here, that has no room for it."""
    steps: list[str] = []

    def to(*_: Any, **__: Any) -> None:
        steps.append("load")
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 128.00 MiB.")

    prepared = prepared_sweep(write_run(tmp_path, resources={"activations": "stream"}), tmp_path / "store")
    ensure_corpus(prepared, SimpleNamespace(update=lambda *_: None, say=lambda _: None))  # type: ignore[arg-type]
    saes = prepared.resolved.saes
    crew = tuple(make_packs(saes, None, {sae.id for sae in saes}))
    given: Any = PackJob(
        resolved=prepared.resolved,
        crews=(crew,),
        streams=True,
        storage=prepared.storage,
        board=LocalBoard(),
        slots=Slots(count=1, cpus=1, gpus=1, threads=1),
        trainer="ray_train",
        prepend_bos=False,
    )
    monkeypatch.setattr(transformers.PreTrainedModel, "to", to)
    monkeypatch.setattr(crews, "give_back", lambda: steps.append("what was left is given back"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (10_000, 3 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 2**29)
    crews.run_crew_tries(given, crew)
    assert len(crew) == 2
    assert steps == ["what was left is given back", "load"]
    assert {data.partition(";")[0] for data in failed(given).values()} == {
        "Model model-llama does not fit into the memory there is "
        "(0.5 of 3.0 GiB of the card are not held by other processes)"
    }
    assert set(failed(given)) == {sae.id for sae in saes}
    assert not [data for data in given.board.data("retry") if "half of them" in data]
