"""What a training step of each kind costs on a GPU, with our kernels and with PyTorch's operators alone.

    python -m tests.bench.gpu_kinds [--steps 30] [--k 64] [--batch-size 4096] [--d-in 2560] [--d-sae 20480]

One SAE at a time, on planted rows that lie on the device, in bfloat16; the mean of the steps after six, by CUDA events.
Learning rates are nearly 0, so that L0 stays what it is at first: k, or the density that biases and thresholds begin
with. `graph`: whether the step was recorded and replayed. Judges nothing: the exit code is 0.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from unittest.mock import patch

import torch
from rich.table import Table
from torch import Tensor

import midiscover.sae.code
import midiscover.sae.pattern
from midiscover import tables
from midiscover.config import TrainConfig
from midiscover.member import Member, Slot
from midiscover.sae.base import Normalisation
from midiscover.saeconfig import (
    BatchTopKConfig,
    GatedConfig,
    JumpReluConfig,
    MatryoshkaConfig,
    SaeConfig,
    StandardConfig,
    TopKConfig,
)
from tests.bench.step_sides import STILL, described, matrix_rate

WARM = 6
BELOW = midiscover.sae.code.SPARSE_BELOW_ON_GPU


def rows(batch: int, d_in: int, d_sae: int, l0: float, device: torch.device) -> list[Tensor]:
    """Four batches of sums of `l0` atoms, centred, of mean norm sqrt(d_in)."""
    atoms = torch.nn.functional.normalize(torch.randn(d_sae, d_in, device=device), dim=1)

    def one() -> Tensor:
        there = torch.rand(batch, d_sae, device=device) < l0 / d_sae
        return torch.where(there, torch.rand(batch, d_sae, device=device), 0) @ atoms

    made = [one() for _ in range(4)]
    mean = torch.cat(made).mean(0)
    norm = float((torch.cat(made) - mean).norm(dim=1).mean())
    return [(x - mean) * (d_in**0.5 / norm) for x in made]


def step_seconds(config: SaeConfig, batches: Sequence[Tensor], steps: int) -> tuple[float, float, bool]:
    """Of one step; the L0 it ended at; and whether it was replayed from a CUDA graph."""
    (batch, d_in), device = batches[0].shape, batches[0].device
    d_sae = config.d_sae or 0
    train = TrainConfig(batch_size=batch, dtype="bfloat16", lr=STILL)
    unit = Normalisation(torch.zeros(d_in), 1.0, float(d_in))
    member = Member(id="step", config=config, train=train, d_sae=d_sae)
    slot = Slot(member, unit, unit, rows_per_epoch=10**9, steps=10**4, device=device)
    slot.sae.calibrate_(batches[0])

    def run(first: int, count: int) -> float:
        point = None
        for step in range(first, first + count):
            point = slot.step(x := batches[step % len(batches)], x, step)
        assert point is not None
        return float(point.l0)

    run(0, WARM)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    l0 = run(WARM, steps)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000 / steps, l0, any(one.graph for one in slot.recordings.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--d-in", type=int, default=2560)
    parser.add_argument("--d-sae", type=int, default=20_480)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("This bench needs a GPU; here is none.", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    rate, d_sae, density = matrix_rate(device, 8192), args.d_sae, args.k / args.d_sae
    batches = rows(args.batch_size, args.d_in, d_sae, args.k, device)
    kinds: list[SaeConfig] = [kind(d_sae=d_sae, initial_density=density) for kind in (StandardConfig, JumpReluConfig, GatedConfig)]  # noqa: E501  # fmt: skip
    kinds += [kind(d_sae=d_sae, k=args.k) for kind in (TopKConfig, BatchTopKConfig, MatryoshkaConfig)]
    dense = 10 * args.batch_size * args.d_in * d_sae
    title = f"{described(device, rate)}; {args.batch_size:,} x {args.d_in:,} x {d_sae:,}"
    print(title, flush=True)
    columns = ("ms a step", "of the peak, as if dense", "SAE-tokens/s", "L0", "graph")
    table = Table("kind", "", *columns, title=title)
    ways = {"": {}, "dense": {"sparse": 0.0}, "PyTorch's operators": {"devices": ()}}
    for config in kinds:
        for label, way in ways.items():
            if label == "dense" and config.kind not in ("topk", "batchtopk"):
                continue
            sparse = patch.object(midiscover.sae.code, "SPARSE_BELOW_ON_GPU", way.get("sparse", BELOW))
            devices = patch.object(midiscover.sae.pattern, "KERNEL_DEVICES", way.get("devices", ("cuda",)))
            with sparse, devices:
                seconds, l0, graph = step_seconds(config, batches, args.steps)
            share, speed = f"{100 * dense / seconds / rate:.1f} %", f"{args.batch_size / seconds:,.0f}"
            cells = (config.kind, label, f"{1000 * seconds:.2f}", share, speed, f"{l0:.1f}", "yes" if graph else "")
            print(*cells, flush=True)  # a run that is cut off has told what it knew
            table.add_row(*cells)
    tables.show(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
