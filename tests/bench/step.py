"""What a training step costs: ours, sparse and dense, beside SAELens', dictionary_learning's and sparsify's.

    python -m tests.bench.step [--repeats 3] [--steps 24] [--batch-size 4096] [--l0 50] [--kinds standard topk] [--ours]
                              [--precision bfloat16] [--json FILE]

Each side trains in its own trainer class and its own environment, as in tests.bench.frontier (whose runners these are),
on the same planted activations; a step's time is the median between two batches that it asks for. The sides take turns
in each repeat, on the same threads. Ours runs at the L0 that is asked for (k, or biases that begin there); the peers'
products are dense, so their time does not depend on theirs. The bound is the one product that stays dense, x @ W_enc,
measured in the same turn. In bfloat16 each side computes as it documents: ours by `train.dtype`, SAELens by its
autocast; the others have none on a CPU, and stay in float32. With --ours only our own steps, for all kinds. Judges
nothing: the exit code is 0.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich import box
from rich.table import Table

from midiscover import tables
from tests.bench.frontier import RUNNERS, Side, environment, python_of
from tests.bench.frontier_report import OURS
from tests.bench.harvest import machine
from tests.bench.step_sides import PEERS, STILL, kept, planted
from tests.venvs import checked

D_IN, D_SAE = 576, 4608
DENSE = f"{OURS}, dense"
KINDS = ("standard", "gated", "jumprelu", "topk", "batchtopk", "matryoshka_batchtopk")


def seconds_a_step(side: str, kind: str, folder: Path, args: argparse.Namespace) -> tuple[float, float]:
    """Of one training in a process of its own, and the L0 it ended at."""
    own = side in (OURS, DENSE)
    variant, lr, l1 = ("dense" if side == DENSE else "sparse", STILL, None) if own else PEERS[side, kind]
    job = {
        "name": "step",
        "kind": kind,
        "variant": variant,
        "lr": lr,
        "sparsity": args.l0 if l1 is None else l1,
        "seed": 0,
        "steps": args.steps,
        "batch_size": args.batch_size,
        "d_sae": D_SAE,
        "threads": args.threads,
        "precision": args.precision,
        "rows": str(folder),
        "out": str(folder),
    }
    jobs = folder / "jobs.json"
    jobs.write_text(json.dumps([job]))
    name = OURS if own else side
    script = Path(__file__).with_name("peers") / RUNNERS[name]
    there = environment(Side(name=name, kind=kind, variants=(), lr=None), args)
    checked([str(python_of(name)), str(script), str(jobs)], env=there, timeout=1800)
    told = json.loads((folder / "step.json").read_text())
    return told["seconds_a_step"], told["own"]["l0"]


def product_seconds(batch: int, precision: str) -> float:
    """Of x @ W_enc, the least of some."""
    x, encoder = (torch.randn(shape).to(getattr(torch, precision)) for shape in ((batch, D_IN), (D_IN, D_SAE)))
    found = []
    for _ in range(6):
        began = time.perf_counter()
        torch.mm(x, encoder)
        found.append(time.perf_counter() - began)
    return min(found)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--l0", type=int, default=50)
    parser.add_argument("--kinds", nargs="+", default=["standard", "topk"], choices=KINDS)
    parser.add_argument("--ours", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", type=Path, help="a file to write every repeat to")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(machine())
    measured, bounds = {}, {}
    for kind in KINDS if args.ours else args.kinds:
        sides = [OURS, DENSE, *(side for side, of in PEERS if of == kind and not args.ours)]
        for side in sides:
            python_of(OURS if side == DENSE else side)
        measured[kind], bounds[kind] = _table(kind, sides, args)
        kept(args, machine(), measured, bounds)
    return 0


def _table(
    kind: str, sides: Sequence[str], args: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    l0: dict[str, float] = {}
    products = []
    with tempfile.TemporaryDirectory(prefix="midiscover-step-") as folder:
        planted(Path(folder), steps=args.steps, batch=args.batch_size, d_in=D_IN, d_sae=D_SAE, l0=args.l0)
        for _ in range(args.repeats):
            products.append(product_seconds(args.batch_size, args.precision))
            for side in sides:
                spent, l0[side] = seconds_a_step(side, kind, Path(folder), args)
                seconds[side].append(spent)
    shape = f"{kind}, {args.precision}, {args.batch_size:,} x {D_IN} x {D_SAE:,}"
    table = Table(shape, "ms a step", "lowest", "highest", "times ours", "L0", box=box.SIMPLE_HEAD)
    for side, found in seconds.items():
        shares = [other / ours for other, ours in zip(found, seconds[OURS], strict=True)]
        figures = [f"{1000 * statistic(found):.0f}" for statistic in (statistics.median, min, max)]
        table.add_row(side, *figures, f"{statistics.median(shares):.2f}", f"{l0[side]:.0f}")
    bound = statistics.median(products)
    table.add_row(
        "x @ W_enc alone", f"{1000 * bound:.0f}", f"{1000 * min(products):.0f}", f"{1000 * max(products):.0f}"
    )
    tables.show(table)
    return seconds, {"x @ W_enc": products}


if __name__ == "__main__":
    sys.exit(main())
