"""The L0-FVU frontier of our trainer beside SAELens', dictionary_learning's and (TopK only) sparsify's.

    python -m tests.bench.frontier --folder FOLDER [--small] [--text FILE] [--kinds standard topk] [--sides SAELens ...]

Every side trains with its own trainer class in an environment of its own (made at the first run, torch and all) on
the same batches in the same order: one harvest, one file. Each runner in `peers/` says which settings of its side it
takes; what a peer gives in steps or tokens that a short run cannot hold, it scales to the run.

Learning rates: three, a factor of 3 apart, at the middle sparsity and the first seed. Their centre is the side's
documented default; defaults of Adam are for runs of some 30,000 steps and are raised by (30,000 / steps)^0.4, as our
own recipe's are; sparsify's default, for sign descent, is the highest of its three. With --extend, a best rate at the
end of the three gets one more beyond it, for every side alike. Where a peer documents several trainers, each is tried
at the centre and the better one goes on. Then three seeds at three sparsities. L1 sides begin at the same penalty in
raw units, each in its own convention; a try that ends a factor of 2 or more off the middle L0 is made once more with
the coefficient moved, and the three coefficients of the end follow from the L0 of the best try. Of two tries the
better has the lower FVU, for L1 moved to the middle L0 along L0^-0.37, the slope of the demo's frontier at layer 15.

One evaluator, `midiscover.sae.metrics`, judges the folded weights of all sides on held-out rows; it must agree to
1e-4 with L0 and FVU as each side's own encode and decode (for SAELens its own logged metrics) give them. FOLDER keeps
the activations and every training: a second run goes on where the first ended. Judges nothing: the exit code is 0.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from midiscover.config import TrainConfig
from midiscover.sae.schedule import peak_lr
from tests.bench.frontier_report import OURS, Row, picture, show, verdicts
from tests.bench.frontier_rows import ROOT, Rows, Scales, Wanted, load_made
from tests.bench.harvest import machine
from tests.venvs import cached_venv, checked

TARGETS = (175.0, 60.0, 20.0)
"""L0s at which the sides are compared; the middle one is tuned at."""
MIDDLE = 60.0
NEAR = (50.0, 70.0)
"""L0s of a tuned L1 run that stands for the middle one."""
GRID = (1 / 3, 1.0, 3.0)
FAR = 2.0
"""Factor off the middle L0 from which an L1 try is made once more."""
MOST_MOVED = 6.0
START_L1 = 5.0
"""L1 coefficient of the tuning, in our convention."""
FVU_SLOPE, L1_SLOPE = 0.37, 0.8
"""FVU falls with L0^-0.37, and L0 with l1^(-1 / 0.8), along the demo's frontier at layer 15."""
REFERENCE_STEPS = 30_000
AGREEMENT = 1e-4
TORCH, TRANSFORMERS = torch.__version__.partition("+")[0], version("transformers")
# torch first and alone: it is the large one, and what comes after must not choose another.
PINNED = [f"torch=={TORCH}"]
VENVS = {
    "SAELens": (f"saelens-6.54.12-torch-{TORCH}", [PINNED, [*PINNED, "sae-lens==6.54.12"]]),
    # Without its dependencies, among them nnsight, umap and wandb, which its trainers do not use.
    "dictionary_learning": (
        f"dictionary_learning-0.1.0-hf-torch-{TORCH}",
        [
            PINNED,
            [*PINNED, "einops", "numpy", "safetensors", "tqdm", f"transformers=={TRANSFORMERS}"],
            ["--no-deps", "dictionary-learning==0.1.0"],
        ],
    ),
    "sparsify": (f"sparsify-1.3.3-torch-{TORCH}", [PINNED, [*PINNED, "eai-sparsify==1.3.3"]]),
}
RUNNERS = {
    OURS: "run_ours.py",
    "SAELens": "run_saelens.py",
    "dictionary_learning": "run_dictionary_learning.py",
    "sparsify": "run_sparsify.py",
}


@dataclass(frozen=True, kw_only=True)
class Side:
    """One trainer of one kind of SAE."""

    name: str
    kind: str
    variants: tuple[str, ...]
    lr: float | None
    """Centre of the learning rates; None: the recipe's, without tuning."""
    l1_scale: float | None = None
    """L1 coefficient per unit of penalty on raw activations; None where `sparsity` is k or an L0."""


