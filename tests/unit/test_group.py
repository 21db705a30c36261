"""Two processes that share every batch, against one that has all of it: gradients after a step, and whole trainings.

Real processes and real gloo; what is compared differs by the order of float32 sums alone.
"""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from jobs.group import TorchGroup
from midiscover.config import TrainConfig
from midiscover.member import Member, Slot
from midiscover.sae.base import Normalisation
from midiscover.saeconfig import GatedConfig, JumpReluConfig, StandardConfig, TopKConfig
from midiscover.train import Trained, train
from tests.workers import SilentWorker

D_IN, D_SAE, BATCH, STEPS = 12, 40, 64, 30
TRAIN = TrainConfig(batch_size=BATCH, epochs=1, lr=3e-3, report_every=1, dead_window=3 * BATCH)
MEMBERS = [
    Member(id=config.kind + suffix, config=config, train=replace(TRAIN, **train), d_sae=D_SAE)
    for config, suffix, train in (
        (StandardConfig(l1_coefficient=1.0), "", {}),
        (StandardConfig(target_l0=5), "-steered", {"resample_at": (0.5,), "clip": 1.0}),
        (GatedConfig(), "", {}),
        (JumpReluConfig(), "", {}),
        (TopKConfig(k=3), "", {}),
    )
]


class Rows:
    """A source of random rows with a few directions in them."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(0)
        directions = torch.randn(20, D_IN, generator=random)
        code = torch.rand(STEPS * BATCH, 20, generator=random) * (
            torch.rand(STEPS * BATCH, 20, generator=random) < 0.15
        )
        self.rows = code @ directions + 0.05 * torch.randn(STEPS * BATCH, D_IN, generator=random)
        mean = self.rows.mean(0)
        centred = self.rows - mean
        scale = D_IN**0.5 / float(centred.norm(dim=1).mean())
        self.inputs = self.outputs = Normalisation(mean, scale, float(centred.pow(2).sum(1).mean()))
        self.rows_per_epoch, self.batch_size = len(self.rows), BATCH

    def __len__(self) -> int:
        return STEPS

    def batches(self, start: int) -> Iterator[Tensor]:
        yield from self.rows.split(BATCH)[start:]


def first_gradients(group: TorchGroup | None) -> dict[str, Tensor]:
    """After one step in which some features count as dead, so that AuxK has a part in it."""
    source, found = Rows(), {}
    x = (source.rows[:BATCH] - source.inputs.mean) * source.inputs.scale
    for member in MEMBERS:
        slot = Slot(
            member,
            source.inputs,
            source.outputs,
            rows_per_epoch=source.rows_per_epoch,
            steps=STEPS,
            device=torch.device("cpu"),
            group=group,
        )
        slot.sae.calibrate_(x)
        slot.since_fired[::3] = 10**6
        slot.step(x, x, 0)
        for name, parameter in slot.sae.named_parameters():
            if parameter.grad is not None:
                found[f"{member.id}/{name}"] = parameter.grad.clone()
    return found


def whole(group: TorchGroup | None) -> dict[str, tuple[dict[str, Tensor], dict[str, list[float]]]]:
    """Weights and history of each member."""
    made = train(MEMBERS, Rows(), SilentWorker(), group)
    assert all(isinstance(one, Trained) for one in made)
    return {one.member.id: (one.weights, one.history) for one in made if isinstance(one, Trained)}


def _in_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    group = TorchGroup()
    told = group.from_first({"rank": rank})
    Path(folder, f"{rank}.pkl").write_bytes(pickle.dumps((told, first_gradients(group), whole(group))))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    folder = tmp_path_factory.mktemp("group")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_in_process, args=(rank, str(folder))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    return [pickle.loads((folder / f"{rank}.pkl").read_bytes()) for rank in range(2)]  # noqa: S301 - our own


def test_what_the_first_gives_all_have(both: list[tuple]) -> None:
    assert [told for told, _, _ in both] == [{"rank": 0}] * 2


def test_gradients_are_those_of_one_process_with_the_whole_batch(both: list[tuple]) -> None:
    alone = first_gradients(None)
    for _, shared, _ in both:
        assert shared.keys() == alone.keys()
        for name, gradient in alone.items():
            bound = 2e-6 * float(gradient.abs().max())
            assert torch.allclose(shared[name], gradient, rtol=2e-5, atol=bound), name


def test_both_processes_have_the_same_bits_all_the_time(both: list[tuple]) -> None:
    (_, _, first), (_, _, second) = both
    for name, (weights, history) in first.items():
        assert history == second[name][1], name
        for part, tensor in weights.items():
            assert torch.equal(tensor, second[name][0][part]), f"{name} {part}"


def test_a_whole_training_is_that_of_one_process(both: list[tuple]) -> None:
    alone = whole(None)
    for name, (_, history) in both[0][2].items():
        for what in ("loss", "mse", "sparsity", "l0", "coefficient"):
            ours, theirs = (torch.tensor(one[what]) for one in (history, alone[name][1]))
            assert torch.allclose(ours, theirs, rtol=2e-3, atol=1e-4), f"{name} {what}"
        assert torch.allclose(torch.tensor(history["loss"][:3]), torch.tensor(alone[name][1]["loss"][:3]), rtol=1e-5)
