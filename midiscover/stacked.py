"""Small L1 SAEs of a pack stepped together: batched products over all of them in place of many small calls.

A step of a small SAE takes longer to call than to compute. Their weights lie side by side in memory, each SAE's being
views, so that everything else sees them as ever. The gradients are written out; weights are those of SAEs stepped one
by one to the rounding of sums, no longer bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from midiscover.member import Point, Slot
from midiscover.sae.schedule import l1_scale, lr_scale
from midiscover.sae.standard import StandardSae
from midiscover.sae.update import adam_, rows_of

STACKED_BELOW = 2**23
"""Multiply-adds of x @ W_enc below which SAEs are stepped together. By measurement: tests/bench/stacked.py."""
PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")


class Stepper(Protocol):
    """Some members of a pack, stepped at once."""

    @property
    def slots(self) -> Sequence[Slot]:
        """Its members."""
        ...

    def step(self, x: Tensor, y: Tensor, step: int) -> list[Point]:
        """One step of each of its members on a normalised batch; a point for each."""
        ...


class Alone:
    """One member."""

    def __init__(self, slot: Slot) -> None:
        self.slots = (slot,)

    def step(self, x: Tensor, y: Tensor, step: int) -> list[Point]:
        return [self.slots[0].step(x, y, step)]


def steppers(slots: Sequence[Slot], batch_size: int, *, stack: bool) -> list[Stepper]:
    """Every slot once, in their order; where `stack` is asked for, those that can be stepped together are."""
    if not stack:
        return [Alone(slot) for slot in slots]
    found: list[Stepper] = []
    for alike, group in groupby(slots, lambda slot: _alike(slot, batch_size)):
        members = list(group)
        stacked = alike is not None and len(members) > 1
        found += [Stack(members)] if stacked else [Alone(slot) for slot in members]
    return found


def _alike(slot: Slot, batch_size: int) -> tuple[object, ...] | None:
    """What members must have in common to be stepped together; None for one that must be alone."""
    sae, config, train = slot.sae, slot.member.config, slot.member.train
    work = batch_size * sae.d_in * sae.d_sae
    plain = type(sae) is StandardSae and not sae.unit_decoder and config.control != "frozen_decoder"
    if not plain or slot.group is not None or train.dtype != "float32" or work >= STACKED_BELOW:
        return None
    return sae.d_sae, slot.lr, replace(train, retire_after=None), slot.steps


class Stack:
    """Plain L1 SAEs of one width and one learning rate."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = tuple(slots)
        self.rows = {
            name: torch.stack([rows_of(slot.sae.get_parameter(name).data) for slot in slots]) for name in PARAMETERS
        }
        self.moments = {name: self._moments(name) for name in PARAMETERS}
        self.taken = {name: held["step"].expand(len(slots)).clone() for name, held in self.moments.items()}
        self.since_fired = torch.stack([slot.since_fired for slot in slots])
        for i, slot in enumerate(slots):
            slot.since_fired = self.since_fired[i]
            for name in PARAMETERS:
                parameter, held = slot.sae.get_parameter(name), self.moments[name]
                parameter.data = _placed(self.rows[name][i], name)
                own = {key: _placed(held[key][i], name) for key in ("exp_avg", "exp_avg_sq")}
                slot.update.moments[parameter] = {"step": self.taken[name][i]} | own

    def _moments(self, name: str) -> dict[str, Tensor]:
        """Of one parameter of all: they have taken as many steps."""
        held = [slot.update.moments.get(slot.sae.get_parameter(name)) for slot in self.slots]
        rows = self.rows[name]
        found = {name: torch.zeros_like(rows) for name in ("exp_avg", "exp_avg_sq")}
        found["step"] = torch.zeros((), device=rows.device)
        for i, state in enumerate(held):
            if state is not None:
                found["step"].copy_(state["step"])
                for key in ("exp_avg", "exp_avg_sq"):
                    found[key][i].copy_(rows_of(state[key]))
        return found

    @torch.no_grad()
    def step(self, x: Tensor, y: Tensor, step: int) -> list[Point]:
        """As `Slot.step` for each; y is x."""
        train = self.slots[0].member.train
        for slot in self.slots:
            slot.resample(x, y, step)
        scale = l1_scale(step, self.slots[0].steps, train)
        weights = torch.stack([torch.as_tensor(slot.coefficient() * scale, device=x.device) for slot in self.slots])
        points, gradients, fired = self._losses(x, weights.float())
        if train.clip:
            _clip_each(gradients, train.clip)
        for slot in self.slots:
            slot.update.prepare(slot.lr * lr_scale(step, slot.steps, train))
        self._adam(gradients)
        self.since_fired.add_(len(x)).masked_fill_(fired, 0)
        for slot, point in zip(self.slots, points, strict=True):
            slot.observe(point, step)
        return points

    def _losses(self, x: Tensor, weights: Tensor) -> tuple[list[Point], dict[str, Tensor], Tensor]:
        """Points, gradients by parameter, and [saes, d_sae] which features fired; weights: [saes] of the penalty."""
        encoder, decoder, b_dec = self.rows["W_enc"], self.rows["W_dec"], self.rows["b_dec"][:, None]
        tokens = len(x)
        centred = x - b_dec
        features = torch.baddbmm(self.rows["b_enc"][:, None], centred, encoder.mT).relu_()
        fires = features > 0
        error = torch.baddbmm(b_dec, features, decoder).sub_(x)
        mse = error.square().sum((1, 2)) / tokens
        norms, sums = torch.linalg.vector_norm(decoder, dim=2), features.sum(1)
        penalty = (sums * norms).sum(1) / tokens
        share = weights[:, None] / tokens
        back = error.mul_(2 / tokens)
        by_norms = torch.where(norms > 0, share * sums / norms, 0)
        by_decoder = torch.baddbmm(decoder * by_norms[..., None], features.mT, back)
        by_features = torch.baddbmm((share * norms)[:, None], back, decoder.mT).mul_(fires)
        by_bias = by_features.sum(1)
        gradients = {
            "W_enc": by_features.mT @ centred,
            "b_enc": by_bias,
            "W_dec": by_decoder,
            "b_dec": back.sum(1) - (by_bias[:, None] @ encoder)[:, 0],
        }
        l0 = fires.sum((1, 2)) / tokens
        columns = (mse + weights * penalty, mse, penalty, l0)
        return [Point(*values) for values in zip(*columns, strict=True)], gradients, fires.any(1)

    def _adam(self, gradients: dict[str, Tensor]) -> None:
        update = self.slots[0].update
        rows, grads = ([held[name] for name in PARAMETERS] for held in (self.rows, gradients))
        adam_(rows, grads, [self.moments[name] for name in PARAMETERS], lr=update.lr, betas=update.betas)
        for name, taken in self.taken.items():
            taken.copy_(self.moments[name]["step"])


def _clip_each(gradients: dict[str, Tensor], most: float) -> None:
    """Scale the gradients of each SAE to the norm `most` where they are longer, as PyTorch does."""
    squares = [grad.flatten(1).square().sum(1) for grad in gradients.values()]
    factors = (most / (torch.stack(squares).sum(0).sqrt() + 1e-6)).clamp(max=1.0)
    if bool((factors < 1).any()):
        for grad in gradients.values():
            grad.mul_(factors.view(-1, *[1] * (grad.ndim - 1)))


def _placed(row: Tensor, name: str) -> Tensor:
    """The inverse of `rows_of`."""
    return row.T if name == "W_enc" else row
