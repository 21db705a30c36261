"""Packs of SAEs on Ray: a Tune trial per pack, whose loop runs in the trial itself or in a Ray Train TorchTrainer.

Tune only schedules. A pack checkpoints itself in the store, resumes from there wherever it is started again, and
commits each of its SAEs as trained; the driver learns of it from the board.
"""

from __future__ import annotations

import tempfile
import traceback
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from ray import PlacementGroupID, tune
from ray import train as ray_train
from ray.train.torch import TorchTrainer, get_device
from ray.util.placement_group import PlacementGroup, get_current_placement_group, remove_placement_group

from jobs.board import Board
from jobs.group import TorchGroup
from jobs.leases import hangs_key, here
from jobs.runtime import Slots, last_line, own_error
from midiscover.errors import StageError, UserError
from midiscover.memory import fit_together
from midiscover.progress import Progress
from midiscover.resolve import Pack, PlannedSae, Resolved
from midiscover.saes import has_ended, write_trained
from midiscover.source import open_source
from midiscover.store import layout
from midiscover.store.documents import dump
from midiscover.store.storage import Storage
from midiscover.tracking.sweepfiles import retired_reason
from midiscover.train import Diverged, Member, Retired, Trained, train

MAX_DEATHS = 10
"""Deaths of a pack's process in a row, without a newer checkpoint, after which the pack counts as failed."""
RETRY_FAILURES = -1
"""Tune starts a lost trial again without limit: a lost node is nobody's mistake. A pack's own errors are counted inside
the trial, and a stage without progress is ended by the watchdog."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackJob:
    """What a trial needs to know; small, and the same for all packs of a sweep."""

    resolved: Resolved
    packs: tuple[Pack, ...]
    storage: Storage
    board: Board
    slots: Slots
    trainer: str
    prepend_bos: bool


class PackWorker:
    """The process a pack runs in, as the training loop sees it."""

    def __init__(self, job: PackJob, pack: Pack, group: TorchGroup | None = None) -> None:
        self.job, self.pack, self.group = job, pack, group
        self.leads = group is None or group.rank == 0
        self.device = torch.device("cuda" if job.slots.gpus > 0 else "cpu")
        if group is not None and job.slots.gpus > 0:
            self.device = get_device()
        self.writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.writing: Future[None] | None = None

    def load_checkpoint(self) -> bytes | None:
        """The newest checkpoint of this pack in the store, or of the pack it is a part of; of a group the first's."""
        found = self._newest() if self.leads else None
        return found if self.group is None else self.group.from_first(found)

    def _newest(self) -> bytes | None:
        for pack in (self.pack.id, *self.pack.parents):
            keys = self._checkpoints(pack)
            if keys:
                self.job.board.post("resumed", self.pack.id, _step_of(keys[-1]))
                return self.job.storage.read(keys[-1])
        return None

    def newest(self) -> int:
        """The step of the newest checkpoint; 0 where there is none."""
        keys = self._checkpoints(self.pack.id)
        return _step_of(keys[-1]) if keys else 0

    def save_checkpoint(self, step: int, data: bytes) -> None:
        """Written by a background thread, one at a time; older ones go once the new one stands."""
        if not self.leads:
            return
        if self.writing is not None:
            self.writing.result()
        self.writing = self.writer.submit(self._write, step, data)

    def report(self, progress: Progress) -> None:
        """To the board, for the driver's bars and the tracker's curves."""
        if self.leads:
            self.job.board.post("pack", self.pack.id, progress)

    def finish(self) -> None:
        """The pack's SAEs stand, so its checkpoints go."""
        self.close()
        for key in self._checkpoints(self.pack.id) if self.leads else ():
            self.job.storage.delete(key)

    def close(self) -> None:
        """Wait for the writer."""
        self.writer.shutdown(wait=True)

    def _write(self, step: int, data: bytes) -> None:
        old = self._checkpoints(self.pack.id)
        self.job.storage.write(layout.pack_checkpoint(self.job.resolved.sweep_id, self.pack.id, step), data)
        for key in old:
            self.job.storage.delete(key)

    def _checkpoints(self, pack: str) -> list[str]:
        keys = self.job.storage.list(layout.pack_folder(self.job.resolved.sweep_id, pack))
        return sorted(keys, key=_step_of)


def _step_of(key: str) -> int:
    return int(key.rpartition("step-")[2].partition(".")[0])


