"""The training loop: one stream of activations, many SAEs. Knows no Ray, no storage and no language model.

`train(members, source, worker)` serves a Tune trial, a Ray Train worker and a plain test alike. Every member sees the
same batches and is stepped by itself, so that its weights do not depend on who shares its pack. On CPU a resumed pack
equals the uninterrupted one bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from midiscover.config import TrainConfig
from midiscover.sae.base import Losses, Sae, StepContext
from midiscover.sae.checkpoint import pack_state, unpack_state
from midiscover.sae.registry import make_sae

MAX_DEAD_WINDOW = 10_000_000
HISTORY = ("step", "tokens", "loss", "mse", "sparsity", "l0", "fvu", "lr")


class Source(Protocol):
    """A resumable stream of raw activations of one hook."""

    mean: Tensor
    """[d_in] float32, subtracted before scaling."""
    scale: float
    """Makes the mean norm of centred rows sqrt(d_in)."""
    variance: float
    """Mean squared distance of raw rows to `mean`, the denominator of FVU."""
    rows_per_epoch: int
    batch_size: int

    def __len__(self) -> int:
        """Batches in the whole stream, all epochs together."""
        ...

    def batches(self, start: int) -> Iterator[Tensor]:
        """Batches [batch_size, d_in] from number `start` on, exactly as an uninterrupted stream gives them."""
        ...


class Worker(Protocol):
    """The process that a pack runs in: its device, its checkpoints, its way to be seen."""

    device: torch.device

    def load_checkpoint(self) -> bytes | None:
        """The last complete checkpoint of this pack, or None."""
        ...

    def save_checkpoint(self, step: int, data: bytes) -> None:
        """Keep `data` in place of the one before; may return before it is written."""
        ...

    def report(self, progress: Progress) -> None:
        """Show progress; called every few steps."""
        ...


class Progress(NamedTuple):
    """What a pack says of itself while it trains."""

    step: int
    steps: int
    tokens_per_second: float
    latest: dict[str, dict[str, float]]
    """SAE id -> the newest point of its history."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One SAE to be trained in a pack."""

    id: str
    config: Any
    train: TrainConfig
    d_sae: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """A trained SAE: weights folded for raw activations, and how they came about."""

    member: Member
    sae: Sae
    weights: dict[str, Tensor]
    """Folded: raw inputs, unit decoder rows, float32 on the CPU."""
    history: dict[str, list[float]]
    steps: int
    tokens: int
    seconds: float
    dead_in_window: float
    """Share of features that did not fire in the last `dead_window` training tokens."""
    scale: float
    """The factor that gave centred rows the mean norm sqrt(d_in)."""


@dataclass(kw_only=True, slots=True)
class _Slot:
    """A member with its optimiser and counters."""

    member: Member
    sae: Sae
    optimizer: torch.optim.Adam
    since_fired: Tensor
    history: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in HISTORY})
    seconds: float = 0.0
    diverged: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Diverged:
    """An SAE whose loss stopped being finite; the others of its pack go on without it."""

    member: Member
    step: int

    @property
    def reason(self) -> str:
        """For the user: what happened and what to change."""
        return f"the loss was not finite at step {self.step}; lower train.lr (now {self.member.train.lr:g})"


def train(members: Sequence[Member], source: Source, worker: Worker) -> list[Trained | Diverged]:
    """Train every member on the same stream, resuming from the worker's last checkpoint.

    All members share one `batch_size`, `epochs` and `seed` (those of `source`); the rest may differ. The result has
    one entry per member, in order.
    """
    slots = [_make_slot(member, source, worker.device) for member in members]
    start, data = 0, worker.load_checkpoint()
    if data is not None:
        start = _restore(slots, data)
    loop = _Loop(slots, source, worker)
    loop.run(start)
    return [_finish(slot, source) for slot in slots]  # in the order of `members`


def lr_scale(step: int, steps: int, config: TrainConfig) -> float:
    """Share of the peak learning rate at `step`: linear warm-up, plateau, linear decay to 0 after the last step."""
    warmup, decay = round(config.lr_warmup * steps), round(config.lr_decay * steps)
    rise = (step + 1) / warmup if step < warmup else 1.0
    fall = (steps - step) / decay if decay and step >= steps - decay else 1.0
    return min(rise, fall)


def l1_scale(step: int, steps: int, config: TrainConfig) -> float:
    """Share of the L1 coefficient at `step`: linear from 0 over the warm-up."""
    warmup = round(config.l1_warmup * steps)
    return min(1.0, step / warmup) if warmup else 1.0