@dataclass(frozen=True, kw_only=True)
class Try:
    """One training of a side."""

    side: Side
    variant: str
    lr: float
    sparsity: float
    target: float
    seed: int

    @property
    def name(self) -> str:
        side = self.side
        return f"{side.name}.{side.kind}.{self.variant}.lr{self.lr:.3g}.{self.sparsity:.4g}.s{self.seed}"


class Bench:
    """The activations, the settings, and what has been trained."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.seeds = list(range(args.seeds))
        self.folder: Path = args.folder
        self.out = self.folder / "trained"
        self.out.mkdir(parents=True, exist_ok=True)
        self._same_settings()
        self.rows = Rows(
            Wanted(
                folder=self.folder,
                model=args.model,
                text=args.text,
                hook=args.hook,
                steps=args.steps,
                batch_size=args.batch_size,
                held_out=args.held_out,
                threads=args.threads,
            )
        )
        self.shape = (self.rows.train.shape[1], args.d_sae)
        self.about_own_mean = self.rows.spread_ratio()
        self.measured: dict[str, Row] = {}

    def _same_settings(self) -> None:
        """What is kept in the folder was made with these settings."""
        names = ("model", "text", "hook", "steps", "batch_size", "d_sae", "held_out")
        now = {name: getattr(self.args, name) for name in names}
        path = self.folder / "settings.json"
        if path.exists() and json.loads(path.read_text()) != now:
            raise SystemExit(f"{self.folder} holds a run of other settings; name another --folder.")
        path.write_text(json.dumps(now))

    def run(self, tries: Sequence[Try]) -> list[Row]:
        """Train what is not there, all of one side in one process, and measure."""
        side = tries[0].side
        missing = [each for each in tries if not (self.out / f"{each.name}.json").exists()]
        if missing:
            began = time.monotonic()
            jobs = self.folder / f"jobs-{os.getpid()}.json"
            jobs.write_text(json.dumps([self._job(each) for each in missing]))
            script = Path(__file__).with_name("peers") / RUNNERS[side.name]
            checked([str(python_of(side.name)), str(script), str(jobs)], env=environment(side, self.args), timeout=7200)
            spent = time.monotonic() - began
            print(f"{side.name} {side.kind}: {len(missing)} trainings in {spent:.0f} s", flush=True)
        for each in tries:
            if each.name not in self.measured:
                self.measured[each.name] = self._measured(each)
        return [self.measured[each.name] | {"target": each.target} for each in tries]

    def _job(self, each: Try) -> dict[str, Any]:
        return {
            "name": each.name,
            "kind": each.side.kind,
            "variant": each.variant,
            "lr": each.lr,
            "sparsity": each.sparsity,
            "seed": each.seed,
            "steps": self.args.steps,
            "batch_size": self.args.batch_size,
            "d_sae": self.args.d_sae,
            "threads": self.args.threads,
            "rows": str(self.folder),
            "out": str(self.out),
        }

    def _measured(self, each: Try) -> Row:
        """Our metrics of a training; AssertionError where the side's own numbers are others."""
        told = json.loads((self.out / f"{each.name}.json").read_text())
        sae = load_made(self.out / each.name, self.shape)
        metrics = self.rows.metrics(sae)
        own, same = told["own"], {"l0": metrics["l0"], "fvu": metrics["fvu"] * self.about_own_mean}
        differences = {name: abs(same[name] - own[name]) / max(1.0, own[name]) for name in ("l0", "fvu")}
        if math.isfinite(metrics["fvu"]):
            assert max(differences.values()) <= AGREEMENT, f"{each.name}: ours {same}, theirs {own}"
        return {
            "side": each.side.name,
            "kind": each.side.kind,
            "variant": each.variant,
            "lr": each.lr,
            "sparsity": each.sparsity,
            "l1": each.side.l1_scale is not None,
            "seed": each.seed,
            "l0": metrics["l0"],
            "fvu": metrics["fvu"],
            "dead_share": metrics["dead_share"],
            "seconds": told["seconds"],
            "cpu_seconds": told["cpu_seconds"],
            "name": each.name,
            "own": own,
            "difference": differences,
        }


def python_of(side: str) -> Path:
    """The Python in which a side's runner works."""
    return Path(sys.executable) if side == OURS else cached_venv(*VENVS[side])


