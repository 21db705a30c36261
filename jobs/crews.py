"""What one process trains: a pack from stored activations, or packs of several hooks that share a language model.

The packs of a crew take their steps in turn, so that they read the same rows at about the same time. Each has its own
checkpoints and commits its own SAEs, so that whoever shares its process changes nothing for it.
"""

from __future__ import annotations

import os
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from functools import partial

from jobs.group import TorchGroup
from jobs.halving import give_back, in_parts, room_of_card
from jobs.harvest import model_place
from jobs.leases import here
from jobs.packworker import PackJob, PackWorker
from jobs.runtime import own_error
from midiscover.cards import is_out_of_memory, lost_its_card
from midiscover.cores import compute_on
from midiscover.corpus import Corpus
from midiscover.errors import UserError
from midiscover.live import LivePools, LiveSource
from midiscover.memory import MODEL_BYTES
from midiscover.reading import Reader
from midiscover.resolve import Crew, Pack, PlannedSae, cut_crew, halves, pool_tokens
from midiscover.saes import STREAMED, has_ended, write_trained
from midiscover.source import open_source
from midiscover.store import layout
from midiscover.store.documents import dump
from midiscover.tracking.sweepfiles import retired_reason
from midiscover.train import Diverged, Member, Retired, Source, Trained, train_in_turns


class _Failed(Exception):
    """Some packs of a crew can't go on."""

    def __init__(self, packs: Sequence[Pack], error: Exception) -> None:
        super().__init__(str(error))
        self.packs, self.error = packs, error


def run_crew(job: PackJob, crew: Crew, group: TorchGroup | None = None) -> None:
    """Train packs from their last checkpoints and commit their SAEs as trained. Runs in any process, or in a group.

    Raises what went wrong with the first pack that could not go on; others then stand at their last checkpoints.
    """
    try:
        _run(job, crew, group)
    except _Failed as failed:
        raise failed.error from None


def _run(job: PackJob, crew: Crew, group: TorchGroup | None = None) -> None:
    compute_on(job.slots.threads)
    try:
        opened = _live(job, crew) if job.streams else _stored(job)
    except Exception as error:
        raise _Failed(crew, error) from error
    going = {pack.id: (pack, _turns(job, pack, opened, group)) for pack in crew}
    rows = dict.fromkeys(going, 0)
    try:
        while rows:
            # The one that is furthest behind: what a pack has read and another has not is held in memory.
            behind = min(rows, key=rows.__getitem__)
            used = _take_step(*going[behind])
            if used is None:
                del rows[behind]
            else:
                rows[behind] = used
    finally:
        for _, turns in going.values():
            turns.close()


def _take_step(pack: Pack, turns: Generator[int, None, None]) -> int | None:
    """Rows that the pack has used after one more step; None where there was none."""
    try:
        return next(turns, None)
    except Exception as error:
        raise _Failed([pack], error) from error


def _turns(
    job: PackJob, pack: Pack, opened: Callable[[Pack, PlannedSae], Source], group: TorchGroup | None
) -> Generator[int, None, None]:
    """One pack from its checkpoint to its committed SAEs, step by step; yields the rows that it has used."""
    # A pack that is tried again may have committed some of its SAEs before; those stand.
    todo = _missing(job, pack)
    if group is not None:
        todo = group.from_first(todo)
    worker = PackWorker(job, pack, group)
    job.board.post("started", pack.id, here(0 if group is None else group.rank, pack.whole))
    try:
        if todo:
            members = [Member(id=s.id, config=s.point.sae, train=s.point.train, d_sae=s.d_sae) for s in todo]
            how = {"stack": job.resolved.config.resources.stacked, "threads": job.slots.threads}
            results = yield from train_in_turns(members, opened(pack, todo[0]), worker, group, **how)
            for planned, result in zip(todo, results, strict=True):
                if worker.leads:
                    _commit(job, planned, result)
                    job.board.post("committed", pack.id)
                    if not isinstance(result, Diverged):
                        job.board.reach(pack.whole, planned.id, 0)
        worker.finish()
    finally:
        job.board.post("left", pack.id)
        worker.close()


def _stored(job: PackJob) -> Callable[[Pack, PlannedSae], Source]:
    return lambda _, sae: open_source(job.storage, sae.harvest_id, sae.point.hook, sae.output_hook, sae.point.train)


