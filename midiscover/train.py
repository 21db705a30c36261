"""The training loop: one stream of activations, many SAEs. Knows no Ray, no storage and no language model.

`train(members, source, worker)` serves a Tune trial, a Ray Train worker and a plain test alike. Every member sees the
same batches and is stepped by itself, so that its weights do not depend on who shares its pack. On CPU a resumed pack
equals the uninterrupted one bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor

from midiscover.member import HISTORY, Diverged, Group, Member, Retired, Slot, Trained
from midiscover.progress import Progress
from midiscover.retirement import dominated
from midiscover.sae.base import Normalisation
from midiscover.sae.checkpoint import pack_state, unpack_state
from midiscover.sidebyside import Batch, Cores, for_each
from midiscover.stacked import Stepper, steppers

__all__ = ["Diverged", "Group", "Member", "Retired", "Source", "Trained", "Worker", "train", "train_in_turns"]

T = TypeVar("T")


class Pair(NamedTuple):
    """A batch for transcoders: the same tokens at two hooks."""

    x: Tensor
    """[batch_size, d_in]."""
    y: Tensor
    """[batch_size, d_out]."""


class Source(Protocol):
    """A resumable stream of raw activations of one hook, or of the same tokens at two hooks."""

    batch_size: int

    @property
    def inputs(self) -> Normalisation:
        """Of the hook that is read."""
        ...

    @property
    def outputs(self) -> Normalisation:
        """The same as `inputs` but for a source of pairs."""
        ...

    @property
    def rows_per_epoch(self) -> int:
        """Rows that are given out once in each epoch."""
        ...

    def __len__(self) -> int:
        """Batches in the whole stream, all epochs together."""
        ...

    def batches(self, start: int) -> Iterator[Tensor | Pair]:
        """Batches from number `start` on, as an uninterrupted stream gives them: [batch_size, d_in], or pairs."""
        ...


@runtime_checkable
class Remembering(Protocol):
    """A source that has learned, on its way, what a later process needs of it."""

    def state(self) -> Mapping[str, Any]:
        """Goes into each checkpoint; JSON."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Called before anything else where there is a checkpoint."""
        ...


class Worker(Protocol):
    """The process that a pack runs in: its device, its checkpoints, its way to be seen."""

    device: torch.device

    def load_checkpoint(self, read: Callable[[bytes], T | None]) -> T | None:
        """The last complete checkpoint of this pack of which `read` makes something; what it made, or None."""
        ...

    def save_checkpoint(self, step: int, data: bytes) -> None:
        """Keep `data` in place of the one before; may return before it is written."""
        ...

    def is_saving(self) -> bool:
        """Whether the one before is still being written. Training does not wait for it; the next one comes later."""
        ...

    def report(self, progress: Progress) -> None:
        """Show progress; called every few steps."""
        ...


def train(
    members: Sequence[Member],
    source: Source,
    worker: Worker,
    group: Group | None = None,
    *,
    stack: bool = False,
    threads: int = 1,
) -> list[Trained | Diverged | Retired]:
    """Train every member on the same stream, resuming from the worker's last checkpoint.

    All members share one `batch_size`, `epochs` and `seed` (those of `source`); the rest may differ. The result has
    one entry per member, in order.

    group: the processes that share each batch. Each calls this with the same members, an equal source and the same
    checkpoint, and gets the same result; gradients are those of the whole batch. `batch_size` must be a multiple of
    the group's size, and no member of a kind that selects over the batch (`SHARES_NO_BATCH` in `saeconfig`).

    stack: whether small L1 SAEs may be stepped together; see `stacked`. threads: on a CPU, cores that may step SAEs
    side by side, as many as torch has threads; see `sidebyside`.
    """
    turns = train_in_turns(members, source, worker, group, stack=stack, threads=threads)
    while True:
        try:
            next(turns)
        except StopIteration as end:
            return end.value