def environment(side: Side, args: argparse.Namespace) -> dict[str, str]:
    """Variables of a runner: threads pinned, no network, and none of our paths but for ourselves."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    fixed = {"OMP_NUM_THREADS": str(args.threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    paths = {"PYTHONPATH": str(ROOT)} if side.name == OURS else {}
    return kept | fixed | paths | {"TQDM_DISABLE": "1", "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false"}


def sides_of(args: argparse.Namespace, scales: Scales) -> list[Side]:
    """Every trainer, with the centre of its learning rates."""
    horizon = (REFERENCE_STEPS / args.steps) ** 0.4
    width = math.sqrt(2**14 / args.d_sae)  # the rule of dictionary_learning's and sparsify's TopK
    recipe = peak_lr(TrainConfig(), d_sae=args.d_sae, steps=args.steps)
    trainers = ("StandardTrainer", "AprilUpdate")
    adam, dl, signum = 3e-4 * horizon, 2e-4 * width * horizon, 5e-3 * width / GRID[-1]
    sides = [
        Side(name=OURS, kind="standard", variants=("recipe",), lr=recipe, l1_scale=scales.ours),
        Side(name="SAELens", kind="standard", variants=("tutorial",), lr=adam, l1_scale=scales.mean_norm),
        Side(name="dictionary_learning", kind="standard", variants=trainers, lr=adam, l1_scale=scales.unit),
        Side(name=OURS, kind="topk", variants=("recipe",), lr=recipe),
        Side(name="SAELens", kind="topk", variants=("tutorial",), lr=adam),
        Side(name="dictionary_learning", kind="topk", variants=("demo",), lr=dl),
        Side(name="sparsify", kind="topk", variants=("signum",), lr=signum),
    ]
    more = {"batchtopk": "recipe", "matryoshka_batchtopk": "recipe", "gated": "target_l0", "jumprelu": "target_l0"}
    sides += [Side(name=OURS, kind=kind, variants=(variant,), lr=None) for kind, variant in more.items()]
    return [side for side in sides if side.kind in args.kinds and side.name in args.sides]


def score(row: Row) -> tuple[bool, float]:
    """What is minimised: FVU, for L1 moved to the middle L0; tries that ended far from it or failed come last."""
    if not math.isfinite(row["fvu"]) or not row["l0"]:
        return True, math.inf
    if not row["l1"]:
        return False, row["fvu"]
    return is_far(row["l0"]), row["fvu"] * (row["l0"] / MIDDLE) ** FVU_SLOPE


def is_far(l0: float) -> bool:
    """Whether an L0 is too far from the middle one to be moved there."""
    return not MIDDLE / FAR <= l0 <= MIDDLE * FAR


def near_middle(bench: Bench, tries: Sequence[Try]) -> list[tuple[Try, Row]]:
    """Tries with their rows; an L1 try that ends far from the middle L0 is made once more, its coefficient moved."""
    rows = bench.run(tries)
    again = []
    for each, row in zip(tries, rows, strict=True):
        far = each.side.l1_scale and row["l0"] and is_far(row["l0"])
        again.append(replace(each, sparsity=moved(each.sparsity, row["l0"], MIDDLE)) if far else each)
    return list(zip(again, bench.run(again), strict=True))


def moved(coefficient: float, l0: float, target: float) -> float:
    """The L1 coefficient that should lead to `target` where `coefficient` led to `l0`."""
    return coefficient * min(max((l0 / target) ** L1_SLOPE, 1 / MOST_MOVED), MOST_MOVED)


def tuned(bench: Bench, side: Side, start: float) -> tuple[Try, Row, list[Row]]:
    """The best try at the middle sparsity, its numbers, and all that was tried."""
    assert side.lr is not None
    middle = Try(side=side, variant=side.variants[0], lr=side.lr, sparsity=start, target=MIDDLE, seed=bench.seeds[0])
    found: list[tuple[Try, Row]] = []
    if len(side.variants) > 1:
        found = near_middle(bench, [replace(middle, variant=variant) for variant in side.variants])
        middle = replace(middle, variant=min(found, key=lambda pair: score(pair[1]))[0].variant)
    grid = near_middle(bench, [replace(middle, lr=side.lr * factor) for factor in GRID])
    chosen, row = min(grid, key=lambda pair: score(pair[1]))
    if bench.args.extend and chosen.lr in (grid[0][0].lr, grid[-1][0].lr):
        beyond = chosen.lr * (GRID[0] if chosen.lr < side.lr else GRID[-1])
        grid += near_middle(bench, [replace(middle, lr=beyond)])
        chosen, row = min(grid, key=lambda pair: score(pair[1]))
    lrs = [each.lr for each, _ in grid]
    row = row | {"lr_at_edge": chosen.lr in (min(lrs), max(lrs))}
    return chosen, row, [row for _, row in (*found, *grid)]


def frontier_of(bench: Bench, side: Side, scales: Scales) -> tuple[list[Row], list[Row]]:
    """All final rows of a side, and those of its tuning."""
    if side.lr is None:
        chosen = Try(side=side, variant=side.variants[0], lr=0.0, sparsity=MIDDLE, target=MIDDLE, seed=0)
        tries, edge = [], False
        sparsity = {target: target for target in TARGETS}
    else:
        start = START_L1 / scales.ours * side.l1_scale if side.l1_scale else MIDDLE
        chosen, row, tries = tuned(bench, side, start)
        edge = row["lr_at_edge"]
        sparsity = {target: target for target in TARGETS}
        if side.l1_scale:
            sparsity = {target: moved(chosen.sparsity, row["l0"], target) for target in TARGETS}
            if NEAR[0] <= row["l0"] <= NEAR[1]:
                sparsity[MIDDLE] = chosen.sparsity
    final = [
        replace(chosen, sparsity=sparsity[target], target=target, seed=seed)
        for target in TARGETS
        for seed in bench.seeds
    ]
    return [row | {"lr_at_edge": edge} for row in bench.run(final)], tries


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; write FOLDER/frontier.json and FOLDER/frontier.png."""
    args = arguments(argv)
    print(machine())
    began = time.monotonic()
    bench = Bench(args)
    scales = bench.rows.scales()
    sides = sides_of(args, scales)
    for name in dict.fromkeys(side.name for side in sides):
        python_of(name)
    print(f"activations and environments after {time.monotonic() - began:.0f} s", flush=True)
    rows: list[Row] = []
    tries: list[Row] = []
    for side in sides:
        found, tried = frontier_of(bench, side, scales)
        rows, tries = rows + found, tries + tried
    if args.ce_tokens:
        seed = bench.seeds[len(bench.seeds) // 2]
        middle = {row["name"]: load_made(bench.out / row["name"], bench.shape) for row in rows if row["seed"] == seed}
        for name, value in bench.rows.ce_recovered(middle, args.ce_tokens).items():
            next(row for row in rows if row["name"] == name)["ce_recovered"] = value
    judged = verdicts(rows, TARGETS)
    hook = f"{args.hook}, {args.d_sae:,} features, {args.steps} steps of {args.batch_size:,}"
    show(rows, judged, hook)
    picture(rows, bench.folder / "frontier.png", hook)
    worst = max(max(row["difference"].values()) for row in rows)
    print(f"Largest difference between our evaluator and a side's own: {worst:.1e} (at most {AGREEMENT:g}).")
    settings = {name: str(value) for name, value in vars(args).items()}
    document = {"settings": settings, "machine": machine(), "rows": rows, "tuning": tries, "verdicts": judged}
    (bench.folder / "frontier.json").write_text(json.dumps(document, indent=1))
    print(f"{bench.folder}/frontier.json and frontier.png after {time.monotonic() - began:.0f} s")
    return 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `--small` replaces the sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where everything is kept")
    parser.add_argument("--small", action="store_true", help="a few steps of small SAEs, to see that all sides run")
    parser.add_argument("--kinds", nargs="+", default=["standard", "topk"], help="also batchtopk, gated, ... (ours)")
    parser.add_argument("--sides", nargs="+", default=list(RUNNERS), help="only these; the rest is added by later runs")
    parser.add_argument("--extend", action="store_true", help="a fourth learning rate where the best is at an end")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--hook", default="model.layers.15.mlp.down_proj")
    parser.add_argument("--text", default="builtin", help="a text file; by default the built-in text")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--d-sae", type=int, default=2304)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--held-out", type=int, default=16_384, help="held-out rows")
    parser.add_argument("--ce-tokens", type=int, default=2048, help="tokens for CE recovered, one seed; 0 for none")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    if args.small:
        args.steps, args.batch_size, args.d_sae, args.seeds = 24, 256, 576, 2
        args.held_out, args.ce_tokens = 1024, min(args.ce_tokens, 256)
    args.folder = args.folder.resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    return args


if __name__ == "__main__":
    sys.exit(main())
