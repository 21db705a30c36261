"""Whether one side's SAEs recover more cross-entropy than another's, token by token, with its standard error.

    python -m tests.bench.ce_pairs --folder FOLDER [--kind topk] [--target 175] [--tokens 8192] [--sides ONE OTHER]

FOLDER is one that tests.bench.frontier has filled, with the same settings (run.yaml and its SAEs). Both sides' SAEs are
spliced into the same passes over the same held-out tokens, so the difference of each token's cross-entropy is paired:
its standard error says how much of a difference in the mean is chance. Judges nothing: the exit code is 0.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from rich.table import Table
from torch import Tensor

import midiscover.evaluate
from midiscover import tables
from tests.bench import frontier


def spliced_ce(bench: frontier.Bench, names: Sequence[str], tokens: int) -> list[Tensor]:
    """[tokens] cross-entropies: of the model, with zeros at the hook, and with each SAE's reconstruction there."""
    seen: list[Tensor] = []

    def kept(log_probabilities: Tensor, targets: Tensor) -> float:
        seen.append(-log_probabilities.gather(-1, targets[:, None]).double()[:, 0])
        return float(seen[-1].sum())

    saes = {name: frontier.load_made(bench.out / name, bench.shape) for name in names}
    with patch.object(midiscover.evaluate, "_cross_entropy", kept):
        bench.rows.ce_recovered(saes, tokens)
    return [torch.cat(seen[i :: len(names) + 2]) for i in range(len(names) + 2)]


def main(argv: Sequence[str] | None = None) -> int:
    """Print a row for each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--kind", default="topk")
    parser.add_argument("--target", type=float, default=175.0)
    parser.add_argument("--sides", nargs=2, default=["miDiscover", "SAELens"])
    parser.add_argument("--tokens", type=int, default=8192)
    args = parser.parse_args(argv)
    document = json.loads((args.folder / "frontier.json").read_text())
    settings = {
        name: document["settings"][name]
        for name in ("batch_size", "held_out", "steps", "d_sae", "model", "hook", "text")
    }
    line = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", value)]
    bench = frontier.Bench(frontier.arguments(["--folder", str(args.folder), *line]))
    rows = [row for row in document["rows"] if row["kind"] == args.kind and row["target"] == args.target]
    pairs = []
    for seed in sorted({row["seed"] for row in rows}):
        named = {row["side"].lower(): row["name"] for row in rows if row["seed"] == seed}
        pairs.append((seed, *(named[side.lower()] for side in args.sides)))
    names = [name for _, *both in pairs for name in both]
    clean, zero, *found = spliced_ce(bench, names, args.tokens)
    ce = dict(zip(names, found, strict=True))
    lost = float((zero - clean).mean())
    table = Table(
        "seed", *args.sides, "difference", "standard error",
        title=f"CE recovered at {args.kind} {args.target:g}, {len(clean):,} tokens; zeros cost {lost:.4f} nats",
    )  # fmt: skip
    for seed, one, two in pairs:
        shares = [f"{100 * float((zero - ce[name]).mean()) / lost:.1f} %" for name in (one, two)]
        difference = (ce[two] - ce[one]) / lost
        error = float(difference.std()) / len(difference) ** 0.5
        table.add_row(str(seed), *shares, f"{100 * float(difference.mean()):+.1f}", f"{100 * error:.1f}")
    tables.show(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
