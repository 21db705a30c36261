"""Small SAEs stepped together against the same SAEs stepped one by one: the loss by autograd, Adam by parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from midiscover.config import TrainConfig
from midiscover.member import Slot
from midiscover.sae.base import Normalisation
from midiscover.saeconfig import SaeConfig, StandardConfig, TopKConfig
from midiscover.stacked import Stack
from midiscover.train import Diverged, Member, Retired, Trained, train
from tests.unit.test_train import BATCH, D_IN, ROWS, MemorySource
from tests.workers import MemoryWorker

TRAIN = TrainConfig(batch_size=BATCH, epochs=3, lr=1e-2, report_every=4, checkpoint_every=1e-9, resample_at=(0.5,))
GRID = (StandardConfig(l1_coefficient=0.1), StandardConfig(l1_coefficient=1.0), StandardConfig(target_l0=4.0))


def members(configs: Sequence[SaeConfig] = GRID, settings: TrainConfig = TRAIN) -> list[Member]:
    return [Member(id=str(i), config=config, train=settings, d_sae=24) for i, config in enumerate(configs)]


def rows() -> torch.Tensor:
    return torch.randn(ROWS, D_IN, generator=torch.Generator().manual_seed(1)) * 2 + 1


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many SAEs each stack was made of."""
    sizes: list[int] = []
    begin = Stack.__init__

    def noted(self: Stack, slots: Sequence) -> None:
        sizes.append(len(slots))
        begin(self, slots)

    monkeypatch.setattr(Stack, "__init__", noted)
    return sizes


def run(
    which: Sequence[Member], worker: MemoryWorker | None = None, *, stack: bool
) -> list[Trained | Diverged | Retired]:
    return train(which, MemorySource(rows()), worker or MemoryWorker(), stack=stack)


def test_weights_and_curves_are_those_of_single_steps(made: list[int]) -> None:
    together, apart = run(members(), stack=True), run(members(), stack=False)
    assert made == [3]
    for one, two in zip(together, apart, strict=True):
        assert isinstance(one, Trained)
        assert isinstance(two, Trained)
        for name, value in two.weights.items():
            torch.testing.assert_close(one.weights[name], value, rtol=1e-4, atol=1e-5)
        for name, curve in two.history.items():
            assert one.history[name] == pytest.approx(curve, rel=1e-4, abs=1e-5)
        assert one.dead_in_window == two.dead_in_window


def test_one_step_is_the_same_to_the_last_digits() -> None:
    """Before anything can grow: gradients in closed form against autograd's, Adam for all against Adam for each."""
    x, unit = rows()[:64], Normalisation(torch.zeros(D_IN), 1.0, float(D_IN))
    apart, together = (
        [
            Slot(member, unit, unit, rows_per_epoch=ROWS, steps=100, device=torch.device("cpu"))
            for member in members(settings=replace(TRAIN, lr=1e-3, clip=0.5, lr_warmup=0))
        ]
        for _ in range(2)
    )
    for slot in (*apart, *together):
        slot.sae.calibrate_(x)
    points = Stack(together).step(x, x, 0)
    for one, two, point in zip(together, apart, points, strict=True):
        want = two.step(x, x, 0)
        assert [float(value) for value in point] == pytest.approx([float(value) for value in want], rel=1e-6)
        for name, value in two.sae.named_parameters():
            assert float((one.sae.get_parameter(name) - value).detach().abs().max()) <= 1e-6
        for parameter, state in two.update.moments.items():
            name = next(name for name, own in two.sae.named_parameters() if own is parameter)
            held = one.update.moments[one.sae.get_parameter(name)]
            assert all(torch.allclose(held[key], value, rtol=1e-4, atol=1e-8) for key, value in state.items())


def test_a_resumed_stack_equals_the_uninterrupted_one_bit_for_bit() -> None:
    whole = run(members(), stack=True)
    stopped = MemoryWorker(stop_at=17)
    with pytest.raises(KeyboardInterrupt):
        run(members(), stopped, stack=True)
    again = run(members(), MemoryWorker(data=stopped.data), stack=True)
    for one, two in zip(again, whole, strict=True):
        assert isinstance(one, Trained)
        assert isinstance(two, Trained)
        assert all(torch.equal(one.weights[name], value) for name, value in two.weights.items())


def test_what_is_not_alike_is_stepped_alone(made: list[int]) -> None:
    others = [
        GRID[0],
        GRID[1],
        StandardConfig(l1_coefficient=2.0, decoder="unit_norm"),
        StandardConfig(l1_coefficient=3.0, control="frozen_decoder"),
        TopKConfig(k=3),
    ]
    run(members(others), stack=True)
    assert made == [2]
    made.clear()
    run(members([GRID[0], TopKConfig(k=3), GRID[1]]), stack=True)
    assert made == []
    run(members(settings=replace(TRAIN, dtype="bfloat16")), stack=True)
    assert made == []


def test_what_is_left_of_a_stack_goes_on(made: list[int]) -> None:
    """One diverges: its learning rate is another's, its loss becomes infinite."""
    wild = [replace(member, train=replace(TRAIN, lr=1e30)) if member.id == "1" else member for member in members()]
    found = run(wild, stack=True)
    assert [type(one) for one in found] == [Trained, Diverged, Trained]
    assert made == [2], "of the two that were neighbours once the third was gone"
