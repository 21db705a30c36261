"""A planted dictionary at phi-2's width: 16,384 known atoms in 2,560 dimensions, SAEs of 20,480 features.

    python -m tests.bench.gpu_planted              # on a GPU
    python -m tests.bench.gpu_planted --small      # the same program on a CPU, in seconds, to see that it runs

Plain torch, no Ray, nothing downloaded; the rows are made on the device and stay there as bfloat16. Prints FVU, L0 and
dead features on held-out rows, the share of atoms recovered, and tokens/s of whole training steps. An atom counts as
recovered where the largest cosine to a decoder row reaches 0.9; the small shape matches atoms and rows one to one by
the Hungarian method, which 16,384 atoms are too many for (`tests/planted.py` says why both count the same).
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from rich.table import Table

from midiscover import tables
from midiscover.config import TrainConfig
from midiscover.progress import Progress
from midiscover.saeconfig import BatchTopKConfig, SaeConfig, StandardConfig, TopKConfig
from midiscover.train import Member, Trained, train
from tests.planted import PlantedDictionary, PlantedSource, scores


class Shape(NamedTuple):
    """Sizes of one run."""

    d_in: int
    n_true: int
    l0: int
    d_sae: int
    batch_size: int
    rows: int
    steps: int


LARGE = Shape(d_in=2560, n_true=16_384, l0=64, d_sae=20_480, batch_size=4096, rows=1024 * 4096, steps=4096)
SMALL = Shape(d_in=64, n_true=128, l0=6, d_sae=192, batch_size=256, rows=200 * 256, steps=400)


class Worker:
    """Keeps the last word of the loop, no checkpoint."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rate = 0.0

    def load_checkpoint(self, read: object) -> None:
        """No checkpoint."""
        return

    def save_checkpoint(self, step: int, data: bytes) -> None:
        """Not reached: the interval is longer than the run."""

    def is_saving(self) -> bool:
        """No."""
        return False

    def report(self, progress: Progress) -> None:
        """The mean rate since the first step; the loop has waited for the device before it says it."""
        self.rate = progress.tokens_per_second


def row(config: SaeConfig, shape: Shape, source: PlantedSource, train_config: TrainConfig) -> tuple[str, ...]:
    """One SAE, trained and scored."""
    device = source.planted.device
    member = Member(id=config.kind, config=config, train=train_config, d_sae=shape.d_sae)
    worker = Worker(device)
    (trained,) = train([member], source, worker)
    label, value = config.sparsity()
    if not isinstance(trained, Trained):
        return config.kind, f"{label} {value:g}", *["diverged"] * 7
    found = scores(trained, source, source.planted.held_out())
    return (
        config.kind,
        f"{label} {value:g}",
        f"{trained.lr:.1e}",
        f"{found.fvu:.3f}",
        f"{found.l0:.1f}",
        f"{100 * found.dead:.1f} %",
        f"{100 * found.recovered:.1f} %",
        f"{found.mean_max_cosine:.3f}",
        f"{worker.rate:,.0f}",
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a toy shape, for a CPU")
    parser.add_argument("--steps", type=int, help="training steps of each SAE")
    parser.add_argument("--lr", type=float, help="peak learning rate; else the architecture's own")
    parser.add_argument("--l1", type=float, nargs="*", default=[2.0, 4.0], help="coefficients of the standard SAEs")
    parser.add_argument("--seed", type=int, default=0, help="of the atoms, the rows and the weights")
    known = parser.parse_args()
    shape = SMALL if known.small else LARGE
    shape = shape._replace(steps=known.steps or shape.steps)
    device = torch.device("cuda" if torch.cuda.is_available() and not known.small else "cpu")
    planted = PlantedDictionary(d_in=shape.d_in, n_true=shape.n_true, l0=shape.l0, seed=known.seed, device=device)
    source = PlantedSource(planted, batch_size=shape.batch_size, steps=shape.steps, seed=known.seed, rows=shape.rows)
    train_config = TrainConfig(
        batch_size=shape.batch_size,
        epochs=max(1, shape.steps * shape.batch_size // shape.rows),
        lr=known.lr,
        dtype="float32" if known.small else "bfloat16",
        seed=known.seed,
        report_every=100,
        checkpoint_every=1e9,
    )
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    true_l0 = float((planted.held_out().code > 0).sum(1).float().mean())
    table = Table(
        "kind", "", "lr", "FVU", "L0", "dead", "recovered", "mean max cosine", "tokens/s",
        title=f"{name}: {shape.n_true:,} atoms, {true_l0:.1f} per row, in {shape.d_in:,} dimensions; "
        f"{shape.d_sae:,} features, {shape.steps:,} steps of {shape.batch_size:,} rows out of {shape.rows:,}",
    )  # fmt: skip
    configs: list[SaeConfig] = [StandardConfig(l1_coefficient=l1) for l1 in known.l1]
    for config in [*configs, TopKConfig(k=shape.l0), BatchTopKConfig(k=shape.l0)]:
        cells = row(config, shape, source, train_config)
        print(*cells, flush=True)  # a run that is cut off has told what it knew
        table.add_row(*cells)
    tables.show(table)


if __name__ == "__main__":
    main()