def dead_window(config: TrainConfig, rows_per_epoch: int) -> int:
    """Training tokens without firing after which a feature counts as dead."""
    return config.dead_window or min(MAX_DEAD_WINDOW, max(1, rows_per_epoch // 2))


class _Loop:
    """Steps, reports and checkpoints of one pack."""

    def __init__(self, slots: Sequence[_Slot], source: Source, worker: Worker) -> None:
        self.slots, self.source, self.worker = slots, source, worker
        self.steps = len(source)
        self.mean = source.mean.to(worker.device)
        self.saved_at = self.started_at = time.monotonic()
        self.every = slots[0].member.train.checkpoint_every

    def run(self, start: int) -> None:
        for step, raw in enumerate(self.source.batches(start), start=start):
            x = raw.to(self.worker.device, non_blocking=True).float()
            x = (x - self.mean) * self.source.scale
            for slot in self.slots:
                if slot.diverged is not None:
                    continue
                began = time.perf_counter()
                losses = self._step(slot, x, step)
                if self._reports(slot, step):
                    self._record(slot, losses, step)
                slot.seconds += time.perf_counter() - began
            self._after(step, start)
        if self.worker.device.type == "cuda":
            # Kernels run behind the calls that launch them, so only the pack's time is known; members share it evenly.
            torch.cuda.synchronize(self.worker.device)
            for slot in self.slots:
                slot.seconds = (time.monotonic() - self.started_at) / len(self.slots)

    def _reports(self, slot: _Slot, step: int) -> bool:
        return step % slot.member.train.report_every == 0 or step == self.steps - 1

    def _step(self, slot: _Slot, x: Tensor, step: int) -> Losses:
        config, sae = slot.member.train, slot.sae
        for group in slot.optimizer.param_groups:
            group["lr"] = config.lr * lr_scale(step, self.steps, config)
        dead = None
        if sae.uses_dead:
            dead = slot.since_fired >= dead_window(config, self.source.rows_per_epoch)
            dead = dead if bool(dead.any()) else None
        context = StepContext(l1_scale=l1_scale(step, self.steps, config), dead=dead)
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=config.dtype == "bfloat16"):
            losses = sae.loss(x, context)
        slot.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        if config.clip:
            torch.nn.utils.clip_grad_norm_(sae.parameters(), config.clip)
        sae.before_step()
        slot.optimizer.step()
        sae.after_step()
        fired = (losses.features > 0).any(0)
        slot.since_fired = torch.where(fired, 0, slot.since_fired + len(x))
        return losses

    def _record(self, slot: _Slot, losses: Losses, step: int) -> None:
        mse = float(losses.mse)
        values = {
            "step": step,
            "tokens": (step + 1) * self.source.batch_size,
            "loss": float(losses.total.detach()),
            "mse": mse,
            "sparsity": float(losses.sparsity),
            "l0": float((losses.features > 0).sum()) / len(losses.features),
            "fvu": mse / (self.source.scale**2 * self.source.variance),
            "lr": slot.optimizer.param_groups[0]["lr"],
        }
        if not math.isfinite(values["loss"]):
            slot.diverged = step
            return
        for name, value in values.items():
            slot.history[name].append(value)

    def _after(self, step: int, start: int) -> None:
        """Report where a point was recorded; checkpoint when it is time, and at the end."""
        now = time.monotonic()
        if any(self._reports(slot, step) for slot in self.slots):
            rate = (step + 1 - start) * self.source.batch_size / max(now - self.started_at, 1e-9)
            latest = {s.member.id: {n: s.history[n][-1] for n in HISTORY} for s in self.slots if s.history["step"]}
            self.worker.report(Progress(step + 1, self.steps, rate, latest))
        if now - self.saved_at >= self.every and step + 1 < self.steps:
            self.worker.save_checkpoint(step + 1, _state(self.slots, step + 1))
            self.saved_at = now


def _make_slot(member: Member, source: Source, device: torch.device) -> _Slot:
    sae = make_sae(member.config, source.mean.numel(), member.d_sae)
    sae.initialise_(member.train.seed)
    sae.to(device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=member.train.lr, betas=member.train.betas, fused=True)
    since = torch.zeros(member.d_sae, dtype=torch.int64, device=device)
    return _Slot(member=member, sae=sae, optimizer=optimizer, since_fired=since)


def _state(slots: Sequence[_Slot], step: int) -> bytes:
    """Everything that the remaining steps depend on: weights, Adam's moments, dead counters, history, position."""
    tensors: dict[str, Tensor] = {}
    for i, slot in enumerate(slots):
        tensors[f"{i}/since_fired"] = slot.since_fired
        for name, parameter in slot.sae.named_parameters():
            tensors[f"{i}/{name}"] = parameter
            for key, value in slot.optimizer.state[parameter].items():
                tensors[f"{i}/{name}/{key}"] = value
    fields = {
        "step": step,
        "ids": [slot.member.id for slot in slots],
        "history": [slot.history for slot in slots],
        "seconds": [slot.seconds for slot in slots],
        "diverged": [slot.diverged for slot in slots],
    }
    return pack_state(tensors, fields)


def _restore(slots: Sequence[_Slot], data: bytes) -> int:
    """Put a checkpoint into `slots`; returns the step to go on from, 0 where it lacks one of them.

    It may hold more SAEs than are asked for: those of the pack that stand already.
    """
    tensors, fields = unpack_state(data)
    if any(slot.member.id not in fields["ids"] for slot in slots):
        return 0
    for slot in slots:
        i = fields["ids"].index(slot.member.id)
        device = slot.since_fired.device
        slot.since_fired = tensors[f"{i}/since_fired"].to(device)
        slot.history, slot.seconds = fields["history"][i], fields["seconds"][i]
        slot.diverged = fields["diverged"][i]
        for name, parameter in slot.sae.named_parameters():
            with torch.no_grad():
                parameter.copy_(tensors[f"{i}/{name}"])
            prefix = f"{i}/{name}/"
            slot.optimizer.state[parameter] = {
                key.removeprefix(prefix): value.to(device) for key, value in tensors.items() if key.startswith(prefix)
            }
    return int(fields["step"])


def _finish(slot: _Slot, source: Source) -> Trained | Diverged:
    if slot.diverged is not None:
        return Diverged(member=slot.member, step=slot.diverged)
    window = dead_window(slot.member.train, source.rows_per_epoch)
    return Trained(
        member=slot.member,
        sae=slot.sae,
        weights=slot.sae.fold(source.mean, source.scale),
        history=slot.history,
        steps=len(source),
        tokens=len(source) * source.batch_size,
        seconds=slot.seconds,
        dead_in_window=float((slot.since_fired >= window).double().mean()),
        scale=source.scale,
    )