def run_pack(job: PackJob, pack: Pack, group: TorchGroup | None = None) -> None:
    """Train a pack from its last checkpoint and commit its SAEs as trained. Runs in any process, or in a group."""
    torch.set_num_threads(job.slots.threads)
    # A pack that is tried again may have committed some of its SAEs before; those stand.
    todo = [planned for planned in pack.saes if not _ended(job, planned)]
    if group is not None:
        todo = group.from_first(todo)
    worker = PackWorker(job, pack, group)
    job.board.post("started", pack.id, here(0 if group is None else group.rank, [pack.id, *pack.parents][-1]))
    try:
        if todo:
            first = todo[0]
            source = open_source(job.storage, first.harvest_id, first.point.hook, first.output_hook, first.point.train)
            members = [Member(id=s.id, config=s.point.sae, train=s.point.train, d_sae=s.d_sae) for s in todo]
            for planned, result in zip(todo, train(members, source, worker, group), strict=True):
                if worker.leads:
                    _commit(job, planned, result)
        worker.finish()
    finally:
        job.board.post("left", pack.id)
        worker.close()


def _commit(job: PackJob, planned: PlannedSae, result: Trained | Diverged | Retired) -> None:
    if isinstance(result, Diverged):
        job.board.post("failed", planned.id, result.reason)
        return
    if isinstance(result, Retired):
        word = {"v": 1, "id": planned.id, "step": result.step, "by": result.by}
        job.storage.create(layout.retired(job.resolved.sweep_id, planned.id), dump(word))
        job.board.post("retired", planned.id, retired_reason(word))
        return
    device = "cuda" if job.slots.gpus else "cpu"
    run = {"threads": job.slots.threads, "device": device, "trainer": job.trainer}
    if job.slots.workers > 1:
        run["workers"] = job.slots.workers
    part = job.resolved.part_of(planned)
    write_trained(job.storage, planned, part, result, prepend_bos=job.prepend_bos, run=run)
    job.board.post("trained", planned.id, result.history)


def run_pack_tries(job: PackJob, pack: Pack) -> None:
    """`run_pack` on as many SAEs at once as the card's memory holds; where it held fewer, on half of them.

    After an error of its own a part is tried again from its checkpoint; then that is reported, while others go on.
    """
    parts = deque(_parts(job, pack))
    whole = len(parts) == 1
    while parts:
        part = parts.popleft()
        try:
            _try(job, part)
            continue
        except torch.OutOfMemoryError:
            whole = False
        # Outside the handler, so that what the error's traceback held is free by now.
        torch.cuda.empty_cache()
        parts.extendleft(reversed(part.halves()))
        job.board.post("retry", pack.id, f"{len(part.saes)} SAEs are too many for this card; half of them at a time")
    if not whole and all(_ended(job, planned) for planned in pack.saes):
        PackWorker(job, pack).finish()  # the checkpoints of the whole, from which its parts went on


def _parts(job: PackJob, pack: Pack) -> list[Pack]:
    """The pack, or parts of it that fit this card by reckoning: cards of one cluster may differ."""
    if not job.slots.gpus:
        return [pack]
    free, total = torch.cuda.mem_get_info()
    limit = int(0.95 * min(free, total * min(1.0, job.slots.gpus)))
    parts = fit_together([planned.sizes for planned in pack.saes], limit)
    return [pack] if len(parts) < 2 else [pack.part([pack.saes[i] for i in part]) for part in parts]


def _try(job: PackJob, pack: Pack) -> None:
    """Tries of one part. OutOfMemoryError where it could be smaller."""
    tries = job.resolved.config.resources.max_failures + 1
    for attempt in range(1, tries + 1):
        try:
            run_pack(job, pack)
            return
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError) and len(pack.saes) > 1:
                raise
            reason = _reason(error)
            job.board.post("retry", pack.id, f"try {attempt} of {tries}: {reason}")
            if attempt == tries or _is_input(error):  # wrong input is wrong every time
                _fail(job, pack, reason)
                return


def _fail(job: PackJob, pack: Pack, reason: str) -> None:
    for planned in pack.saes:
        if not _ended(job, planned):
            job.board.post("failed", planned.id, reason)


def _ended(job: PackJob, planned: PlannedSae) -> bool:
    return has_ended(job.storage, job.resolved.sweep_id, planned)


