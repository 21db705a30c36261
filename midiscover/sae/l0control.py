"""Steering the sparsity so that training ends at a given L0, in tensors: no step waits for a GPU."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from midiscover.sae.base import Sae

SMOOTHING = 0.1
"""Weight of the newest batch in the running L0; at least `SMOOTHED` over the number of steps, or the running L0 of a
short run would lag behind what it is to steer."""
SMOOTHED = 20
APPROACH = 0.5
"""Share of the steps over which the L0 asked for falls from where it starts to the target."""
PROPORTIONAL = 0.5
GAIN = 12.0
"""How far, in units of log(L0 / asked), the log coefficient moves over a whole run of constant error."""
SHIFT = 0.05
"""How far a step moves all thresholds, in units of pre-activations, for an error of 1 in log L0; at least `SHIFTED`
over the number of steps, so that those of a short run together reach as far."""
SHIFTED = 5
END = 0.8
"""Share of the steps after which penalties that set the L0 by their coefficient are helped out by the biases."""


class L0Control(ABC):
    """What both ways of steering share: the running L0, and the range of L0 that is asked for at a step.

    What is asked at most falls geometrically from the L0 found at the first controlled step to the target, so that
    nothing winds up while an SAE is still dense, which would kill its features. What is asked at least is the target.
    """

    shifts_from: ClassVar[float] = 0.0
    """Share of the steps after which all features are made rarer or commoner by a shift, as well as by the penalty."""
    least: ClassVar[float] = 0.0
    """The smallest coefficient that is begun with."""

    def __init__(self, start: float, target: float, *, steps: int, first: int, device: torch.device) -> None:
        """start: the coefficient to begin with; first: step of the first correction, after the warm-up of it."""
        self.target, self.steps, self.first = target, steps, first
        self.smoothing, self.shift = min(1.0, max(SMOOTHING, SMOOTHED / steps)), max(SHIFT, SHIFTED / steps)
        start = max(start, self.least)
        self.state = torch.tensor([math.log(start) if start else 0.0, 0.0, 0.0, start], device=device)
        """[4]: the integral, the running log L0, log L0 at the first correction, the coefficient."""

    def coefficient(self) -> Tensor:
        """The coefficient of the coming step, a scalar tensor."""
        return self.state[3]

    def observe(self, sae: Sae, l0: Tensor, step: int) -> None:
        """Take the L0 of a step's batch, a scalar, into account; may change `sae`."""
        log_l0 = torch.log(l0 + 1e-2)
        integral, previous, begin, coefficient = self.state
        running = log_l0 if step == 0 else previous + self.smoothing * (log_l0 - previous)
        if step <= self.first:
            begin = running
        else:
            goal = math.log(self.target)
            share = min(1.0, (step - self.first) / max(1.0, APPROACH * self.steps))
            asked = (1 - share) * begin.clamp(min=goal) + share * goal
            error = ((running - asked).clamp(min=0) - (goal - running).clamp(min=0)).clamp(-1, 1)
            integral, coefficient = self.corrected(error, integral, coefficient)
            if step >= self.shifts_from * self.steps:
                sae.make_rarer_(self.shift * error)
        self.state = torch.stack([integral, running, begin, coefficient])

    @abstractmethod
    def corrected(self, error: Tensor, integral: Tensor, coefficient: Tensor) -> tuple[Tensor, Tensor]:
        """The new integral and coefficient for an error of log L0, at most 1."""


class CoefficientControl(L0Control):
    """A PI controller of log(coefficient), for penalties whose L0 settles at a level of its own for each (L1).

    What it still misses towards the end, when the weights hardly follow a coefficient any more, all biases make up by
    one shift, which a learning rate that falls to 0 leaves in place.
    """

    shifts_from = END
    least = 1e-2  # it is the logarithm that is steered

    def corrected(self, error: Tensor, integral: Tensor, coefficient: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        integral = integral + GAIN / self.steps * error
        return integral, torch.exp(integral + PROPORTIONAL * error)


class ThresholdControl(L0Control):
    """Moves the thresholds of a JumpReLU SAE, all by the same, and leaves the coefficient alone.

    Through its coefficient L0 can't be steered in a short run: a penalty moves thresholds at Adam's pace, so that L0 is
    its integral over time and swings.
    """

    def corrected(self, error: Tensor, integral: Tensor, coefficient: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        return integral, coefficient
