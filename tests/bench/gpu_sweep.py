"""A sweep of hooks x L1 coefficients on planted activations at phi-2's width, beside SAELens and dictionary_learning.

    pip install "sae-lens==6.54.12"; pip install --no-deps "dictionary-learning==0.1.0"; python -m tests.bench.gpu_sweep
    python -m tests.bench.gpu_sweep --small --no-peers   # the same program on a CPU, in seconds, to see that it runs

The language model's pass is not part of it: every side gets the same rows, which lie on the device, one set for all
hooks. Ours trains a pack a hook; the peers train their SAEs one after another by their own trainers, as their sweeps
step them, in bfloat16 as they document it. Seconds of the trainings themselves, their making of SAEs included, imports
and saving not; and the steps alone, at the pace of the last three quarters: with few steps "in all" is mostly the
making of SAEs, which dictionary_learning does on the CPU. Judges nothing: the exit code is 0.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.table import Table

from midiscover import tables
from tests.bench.gpu_step import OURS, RUNNERS, Failed, run_jobs
from tests.bench.step_sides import planted

L1 = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)


def seconds_of(side: str, folder: Path, args: argparse.Namespace) -> tuple[float, float]:
    """Of the trainings of every SAE of the grid, and of their steps at a steady pace."""
    variant, scale = {OURS: ("recipe", 1.0), "SAELens": ("tutorial", 1.0)}.get(side, ("AprilUpdate", 0.02))
    jobs = [
        {
            "name": f"{hook}-{l1:g}", "kind": "standard", "variant": variant, "lr": 3e-4, "sparsity": scale * l1,
            "seed": hook, "steps": args.steps, "batch_size": args.batch_size, "d_sae": args.d_sae,
            "threads": args.threads, "rows": str(folder), "out": str(folder / side), "device": args.device,
            "precision": args.precision, "keep": False,
        }
        for hook in range(args.hooks)
        for l1 in L1[: args.coefficients]
    ]  # fmt: skip
    (folder / side).mkdir()
    path = folder / side / "jobs"
    path.write_text(json.dumps(jobs))
    run_jobs(RUNNERS.get(side, "run_ours_packs.py"), path)
    told = [json.loads(answer.read_text()) for answer in (folder / side).glob("*.json")]
    return sum(one["seconds"] for one in told), sum(one["seconds_a_step"] for one in told) * args.steps


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a toy shape, for a CPU")
    parser.add_argument("--hooks", type=int, default=5)
    parser.add_argument("--coefficients", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--threads", type=int, default=8)
    args = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available() and not args.small
    args.device, args.precision = ("cuda", "bfloat16") if on_gpu else ("cpu", "float32")
    args.batch_size, args.d_in, args.d_sae = (256, 64, 256) if args.small else (4096, 2560, 20_480)
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    saes = args.hooks * args.coefficients
    table = Table(
        "side", "s in all", "s of the steps", "SAE-tokens/s", "times ours",
        title=f"{name}: {args.hooks} x {args.coefficients} SAEs, {args.steps} steps of {args.batch_size:,} rows",
    )  # fmt: skip
    mine = 0.0
    with tempfile.TemporaryDirectory(prefix="midiscover-sweep-") as folder:
        shape = {"steps": args.steps, "batch": args.batch_size, "d_in": args.d_in, "d_sae": args.d_sae}
        planted(Path(folder), **shape, l0=64, device=args.device)
        for side in [OURS, *([] if args.no_peers else RUNNERS)]:
            try:
                whole, stepping = seconds_of(side, Path(folder), args)
            except Failed as error:
                if side == OURS:
                    raise
                print(f"{side} is left out: {error}", flush=True)
                continue
            mine = mine or stepping
            rate = saes * args.steps * args.batch_size / stepping
            table.add_row(side, f"{whole:.1f}", f"{stepping:.1f}", f"{rate:,.0f}", f"{stepping / mine:.2f}")
            print(side, f"{whole:.1f} s, {stepping:.1f} of the steps", flush=True)
    tables.show(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