def train_in_turns(
    members: Sequence[Member],
    source: Source,
    worker: Worker,
    group: Group | None = None,
    *,
    stack: bool = False,
    threads: int = 1,
) -> Generator[int, None, list[Trained | Diverged | Retired]]:
    """`train`, step by step, for a process that trains several packs side by side; returns what `train` does.

    Yields the rows of the stream that have been used so far.
    """
    remembering = isinstance(source, Remembering)
    checkpoint = worker.load_checkpoint(partial(_Checkpoint.of, wanted=members, remembering=remembering))
    if checkpoint is not None and checkpoint.source is not None and isinstance(source, Remembering):
        source.restore(checkpoint.source)
    numbers = max((member.d_sae * source.outputs.mean.numel() for member in members), default=0)

    def slot_of(member: Member) -> Slot:
        rows, steps = source.rows_per_epoch, len(source)
        ends = source.inputs, source.outputs
        return Slot(member, *ends, rows_per_epoch=rows, steps=steps, device=worker.device, group=group)

    slots = for_each(members, slot_of, numbers=numbers)
    start = 0
    if checkpoint is not None:
        checkpoint.put_into(slots)
        start = checkpoint.step
    del checkpoint  # as large as the SAEs with their moments
    cores = Cores(threads if worker.device.type == "cpu" and group is None else 1)
    try:
        yield from _Loop(slots, source, worker, cores, stack=stack).run(start)
    finally:
        cores.close()
    tokens = len(source) * source.batch_size
    return for_each(slots, lambda slot: slot.finish(tokens), numbers=numbers)  # in the order of `members`


class _Loop:
    """Steps, reports and checkpoints of one pack."""

    def __init__(self, slots: Sequence[Slot], source: Source, worker: Worker, cores: Cores, *, stack: bool) -> None:
        self.slots, self.source, self.worker, self.cores, self.stack = slots, source, worker, cores, stack
        self.steps = len(source)
        device = worker.device
        self.mean_in, self.mean_out = source.inputs.mean.to(device), source.outputs.mean.to(device)
        self.saved_at = self.started_at = time.monotonic()
        self.every = slots[0].member.train.checkpoint_every

    def run(self, start: int) -> Iterator[int]:
        """Yields after every step, or after some that were taken at once: the rows used so far."""
        before = {slot.member.id: slot.seconds for slot in self.slots}
        taken = dict.fromkeys(before, 0)
        together: list[Slot] = []
        stepping: list[Stepper] = []
        batches: list[Batch] = []
        spent, resumed = 0.0, time.monotonic()
        for step, raw in enumerate(self.source.batches(start), start=start):
            x, y = self._normalise(raw)
            if step == 0:
                for slot in self.slots:
                    slot.sae.calibrate_(x)
            learning = [slot for slot in self.slots if slot.learns]
            if not learning:
                break
            if learning != together:
                together, stepping = learning, steppers(learning, self.source.batch_size, stack=self.stack)
            batches.append(Batch(step, x, y))
            # Who still learns is known anew where something is reported, so that no step is taken too many.
            if len(batches) < self.cores.look_ahead(stepping, len(x)) and not self._reports_any(step):
                continue
            self.cores.run(stepping, batches, self._step)
            for slot in together:
                taken[slot.member.id] += len(batches)
            batches = []
            self._retire(step)
            self._after(step, start)
            spent += time.monotonic() - resumed
            yield (step + 1) * self.source.batch_size
            resumed = time.monotonic()
        if self.worker.device.type == "cuda":
            # Kernels run behind the calls that launch them, so only the pack's time is known, and shared out by steps.
            torch.cuda.synchronize(self.worker.device)
            spent += time.monotonic() - resumed
            for slot in self.slots:
                slot.seconds = before[slot.member.id] + spent * taken[slot.member.id] / max(1, sum(taken.values()))

    def _step(self, one: Stepper, batch: Batch) -> None:
        began = time.perf_counter()
        for slot, point in zip(one.slots, one.step(batch.x, batch.y, batch.step), strict=True):
            if self._reports(slot, batch.step):
                slot.record(point, batch.step, self.source.batch_size)
        spent = time.perf_counter() - began
        for slot in one.slots:
            slot.seconds += spent / len(one.slots)

    def _normalise(self, raw: Tensor | Pair) -> tuple[Tensor, Tensor]:
        device, source = self.worker.device, self.source
        if isinstance(raw, Tensor):
            x = (_sent(raw, device).float() - self.mean_in) * source.inputs.scale
            return x, x
        x = (_sent(raw.x, device).float() - self.mean_in) * source.inputs.scale
        y = (_sent(raw.y, device).float() - self.mean_out) * source.outputs.scale
        return x, y

    def _reports(self, slot: Slot, step: int) -> bool:
        return step % slot.member.train.report_every == 0 or step == self.steps - 1

    def _reports_any(self, step: int) -> bool:
        return any(self._reports(slot, step) for slot in self.slots)

    def _retire(self, step: int) -> None:
        """Drop members that others dominate; what stays is not touched."""
        for slot, other in dominated(self.slots, step, self.steps):
            slot.retired = (step, other.member.id)

    def _after(self, step: int, start: int) -> None:
        """Report where a point was recorded; checkpoint when it is time, and at the end."""
        now = time.monotonic()
        if self._reports_any(step):
            rate = (step + 1 - start) * self.source.batch_size / max(now - self.started_at, 1e-9)
            latest = {s.member.id: {n: s.history[n][-1] for n in HISTORY} for s in self.slots if s.history["step"]}
            self.worker.report(Progress(step + 1, self.steps, rate, latest))
        if now - self.saved_at >= self.every and step + 1 < self.steps and not self.worker.is_saving():
            self.worker.save_checkpoint(step + 1, self._state(step + 1))
            self.saved_at = time.monotonic()

    def _state(self, step: int) -> bytes:
        tensors: dict[str, Tensor] = {}
        members = []
        for i, slot in enumerate(self.slots):
            own, fields = slot.state()
            tensors |= {f"{i}/{name}": value for name, value in own.items()}
            members.append(fields)
        learned = {"source": self.source.state()} if isinstance(self.source, Remembering) else {}
        return pack_state(tensors, {"step": step, "members": members} | learned)


