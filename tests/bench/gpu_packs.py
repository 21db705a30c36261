"""Several packs of SAEs on one card at once, beside the same packs one after another.

    python -m tests.bench.gpu_packs [--packs 3] [--steps 200]

Each pack is a process of its own that trains one SAE of phi-2's shape, as a worker with a share of a card does; all are
started and have taken their first steps before the clock starts. Without Ray: what a share of a card is worth does not
depend on who handed it out. Judges nothing: the exit code is 0.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import torch
from rich.table import Table
from torch import Tensor

from midiscover import tables
from midiscover.calibrate import Nobody
from midiscover.config import TrainConfig
from midiscover.sae.base import Normalisation
from midiscover.saeconfig import StandardConfig
from midiscover.train import Member, train

D_IN, D_SAE, BATCH = 2560, 20_480, 4096
WARM = 12


class Turns:
    """Random activations on the device; says when the first steps are done, and waits there to be told to go on."""

    def __init__(self, steps: int, small: bool, device: torch.device) -> None:
        self.batch_size, d_in = (64, 32) if small else (BATCH, D_IN)
        self.inputs = self.outputs = Normalisation(torch.zeros(d_in), 1.0, float(d_in))
        self.rows_per_epoch, self.steps, self.device = self.batch_size * steps, steps, device
        self.rows = torch.randn(self.batch_size, d_in, device=device)

    def __len__(self) -> int:
        return WARM + self.steps

    def batches(self, start: int) -> Iterator[Tensor]:
        """The same rows again and again."""
        for step in range(start, len(self)):
            if step == WARM:
                self._settle()
                print("ready", flush=True)
                sys.stdin.readline()
            yield self.rows
        self._settle()
        print("done", flush=True)

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def child(steps: int, small: bool) -> None:
    """One pack."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    d_sae = 64 if small else D_SAE
    settings = TrainConfig(
        batch_size=64 if small else BATCH, dtype="bfloat16", report_every=10**6, checkpoint_every=1e9
    )
    member = Member(id="pack", config=StandardConfig(d_sae=d_sae), train=settings, d_sae=d_sae)
    train([member], Turns(steps, small, device), Nobody(device))


def run(packs: int, steps: int, small: bool, *, at_once: bool) -> float:
    """Seconds of all packs' steps."""
    line = [sys.executable, "-m", "tests.bench.gpu_packs", "--child", "--steps", str(steps), *(["--small"] * small)]
    children = [
        subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        for _ in range(packs)
    ]

    def heard(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        assert process.stdout.readline(), "a pack ended before it said so"

    def go(process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        process.stdin.write("\n")

    for process in children:
        heard(process)
    began = time.perf_counter()
    for process in children:
        go(process)
        if not at_once:
            heard(process)
    if at_once:
        for process in children:
            heard(process)
    seconds = time.perf_counter() - began
    for process in children:
        process.communicate()
    return seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--small", action="store_true", help="a toy shape, for a CPU")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        child(args.steps, args.small)
        return 0
    table = Table("", "seconds", "SAE-tokens/s", title=f"{args.packs} packs of one SAE, {args.steps} steps each")
    batch = 64 if args.small else BATCH
    for label, at_once in (("one after another", False), ("at once", True)):
        seconds = run(args.packs, args.steps, args.small, at_once=at_once)
        table.add_row(label, f"{seconds:.2f}", f"{args.packs * args.steps * batch / seconds:,.0f}")
    tables.show(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
