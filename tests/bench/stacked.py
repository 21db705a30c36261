"""Small L1 SAEs of a pack: stepped together beside one by one, on planted activations.

    python -m tests.bench.stacked [--saes 8] [--threads 2] [--repeats 3]

In turn, on the same rows; a step is one of the whole pack. The bound is what the products of all its SAEs take at the
rate at which this machine multiplies matrices of their shape. Judges nothing: the exit code is 0.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence

import torch
from rich.table import Table
from torch import Tensor

from midiscover import tables
from midiscover.config import TrainConfig
from midiscover.member import Member, Slot
from midiscover.sae.base import Normalisation
from midiscover.saeconfig import StandardConfig
from midiscover.stacked import Alone, Stack, Stepper
from tests.bench.harvest import machine

SHAPES = ((32, 128, 256), (48, 192, 1024), (64, 512, 1024), (128, 1024, 1024))
"""d_in, d_sae, tokens."""
STEPS = 30


def slots(d_in: int, d_sae: int, tokens: int, count: int) -> list[Slot]:
    """SAEs of a grid of L1 coefficients, before their first step."""
    unit = Normalisation(torch.zeros(d_in), 1.0, float(d_in))
    train = TrainConfig(batch_size=tokens, lr=1e-3)
    return [
        Slot(
            Member(id=str(i), config=StandardConfig(l1_coefficient=1.0 + i), train=train, d_sae=d_sae),
            unit,
            unit,
            rows_per_epoch=10**9,
            steps=10**4,
            device=torch.device("cpu"),
        )
        for i in range(count)
    ]


def seconds_of(steppers: Sequence[Stepper], x: Tensor, first: int) -> float:
    """Of a step of all, the median."""
    taken = []
    for step in range(first, first + STEPS):
        began = time.perf_counter()
        for one in steppers:
            one.step(x, x, step)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def bound(d_in: int, d_sae: int, tokens: int, count: int) -> float:
    """Seconds of five products of each SAE."""
    x, weights = torch.randn(tokens, d_in), torch.randn(d_in, d_sae)
    taken = []
    for _ in range(30):
        began = time.perf_counter()
        torch.mm(x, weights)
        taken.append(time.perf_counter() - began)
    return 5 * count * statistics.median(taken)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saes", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(machine())
    names = ("d_in -> d_sae, tokens", "one by one, ms", "together, ms", "times", "least to most", "products alone, ms")
    table = Table(*names, title=f"{args.saes} L1 SAEs, {args.threads} threads")
    for shape in SHAPES:
        d_in, d_sae, tokens = shape
        x = torch.randn(tokens, d_in, generator=torch.Generator().manual_seed(0))
        sides: dict[str, list[Stepper]] = {
            "apart": [Alone(slot) for slot in slots(*shape, args.saes)],
            "together": [Stack(slots(*shape, args.saes))],
        }
        times: dict[str, list[float]] = {side: [] for side in sides}
        for repeat in range(args.repeats + 1):  # the first warms up
            for side, steppers in sides.items():
                times[side].append(seconds_of(steppers, x, repeat * STEPS))
        apart, together = (times[side][1:] for side in sides)
        ratios = sorted(one / two for one, two in zip(apart, together, strict=True))
        table.add_row(
            f"{d_in} -> {d_sae:,}, {tokens:,}",
            f"{1000 * statistics.median(apart):.2f}",
            f"{1000 * statistics.median(together):.2f}",
            f"{statistics.median(ratios):.2f}",
            f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
            f"{1000 * bound(*shape, args.saes):.2f}",
        )
    tables.show(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
