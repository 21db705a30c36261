"""One SAE in training: its weights, its optimiser, its counters, and one step of it.

`train.py` steps many of them on one stream; each sees only its own state, so that its weights do not depend on who
shares its pack.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from midiscover.config import TrainConfig
from midiscover.sae.base import Dead, Normalisation, Sae, StepContext
from midiscover.sae.l0control import CoefficientControl, L0Control, ThresholdControl
from midiscover.sae.registry import make_sae
from midiscover.sae.replay import Replayed
from midiscover.sae.resample import resample_
from midiscover.sae.schedule import aux_window, dead_window, l1_scale, lr_scale, peak_lr, resampling_steps
from midiscover.sae.update import HalvedUpdate, make_update
from midiscover.saeconfig import UNSTEPPED_CONTROLS, JumpReluConfig, PenaltyConfig, SaeConfig


class Group(Protocol):
    """Processes that train the same SAEs together: each takes its share of every batch, and all take the same step."""

    rank: int
    size: int

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Put in the place of each tensor its mean over the processes, the same bits in all of them."""
        ...

    def any(self, mask: Tensor) -> Tensor:
        """Where a bool tensor is true in any of the processes."""
        ...


ASKED_EVERY = 16
"""Steps after which a GPU is asked again how many features are dead."""
FEWEST_COLUMNS = 1024
"""Dead features for which a recorded step has room at least: kernels are compiled for each such number."""
HISTORY = ("step", "tokens", "loss", "mse", "sparsity", "l0", "fvu", "lr", "coefficient")


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One SAE to be trained in a pack."""

    id: str
    config: SaeConfig
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
    dead_in_window: float | None
    """Share of features that did not fire in the last `dead_window` training tokens; None where there were fewer."""
    scale: float
    """The factor that gave centred rows the mean norm sqrt(d_in)."""
    output_scale: float
    """The same for the rows that are reconstructed; `scale` but for transcoders."""
    output_mean: Tensor
    """[d_out] float32, of the raw rows that are reconstructed."""
    lr: float
    """Peak learning rate."""
    coefficient: float
    """The sparsity coefficient, where it was steered to at the end; 0 where there is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Diverged:
    """An SAE whose loss stopped being finite; the others of its pack go on without it."""

    member: Member
    step: int
    lr: float

    @property
    def reason(self) -> str:
        """For the user: what happened and what to change."""
        return f"the loss was not finite at step {self.step}; lower train.lr (it was {self.lr:g})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Retired:
    """An SAE that was dropped because another of its pack was better at L0 and FVU alike."""

    member: Member
    step: int
    by: str
    """Id of the other."""


class Point(NamedTuple):
    """What a step's loss came to on the whole batch; scalar tensors, so that no step waits for a GPU."""

    total: Tensor
    mse: Tensor
    sparsity: Tensor
    l0: Tensor


