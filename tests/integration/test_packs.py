"""A pack that is too large for its card: trained in halves, which changes no weight. In this process, without Ray."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import jobs.crews
from jobs.crews import run_crew_tries
from jobs.packworker import PackJob, PackWorker
from jobs.runtime import Slots
from midiscover.launch import Prepared
from midiscover.memory import Sizes, training_bytes
from midiscover.resolve import make_packs
from midiscover.store import layout
from tests.boards import LocalBoard
from tests.jobs_cli import midiscover
from tests.runs import prepared_sweep, write_run

pytestmark = [pytest.mark.ray, pytest.mark.slow]
GRID = {"grid": {"sae.l1_coefficient": [0.5, 1, 2, 4]}, "harvest": {"hooks": "model.layers.1.mlp.down_proj"}}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs")
    config = write_run(folder, **GRID, train={"epochs": 2, "batch_size": 128, "lr": 1e-3, "checkpoint_every": 1e-9})
    done = midiscover("harvest", str(config), "--store", str(folder / "whole"))
    assert done.code == 0, done.err
    shutil.copytree(folder / "whole", folder / "halves")
    return config


def trained(config: Path, store: str) -> tuple[Prepared, LocalBoard]:
    """Train the config's one pack on a store that has its activations."""
    prepared, board = prepared_sweep(config, config.parent / store), LocalBoard()
    saes = prepared.resolved.saes
    (pack,) = make_packs(saes, None, {sae.id for sae in saes})
    job: Any = PackJob(
        resolved=prepared.resolved,
        crews=((pack,),),
        storage=prepared.storage,
        board=board,
        slots=Slots(count=1, cpus=1, gpus=0, threads=1),
        trainer="inline",
        prepend_bos=False,
    )
    run_crew_tries(job, (pack,))
    return prepared, board


def weights(prepared: Prepared) -> dict[str, bytes]:
    return {
        sae.id: prepared.storage.read(layout.sae_file(sae.id, "sae_weights.safetensors"))
        for sae in prepared.resolved.saes
    }


@pytest.fixture(scope="module")
def whole(config: Path) -> dict[str, bytes]:
    prepared, board = trained(config, "whole")
    assert "retry" not in {kind for kind, _, _ in board.told}
    return weights(prepared)


class OutOfMemory:
    """The training loop on a card that holds `most` SAEs; the others' memory runs out at the tenth step."""

    def __init__(self, train: Callable[..., Any], most: int) -> None:
        self.train, self.most, self.sizes = train, most, []

    def __call__(self, members: list, source: Any, worker: Any, group: Any, **how: Any) -> Any:
        self.sizes.append(len(members))
        if len(members) <= self.most:
            return self.train(members, source, worker, group, **how)
        report = worker.report

        def fail(progress: Any) -> None:
            report(progress)
            if progress.step > 10:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        worker.report = fail
        return self.train(members, source, worker, group, **how)


def test_halves_go_on_from_the_checkpoint_of_the_whole(
    config: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = OutOfMemory(jobs.crews.train_in_turns, most=2)
    monkeypatch.setattr(jobs.crews, "train_in_turns", small)
    monkeypatch.setattr(PackWorker, "is_saving", lambda _: False)  # waits for each write, however slow the disk
    prepared, board = trained(config, "halves")
    assert small.sizes == [4, 2, 2]
    assert board.data("retry") == ["4 SAEs are too many for the memory here; half of them at a time"]
    resumed = board.data("resumed")
    assert len(resumed) == 2
    assert min(resumed) >= 10, "both halves went on where the whole was"
    assert weights(prepared) == whole
    assert len(board.data("committed")) == 4, "a sign of life after each"
    assert {sae.id for sae in prepared.resolved.saes} <= board.actor.furthest.keys()
    assert not prepared.storage.list(layout.sweep_file(prepared.resolved.sweep_id, "packs"))


def test_parts_are_reckoned_before_anything_runs_out(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card, which is pretended here, with room for three of the four SAEs."""
    prepared = prepared_sweep(config, config.parent / "whole")
    sae = prepared.resolved.saes[0]
    d_in = prepared.resolved.hooks[sae.point.hook]
    room = int(training_bytes([Sizes(d_in, sae.d_sae, d_in, 128)] * 3) / 0.95) + 1000
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (room, 10 * room))
    (pack,) = make_packs(prepared.resolved.saes, None, {one.id for one in prepared.resolved.saes})
    job: Any = PackJob(
        resolved=prepared.resolved,
        crews=((pack,),),
        storage=prepared.storage,
        board=LocalBoard(),
        slots=Slots(count=1, cpus=1, gpus=1, threads=1),
        trainer="inline",
        prepend_bos=False,
    )
    assert [len(part.saes) for (part,) in jobs.crews._parts(job, (pack,))] == [3, 1]
    beside = 4 * prepared.resolved.table.parameters  # the language model, in float32
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (room + int(beside / 0.95), 10 * room))
    streams = dataclasses.replace(job, streams=True)
    assert [len(part.saes) for (part,) in jobs.crews._parts(streams, (pack,))] == [3, 1]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (room + int(beside / 2 / 0.95), 10 * room))
    assert [len(part.saes) for (part,) in jobs.crews._parts(streams, (pack,))] == [2, 2]