def _is_input(error: Exception) -> bool:
    return isinstance(error, UserError) and error.exit_code == UserError.exit_code


def _reason(error: Exception) -> str:
    known = own_error(error)
    return str(known) if known is not None else traceback.format_exception_only(error)[-1].strip()


def pack_trial(config: dict[str, Any], job: PackJob) -> None:
    """A Tune trial: one pack."""
    pack = job.packs[config["pack"]]
    try:
        reason = _why_not(job, pack)
        if reason is not None:
            _fail(job, pack, reason)
        elif job.trainer == "inline":
            run_pack_tries(job, pack)
        else:
            _in_torch_trainer(job, pack)
    except Exception as error:  # Tune would try it again for ever, and say nothing
        _fail(job, pack, _reason(error))
    tune.report({"pack": config["pack"]})


def _why_not(job: PackJob, pack: Pack) -> str | None:
    """Why a pack is not started again: it hung too often, or died again and again at one place. Counts the start."""
    hangs = job.board.recall(hangs_key(pack.id)) or 0
    if hangs > job.resolved.config.resources.max_failures:
        return f"it hung {hangs} times; resources.stall_seconds sets how long a pack may stand still"
    newest = PackWorker(job, pack).newest()
    before = job.board.exchange(f"starts {pack.id}", None) or {"step": -1, "starts": 0}
    starts = before["starts"] + 1 if before["step"] == newest else 1
    job.board.exchange(f"starts {pack.id}", {"step": newest, "starts": starts})
    return None if starts <= MAX_DEATHS else f"its process died {MAX_DEATHS} times without a new checkpoint"


def _in_torch_trainer(job: PackJob, pack: Pack) -> None:
    """The same loop in a Ray Train worker; Train starts a lost worker again, and the pack resumes from the store."""
    # A trial that was killed leaves its worker and the worker's resources behind; both must go before another starts.
    left = job.board.exchange(f"group {pack.id}", None)
    if left is not None:
        remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(left)))
    with tempfile.TemporaryDirectory(prefix="midiscover-train-") as folder:
        TorchTrainer(
            _train_worker,
            train_loop_config={"job": job, "pack": pack},
            scaling_config=ray_train.ScalingConfig(
                num_workers=job.slots.workers,
                use_gpu=job.slots.gpus > 0,
                resources_per_worker={"CPU": job.slots.cpus} | ({"GPU": job.slots.gpus} if job.slots.gpus else {}),
            ),
            run_config=ray_train.RunConfig(
                name=pack.id,
                storage_path=folder,
                failure_config=ray_train.FailureConfig(
                    max_failures=RETRY_FAILURES if job.slots.workers == 1 else MAX_DEATHS
                ),
            ),
        ).fit()


def _train_worker(config: dict[str, Any]) -> None:
    job, pack = config["job"], config["pack"]
    placed = get_current_placement_group()
    if placed is not None:
        job.board.exchange(f"group {pack.id}", placed.id.hex())
    if job.slots.workers == 1:
        run_pack_tries(job, pack)
        return
    try:
        run_pack(job, pack, TorchGroup())
    except Exception as error:
        if _is_input(error):  # all of them have it
            _fail(job, pack, _reason(error))
            return
        # The others wait for this one in vain: Train starts all of them again, from the last checkpoint.
        job.board.post("retry", pack.id, _reason(error))
        raise


def run_packs(job: PackJob) -> None:
    """Run every pack of a job as a Tune trial, `slots.count` at a time. StageError where Tune itself fails."""
    inline = job.trainer == "inline"
    # A TorchTrainer's worker takes the slot's CPUs; the trial around it must not, or both wait for ever.
    needs: dict[str, float] = {"cpu": job.slots.cpus if inline else 0.01}
    if inline and job.slots.gpus:
        needs["gpu"] = job.slots.gpus
    with tempfile.TemporaryDirectory(prefix="midiscover-tune-") as folder:
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(pack_trial, job=job), needs),
            param_space={"pack": tune.grid_search(list(range(len(job.packs))))},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=job.slots.count,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: str(trial.trial_id),
            ),
            run_config=tune.RunConfig(
                name=job.resolved.sweep_id,
                storage_path=folder,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=RETRY_FAILURES),
            ),
        )
        results = tuner.fit()
    errors = list(results.errors)
    if errors:
        raise StageError(f"{len(errors)} packs ended without a result: {last_line(errors[0])}")