class Slot:
    """A member with everything that changes while it trains."""

    def __init__(
        self,
        member: Member,
        inputs: Normalisation,
        outputs: Normalisation,
        *,
        rows_per_epoch: int,
        steps: int,
        device: torch.device,
        group: Group | None = None,
    ) -> None:
        self.member, self.inputs, self.outputs, self.steps, self.group = member, inputs, outputs, steps, group
        config, train = member.config, member.train
        self.unstepped = config.control in UNSTEPPED_CONTROLS
        if config.control == "neurons" and isinstance(config, PenaltyConfig):
            config = replace(config, initial_density=None)  # the neurons as they are
        with device:
            sae = make_sae(config, inputs.mean.numel(), member.d_sae, outputs.mean.numel())
        sae.initialise_(train.seed)
        if config.control == "neurons":
            sae.initialise_neurons_()
        else:
            sae.uncentre_(inputs.scale * inputs.mean)
        sae.W_dec.requires_grad_(config.control != "frozen_decoder")
        self.sae = sae
        self.lr = peak_lr(train, d_sae=member.d_sae, steps=steps)
        halved = train.dtype == "bfloat16" and group is None
        self.update = make_update(sae, lr=self.lr, betas=train.betas, halved=halved)
        self.weight = torch.zeros((), device=device)
        self.records = isinstance(self.update, HalvedUpdate) and device.type == "cuda"
        self.recordings: dict[int, Replayed] = {}
        self.window = dead_window(train, rows_per_epoch)
        self.aux_window = aux_window(train, self.window, rows_per_epoch)
        self.since_fired = torch.zeros(member.d_sae, dtype=torch.int64, device=device)
        self.dead_at_most = self.known_before = 0
        self.history: dict[str, list[float]] = {name: [] for name in HISTORY}
        self.seconds = 0.0
        self.diverged: int | None = None
        self.retired: tuple[int, str] | None = None
        self.control: L0Control | None = None
        if isinstance(config, PenaltyConfig) and config.target_l0 is not None:
            first = round(train.l1_warmup * steps)
            kind = ThresholdControl if isinstance(config, JumpReluConfig) else CoefficientControl
            self.control = kind(sae.coefficient, config.target_l0, steps=steps, first=first, device=device)
        self.resample_steps = resampling_steps(train, steps)

    @property
    def learns(self) -> bool:
        """Whether this member takes steps: controls without training do not, and none that has ended."""
        return not self.unstepped and self.diverged is None and self.retired is None

    def coefficient(self) -> float | Tensor:
        """The sparsity coefficient of the coming step, without its warm-up."""
        return self.sae.coefficient if self.control is None else self.control.coefficient()

    def step(self, x: Tensor, y: Tensor, step: int) -> Point:
        """One step of Adam on a normalised batch: x [tokens, d_in], y [tokens, d_out]."""
        config = self.member.train
        self.resample(x, y, step)
        weight = self.coefficient() * l1_scale(step, self.steps, config)
        self.update.prepare(self.lr * lr_scale(step, self.steps, config))
        dead_at_most = self._dead_at_most(step, len(x))
        if self.records:
            self.weight.copy_(weight) if isinstance(weight, Tensor) else self.weight.fill_(weight)
            replayed = self._recording(dead_at_most)
            point = Point(*replayed(x) if y is x else replayed(x, y))
        else:
            point = self._take(x, y, weight, dead_at_most)
        self.observe(point, step)
        return point

    def _recording(self, dead_at_most: int) -> Replayed:
        """Of steps with so many columns for dead features."""
        if dead_at_most not in self.recordings:
            me = weakref.proxy(self)  # no circle that would keep a card's memory until a garbage collection
            self.recordings[dead_at_most] = Replayed(
                lambda x, y=None: me._take(x, x if y is None else y, me.weight, dead_at_most)
            )
        return self.recordings[dead_at_most]

    def resample(self, x: Tensor, y: Tensor, step: int) -> None:
        """Point dead features elsewhere where it is time for it."""
        if step in self.resample_steps:
            moments, seed = self.update.moments, self.member.train.seed + step
            if resample_(self.sae, moments, self.since_fired, x, y, window=self.window, seed=seed):
                self.update.changed()

    def observe(self, point: Point, step: int) -> None:
        """Let what steers L0 see where it is."""
        if self.control is not None:
            self.control.observe(self.sae, point.l0, step)

    def _take(self, x: Tensor, y: Tensor, weight: float | Tensor, dead_at_most: int) -> Point:
        """A step on the device, which does not wait for it."""
        config, sae = self.member.train, self.sae
        dead = Dead(self.since_fired >= self.aux_window, dead_at_most) if dead_at_most else None
        context = StepContext(sparsity=weight, dead=dead, mean=self._mean if self.group else None)
        # Its cache of cast weights is one for all threads, and whichever leaves its autocast empties it: a step's
        # gradients would be summed in one precision or the other, as the steps beside it happen to end.
        halves = torch.autocast(
            x.device.type,
            dtype=torch.bfloat16,
            enabled=config.dtype == "bfloat16",
            cache_enabled=x.device.type != "cpu",
        )
        with self.update.computing(), halves:
            losses = sae.loss(self._share(x), self._share(y), context)
        losses.total.backward()
        fired = losses.code.fired()
        point = Point(losses.total.detach(), losses.mse.detach(), losses.sparsity.detach(), losses.code.l0())
        if self.group is not None:
            point, fired = Point(*(value.float().clone() for value in point)), self.group.any(fired)
            self.group.mean_([*point, *self.update.gradients()])
        self.update.step(config.clip)
        self.since_fired.add_(len(x)).masked_fill_(fired, 0)
        return point

    def _share(self, rows: Tensor) -> Tensor:
        """This process's rows of a batch."""
        if self.group is None:
            return rows
        count = len(rows) // self.group.size
        return rows[self.group.rank * count : (self.group.rank + 1) * count]

    def _mean(self, value: Tensor) -> Tensor:
        """Over the processes; of a value without gradient."""
        assert self.group is not None
        value = value.float().clone()
        self.group.mean_([value])
        return value

    def _dead_at_most(self, step: int, batch_size: int) -> int:
        """Features that may count as dead in a step; 0 where nothing asks for them.

        Asking waits for the device: until the longest silent one can be dead nobody does, and where steps are recorded
        one answer, made a round number so that recordings serve again, holds for several; for no more than half of the
        window, or features that have only just fired would count.
        """
        if not self.sae.uses_dead or step < self.known_before:
            return self.dead_at_most
        ahead = min(ASKED_EVERY, max(1, self.aux_window // (2 * batch_size))) if self.records else 1
        alive = int(self.aux_window - 1 - self.since_fired.max()) // batch_size + 1
        if alive >= ahead:
            self.dead_at_most, self.known_before = 0, step + alive
            return 0
        count = int((self.since_fired >= self.aux_window - (ahead - 1) * batch_size).sum())
        if self.records:
            count = min(self.member.d_sae, max(FEWEST_COLUMNS, 1 << (count - 1).bit_length()))
        self.dead_at_most, self.known_before = count, step + ahead
        return count

    def record(self, point: Point, step: int, batch_size: int) -> None:
        """A point of the loss curve; where the loss is not finite, the end of this SAE."""
        mse = float(point.mse)
        values = {
            "step": step,
            "tokens": (step + 1) * batch_size,
            "loss": float(point.total),
            "mse": mse,
            "sparsity": float(point.sparsity),
            "l0": float(point.l0),
            "fvu": mse / (self.outputs.scale**2 * self.outputs.variance),
            "lr": self.update.lr,
            "coefficient": float(self.coefficient()),
        }
        if not math.isfinite(values["loss"]):
            self.diverged = step
            return
        for name, value in values.items():
            self.history[name].append(value)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the remaining steps depend on: tensors by name, and plain fields."""
        tensors = {"since_fired": self.since_fired}
        tensors |= {f"sae/{name}": value for name, value in self.sae.state_dict().items()}
        for name, parameter in self.sae.named_parameters():
            tensors |= {f"adam/{name}/{key}": value for key, value in self.update.moments.get(parameter, {}).items()}
        if self.control is not None:
            tensors["control"] = self.control.state
        ended = {"diverged": self.diverged, "retired": self.retired}
        return tensors, {"id": self.member.id, "history": self.history, "seconds": self.seconds} | ended

    def restore(self, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> None:
        """Take up a state that `state` gave."""
        device = self.since_fired.device
        self.since_fired = tensors["since_fired"].to(device)
        self.history, self.seconds, self.diverged = fields["history"], fields["seconds"], fields["diverged"]
        asked = self.member.train.retire_after is not None
        self.retired = tuple(fields["retired"]) if asked and fields["retired"] else None
        self.sae.load_state_dict({k.removeprefix("sae/"): v for k, v in tensors.items() if k.startswith("sae/")})
        for name, parameter in self.sae.named_parameters():
            prefix = f"adam/{name}/"
            held = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            if held:
                self.update.take_up(parameter, held)
        self.update.changed()
        if self.control is not None:
            self.control.state = tensors["control"].to(device)

    def _dead_in_window(self, tokens: int) -> float | None:
        """After `tokens` training tokens: a window that is longer has seen no feature silent all along."""
        return float((self.since_fired >= self.window).double().mean()) if tokens >= self.window else None

    def finish(self, tokens: int) -> Trained | Diverged | Retired:
        """What became of the member, after `tokens` training tokens."""
        if self.diverged is not None:
            return Diverged(member=self.member, step=self.diverged, lr=self.lr)
        if self.retired is not None:
            return Retired(member=self.member, step=self.retired[0], by=self.retired[1])
        return Trained(
            member=self.member,
            sae=self.sae,
            weights=self.sae.fold(self.inputs, self.outputs),
            history=self.history,
            steps=0 if self.unstepped else self.steps,
            tokens=0 if self.unstepped else tokens,
            seconds=self.seconds,
            dead_in_window=self._dead_in_window(0 if self.unstepped else tokens),
            scale=self.inputs.scale,
            output_mean=self.outputs.mean,
            output_scale=self.outputs.scale,
            lr=self.lr,
            coefficient=float(self.coefficient()),
        )
