"""What a training step costs on a GPU: ours beside SAELens' and dictionary_learning's, in bfloat16, at phi-2's width.

    pip install "sae-lens==6.54.12"; pip install --no-deps "dictionary-learning==0.1.0"; python -m tests.bench.gpu_step

Every side trains in its own trainer class, in a process of its own of this Python, with its documented settings for a
GPU (autocast in bfloat16; SAELens with its training pass compiled as well), on the same planted activations, which lie
on the device. A step's time is the mean over the last three quarters of a training, between two waits for the device.
The sides take turns in each repeat; a peer that fails is told and left out. The bound is the matrix products alone, at
the rate that this device reaches in the same run. Judges nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from rich import box
from rich.table import Table

from midiscover import tables
from tests.bench.step_sides import PEERS, STILL, described, kept, matrix_rate, planted

OURS, DENSE, PLAIN = "miDiscover", "miDiscover, dense", "miDiscover, PyTorch's operators"
VARIANTS = {OURS: "sparse", DENSE: "dense", PLAIN: "plain"}
COMPILED = "SAELens, compiled"
RUNNERS = {"SAELens": "run_saelens.py", "dictionary_learning": "run_dictionary_learning.py"}
LONGEST_SECONDS = 600
"""Of one side; a compiler that searches long is cut off there."""
ROOT = Path(__file__).parents[2]


class Failed(Exception):
    """A side's script ended with an error; the message is what it said."""


def run_jobs(script: str, jobs: Path) -> None:
    """Have a side's script answer a file of jobs, in this Python. Raises Failed."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    quiet = {"PYTHONPATH": paths, "TQDM_DISABLE": "1", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    line = [sys.executable, str(Path(__file__).with_name("peers") / script), str(jobs)]
    try:
        done = subprocess.run(
            line, env=os.environ | quiet, capture_output=True, text=True, timeout=LONGEST_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"{script} took more than {LONGEST_SECONDS} s") from None
    if done.returncode:
        raise Failed(f"{script}: {done.stdout}{done.stderr}")


def seconds_a_step(side: str, kind: str, folder: Path, args: argparse.Namespace) -> tuple[float, float]:
    """Of one training in a process of its own, and the L0 it ended at."""
    name = side.removesuffix(", compiled")
    variant, lr, sparsity = (VARIANTS[side], STILL, None) if side in VARIANTS else PEERS[name, kind]
    job = {"name": "step", "kind": kind, "variant": variant, "lr": lr, "seed": 0, "threads": args.threads}
    job |= {"sparsity": args.l0 if sparsity is None else sparsity, "steps": args.steps, "d_sae": args.d_sae}
    job |= {"batch_size": args.batch_size, "rows": str(folder), "out": str(folder), "device": args.device}
    job |= {"precision": "bfloat16", "compiled": side == COMPILED}
    jobs = folder / "jobs.json"
    jobs.write_text(json.dumps([job]))
    run_jobs(RUNNERS.get(name, "run_ours.py"), jobs)
    told = json.loads((folder / "step.json").read_text())
    return told["seconds_a_step"], told["own"]["l0"]


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table for each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--d-in", type=int, default=2560)
    parser.add_argument("--d-sae", type=int, default=20_480)
    parser.add_argument("--l0", type=int, default=64)
    parser.add_argument("--kinds", nargs="+", default=["standard", "topk"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--no-peers", action="store_true", help="our own sides alone")
    parser.add_argument("--json", type=Path, help="a file to write every repeat to")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    rate = matrix_rate(device, 8192 if device.type == "cuda" else 512)
    where = described(device, rate, small=device.type == "cpu")
    print(where, flush=True)
    products = 2 * args.batch_size * args.d_in * args.d_sae
    bounds = {"five dense products": [5 * products / rate], "x @ W_enc": [products / rate]}
    measured: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="midiscover-step-") as folder:
        shape = {"steps": args.steps, "batch": args.batch_size, "d_in": args.d_in, "d_sae": args.d_sae}
        planted(Path(folder), **shape, l0=args.l0, device=device)
        for kind in args.kinds:
            own = [OURS, DENSE, PLAIN] if kind in ("topk", "batchtopk") else [OURS, PLAIN]
            peers = [side for side, of in PEERS if of == kind and side in RUNNERS]
            sides = own if args.no_peers else [*own, *peers, COMPILED]
            measured[kind] = {side: [] for side in sides}
            keep = partial(kept, args, where, measured, dict.fromkeys(measured, bounds))
            _table(kind, measured[kind], Path(folder), args, rate, keep)
    return 0


def _table(
    kind: str,
    seconds: dict[str, list[float]],
    folder: Path,
    args: argparse.Namespace,
    rate: float,
    keep: Callable[[], None],
) -> None:
    """seconds: of each side, to be filled; `keep` writes what it holds."""
    l0: dict[str, float] = {}
    for _ in range(args.repeats):
        for side in list(seconds):
            try:
                spent, l0[side] = seconds_a_step(side, kind, folder, args)
            except Failed as error:
                if side == OURS:  # what all others are compared with
                    raise
                print(f"{kind} {side} is left out: {error}", flush=True)
                del seconds[side]
                continue
            seconds[side].append(spent)
            keep()
            print(kind, side, f"{1000 * spent:.2f} ms", flush=True)  # a run that is cut off has told what it knew
    products = 2 * args.batch_size * args.d_in * args.d_sae
    table = Table(
        f"{kind}, {args.batch_size:,} x {args.d_in:,} x {args.d_sae:,}",
        "ms a step", "lowest", "highest", "times ours", "of the peak, as if dense", "SAE-tokens/s", "L0",
        box=box.SIMPLE_HEAD,
    )  # fmt: skip
    for side, found in seconds.items():
        middle = statistics.median(found)
        table.add_row(
            side,
            *(f"{1000 * value:.2f}" for value in (middle, min(found), max(found))),
            f"{statistics.median(b / a for a, b in zip(seconds[OURS], found, strict=True)):.2f}",
            f"{100 * 5 * products / middle / rate:.0f} %",
            f"{args.batch_size / middle:,.0f}",
            f"{l0[side]:.0f}",
        )
    for label, count in (("five dense products alone", 5), ("x @ W_enc alone", 1)):
        table.add_row(label, f"{1000 * count * products / rate:.2f}")
    tables.show(table)


if __name__ == "__main__":
    sys.exit(main())