def _sent(rows: Tensor, device: torch.device) -> Tensor:
    """Rows on their way to a device. Nobody waits until a GPU has done the steps before, as it would be for rows in
    memory that is not pinned: the next batch is picked meanwhile."""
    if device.type == "cuda" and rows.device.type == "cpu":
        rows = rows.pin_memory()  # which PyTorch keeps until it is copied
    return rows.to(device, non_blocking=True)


class _Checkpoint(NamedTuple):
    """What `_Loop._state` wrote."""

    step: int
    """To go on from."""
    tensors: dict[str, Tensor]
    members: list[dict[str, Any]]
    source: dict[str, Any] | None

    @classmethod
    def of(cls, data: bytes, wanted: Sequence[Member], *, remembering: bool) -> Self | None:
        """None where the members can't go on from it as if they had never stopped: it lacks one of them, one was
        dropped by a retirement that is not asked for any more, or activations came another way, stored or streamed, so
        with another mean and scale. CorruptError where it can't be read.

        It may hold more SAEs than are asked for: those of the pack that stand already.
        """
        tensors, fields = unpack_state(data)
        held = {member["id"]: member for member in fields["members"]}
        if (fields.get("source") is not None) is not remembering or not {member.id for member in wanted} <= held.keys():
            return None
        if any(held[member.id]["retired"] and member.train.retire_after is None for member in wanted):
            return None
        return cls(int(fields["step"]), tensors, fields["members"], fields.get("source"))

    def put_into(self, slots: Sequence[Slot]) -> None:
        """Every slot as it was."""
        held = {member["id"]: i for i, member in enumerate(self.members)}
        for slot in slots:
            prefix = f"{held[slot.member.id]}/"
            own = {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}
            slot.restore(own, self.members[held[slot.member.id]])