def _live(job: PackJob, crew: Crew) -> Callable[[Pack, PlannedSae], Source]:
    """Sources of one language model, which is loaded here."""
    todo = {pack.id: missing[0] for pack in crew if (missing := _missing(job, pack))}
    if not todo:
        return _stored(job)
    first = next(iter(todo.values()))
    part = job.resolved.part_of(first)

    def seen(tokens: int) -> None:
        """A sign of life of all of them; the tokens are counted once."""
        for number, pack in enumerate(crew):
            job.board.post("read", pack.id, 0 if number else tokens)

    if job.slots.gpus:
        give_back()  # or what is left of a part before this one makes a model look too large
    model = replace(model_place(part, job.slots), cards=1).load()
    corpus = Corpus.open(job.storage, part.corpus_id)
    ahead = corpus.manifest.tokens["train"]
    reader = Reader(model, part.hooks, part.config.harvest, corpus.manifest.context_size, seen, ahead=ahead)
    live = LivePools(
        reader,
        corpus,
        {pack: (sae.point.hook, sae.output_hook) for pack, sae in todo.items()},
        shuffle_tokens=pool_tokens(first),
        seed=first.point.train.seed,
        epochs=max(sae.point.train.epochs for sae in todo.values()),
    )
    return lambda pack, sae: LiveSource(live, pack.id, sae.point.train)


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
    if job.streams:
        run["activations"] = STREAMED
    part = job.resolved.part_of(planned)
    write_trained(job.storage, planned, part, result, prepend_bos=job.prepend_bos, run=run)
    job.board.post("trained", planned.id, result.history)


def run_crew_tries(job: PackJob, crew: Crew) -> None:
    """`run_crew` on as many SAEs at once as the card's memory holds; where it held fewer, on half of them.

    After an error of its own a pack is tried again from its checkpoint; then that is reported, while others go on.
    """
    parts, halved = _parts(job, crew), list[Crew]()

    def on_halving(part: Crew) -> None:
        halved.append(part)
        count = sum(len(pack.saes) for pack in part)
        job.board.post("retry", part[0].id, f"{count} SAEs are too many for the memory here; half of them at a time")

    in_parts(parts, partial(_try, job), on_halving, halves)
    for pack in crew if len(parts) > 1 or halved else ():
        if not _missing(job, pack):
            PackWorker(job, pack).finish()  # the checkpoints of the whole, from which its parts went on


def _parts(job: PackJob, crew: Crew) -> list[Crew]:
    """The crew, or parts of it that fit this card by reckoning."""
    if not job.slots.gpus:
        return [crew]
    room = room_of_card(job.slots.gpus)
    if job.streams:
        room -= MODEL_BYTES[job.resolved.config.model.dtype] * job.resolved.table.parameters
    # A language model that is too large by itself leaves nothing to reckon, and says so once where it is loaded.
    return cut_crew(crew, room) if room > 0 else [crew]


def _try(job: PackJob, crew: Crew) -> None:
    """Tries of one part. The error of a memory that ran out where the part could be smaller."""
    tries = job.resolved.config.resources.max_failures + 1
    made: Counter[str] = Counter()
    left = list(crew)
    while left:
        try:
            _run(job, tuple(left))
            return
        except _Failed as failed:
            if is_out_of_memory(failed.error) and sum(len(pack.saes) for pack in left) > 1:
                raise failed.error from None
            reason, is_input = why(failed.error), is_wrong_input(failed.error)
            failures = failed.packs
            lost = job.slots.gpus > 0 and not is_input and lost_its_card()
        if lost:
            _end_process(job, failures[0], reason)
        for pack in failures:
            made[pack.id] += 1
            job.board.post("retry", pack.id, f"try {made[pack.id]} of {tries}: {reason}")
            if made[pack.id] == tries or is_input:  # wrong input is wrong every time
                fail(job, pack, reason)
                left.remove(pack)


def _end_process(job: PackJob, pack: Pack, reason: str) -> None:
    """Tune or Train starts another, where packs go on from their checkpoints; how often is bounded as for deaths."""
    job.board.post("retry", pack.id, f"its process has lost the card, and another goes on: {reason}")
    job.board.recall(pack.id)  # once this is answered, the board has what was posted before
    os._exit(1)


def fail(job: PackJob, pack: Pack, reason: str) -> None:
    """Report the SAEs of a pack that are missing as failed."""
    for planned in _missing(job, pack):
        job.board.post("failed", planned.id, reason)


def _missing(job: PackJob, pack: Pack) -> list[PlannedSae]:
    return [planned for planned in pack.saes if not has_ended(job.storage, job.resolved.sweep_id, planned)]


def is_wrong_input(error: Exception) -> bool:
    """Whether every process would meet this error."""
    return isinstance(error, UserError) and error.exit_code == UserError.exit_code


def why(error: Exception) -> str:
    """An error in one line."""
    known = own_error(error)
    return str(known) if known is not None else traceback.format_exception_only(error)[-1].strip().partition("\n")[0]
