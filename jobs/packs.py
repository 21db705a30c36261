"""Crews of packs on Ray: a Tune trial per crew, whose loop runs in the trial itself or in a Ray Train TorchTrainer.

Tune only schedules. A pack checkpoints itself in the store, resumes from there wherever it is started again, and
commits each of its SAEs as trained; the driver learns of it from the board.
"""

from __future__ import annotations

import tempfile
from typing import Any

from ray import PlacementGroupID, tune
from ray import train as ray_train
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchTrainer
from ray.util.placement_group import PlacementGroup, get_current_placement_group, remove_placement_group

from jobs.board import MAX_DEATHS
from jobs.crews import fail, is_wrong_input, run_crew, run_crew_tries, why
from jobs.group import TorchGroup
from jobs.leases import hangs_key
from jobs.packworker import PackJob
from jobs.runtime import last_line
from midiscover.cards import is_out_of_memory
from midiscover.errors import StageError
from midiscover.resolve import Crew, Pack

RETRY_FAILURES = -1
"""Tune and Train start what is lost again without limit: a lost node is nobody's mistake. Deaths, hangs and a pack's
own errors are counted where it is started, and a stage without progress is ended by the watchdog."""


def pack_trial(config: dict[str, Any], job: PackJob) -> None:
    """A Tune trial: one crew."""
    crew = job.crews[config["crew"]]
    try:
        if job.trainer == "inline":
            run_crew_tries(job, tuple(pack for pack in crew if _may_start(job, pack)))
        else:
            _in_torch_trainer(job, crew)
    except Exception as error:  # Tune would try it again for ever, and say nothing
        for pack in crew:
            fail(job, pack, why(error))
    tune.report({"crew": config["crew"]})


def _may_start(job: PackJob, pack: Pack) -> bool:
    """Whether a pack is started; else it is reported as failed."""
    reason = _why_not(job, pack)
    if reason is not None:
        fail(job, pack, reason)
    return reason is None


def _why_not(job: PackJob, pack: Pack) -> str | None:
    """Why a pack is not started again: it hung too often, or died again and again at one place. Counts the start."""
    if job.board.recall(_memory_key(pack)):
        return (
            f"its {len(pack.saes)} SAEs are too many for a card, and with resources.workers above 1 they are not "
            "trained in parts; give resources.pack_size"
        )
    hangs = job.board.recall(hangs_key(pack.id)) or 0
    if hangs > job.resolved.config.resources.max_failures:
        return f"it hung {hangs} times; resources.stall_seconds sets how long a pack may stand still"
    if job.board.start(pack.id) > MAX_DEATHS:
        return f"its process died {MAX_DEATHS} times without a new checkpoint"
    return None


def _memory_key(pack: Pack) -> str:
    """Where the board keeps that a card could not hold a pack."""
    return f"memory {pack.id}"


def _in_torch_trainer(job: PackJob, crew: Crew) -> None:
    """The same loop in a Ray Train worker; Train starts a lost worker again, and the packs resume from the store."""
    # A trial that was killed leaves its worker and the worker's resources behind; both must go before another starts.
    left = job.board.exchange(f"group {crew[0].id}", None)
    if left is not None:
        remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(left)))
    with tempfile.TemporaryDirectory(prefix="midiscover-train-") as folder:
        TorchTrainer(
            _train_worker,
            train_loop_config={"job": job, "crew": crew},
            scaling_config=ray_train.ScalingConfig(
                num_workers=job.slots.workers,
                use_gpu=job.slots.gpus > 0,
                resources_per_worker={"CPU": job.slots.cpus} | ({"GPU": job.slots.gpus} if job.slots.gpus else {}),
            ),
            run_config=ray_train.RunConfig(
                name=crew[0].id,
                storage_path=folder,
                failure_config=ray_train.FailureConfig(max_failures=RETRY_FAILURES),
            ),
        ).fit()


def _train_worker(config: dict[str, Any]) -> None:
    job, crew = config["job"], config["crew"]
    placed = get_current_placement_group()
    if placed is not None:
        job.board.exchange(f"group {crew[0].id}", placed.id.hex())
    # Asked here, for Train starts this again without asking the trial.
    if job.slots.workers == 1:
        run_crew_tries(job, tuple(pack for pack in crew if _may_start(job, pack)))
        return
    group = TorchGroup()
    # Told by Ray: where what torch sends between cards fails, it fails again, and who is refused must end without it.
    allowed = broadcast_from_rank_zero([_may_start(job, pack) for pack in crew] if group.rank == 0 else [])
    crew = tuple(pack for pack, may in zip(crew, allowed, strict=True) if may)
    try:
        run_crew(job, crew, group)
    except Exception as error:
        if is_out_of_memory(error):
            for pack in crew:
                job.board.exchange(_memory_key(pack), True)
        if is_wrong_input(error):  # all of them have it
            for pack in crew:
                fail(job, pack, why(error))
            return
        # The others wait for this one in vain: Train starts all of them again, from the last checkpoint.
        job.board.post("retry", crew[0].id, why(error))
        raise


def run_packs(job: PackJob) -> None:
    """Run every crew of a job as a Tune trial, `slots.count` at a time. StageError where Tune itself fails."""
    inline = job.trainer == "inline"
    # A TorchTrainer's worker takes the slot's CPUs; the trial around it must not, or both wait for ever.
    needs: dict[str, float] = {"cpu": job.slots.cpus if inline else 0.01}
    if inline and job.slots.gpus:
        needs["gpu"] = job.slots.gpus
    with tempfile.TemporaryDirectory(prefix="midiscover-tune-") as folder:
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(pack_trial, job=job), needs),
            param_space={"crew": tune.grid_search(list(range(len(job.crews))))},
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
