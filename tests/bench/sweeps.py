"""A whole sweep, from command to trained SAEs: `midiscover sweep` beside SAELens and dictionary_learning.

    python -m tests.bench.sweeps --text sotu.jsonl [--tokens 100000] [--epochs 1] [--ways stream multi ...]

Three layers x three L1 coefficients of the embedded model, 4,608 features, the same text, context, batch and threads;
each side with its own harvest, its own recipe and in its own environment, in turn. Ours is timed until the last SAE is
trained, Ray's start included, its evaluation apart; theirs until the last is saved. All sides in the precision that the
machine multiplies fastest, which --precision sets: the model, and the products of the SAEs.

store, stream  `midiscover sweep`, its activations stored or from a live model
fewer          the same as stream on the first --fewer tokens: how soon it is as good as a peer on all of them
longer         the same as stream for --longer epochs: whether it is as good as a slower peer by then
multi          SAELens' MultiSAETrainingRunner, all SAEs at once
single         one run of SAELens for one SAE of the first hook, times nine: what nine runs would take at least
dictionary     dictionary_learning's trainSAE, a run for each hook, on a stream of ours: see its script

All SAEs are then measured by our evaluator on our held-out rows; FVU is compared at one L0, interpolated between a
side's SAEs of a hook (log-log). Judges nothing: the exit code is 0.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml
from rich.table import Table
from safetensors.torch import load_file

from midiscover import tables
from midiscover.config import ModelConfig
from midiscover.cores import native_bfloat16
from midiscover.evaluate import reconstruction_metrics
from midiscover.models import model_folder, resolve_model
from midiscover.sae.registry import folded_sae
from midiscover.store.blocks import read_manifest
from midiscover.store.loader import iterate_rows
from midiscover.store.storage import open_store
from tests.bench.frontier import Side, environment, python_of
from tests.bench.harvest import machine
from tests.bench.plan import taken
from tests.venvs import checked

LAYERS = (10, 15, 20)
D_IN, D_SAE = 576, 4608
OURS = ("store", "stream", "fewer", "longer")
L1 = {"store": (1.0, 2.0, 4.0), "multi": (2.0, 4.0, 8.0), "dictionary": (0.03, 0.06, 0.12)}
"""Each in its own convention, to end between L0 10 and 200; --l1 WAY=A,B,C sets others."""
THEIR_LR = {"multi": 1.9e-3, "dictionary": 5.7e-3}
"""The best of three at the middle sparsity in tests.bench.frontier, for as many steps and half the width."""
SCRIPTS = {"multi": "run_saelens_sweep.py", "dictionary": "run_dictionary_learning_sweep.py"}
HELD_OUT = 8192


class Run(NamedTuple):
    """One side's sweep."""

    seconds: float
    model_seconds: float
    saes: dict[str, Path]
    """Hook and coefficient -> a SAELens folder, or ours."""


def hooks() -> list[str]:
    """Where the SAEs sit."""
    return [f"model.layers.{layer}.mlp.down_proj" for layer in LAYERS]


def ours(args: argparse.Namespace, folder: Path, way: str) -> Run:
    """`midiscover sweep` into a new store."""
    tokens = args.fewer if way == "fewer" else args.tokens
    config = {
        "name": "bench",
        "model": {"id": "embedded", "dtype": args.precision},
        "corpus": {
            "source": str(args.text),
            "max_tokens": tokens,
            "context_size": 128,
        },
        "harvest": {"hooks": hooks()},
        "sae": {"kind": "standard", "d_sae": D_SAE},
        "grid": {"sae.l1_coefficient": list(args.l1[way])},
        "train": {
            "epochs": args.longer if way == "longer" else args.epochs,
            "batch_size": args.batch_size,
            "dtype": args.precision,
            "lr": args.lr.get(way),
        },
        "evaluate": {"ce_tokens": 0},
        "resources": {"threads": args.threads, "activations": "store" if way == "store" else "stream"},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    times = taken(str(path), folder / "store")
    saes = {}
    for record in (folder / "store" / "saes").glob("*/record.json"):
        told = json.loads(record.read_text())
        saes[f"{told['hook']}.l1-{told['sae']['l1_coefficient']:g}"] = record.parent
    return Run(times.harvest + times.train, times.harvest, saes)


def theirs(args: argparse.Namespace, folder: Path, way: str) -> Run:
    """A peer's own sweep; where `single` is asked for, one SAE of it, times the number of SAEs."""
    tool = "multi" if way == "single" else way
    side = "SAELens" if tool == "multi" else "dictionary_learning"
    job = {
        "way": way, "model": str(model_folder(resolve_model(ModelConfig(id="embedded")))), "precision": args.precision,
        "text": str(args.text), "text_field": "text", "hooks": hooks(), "l1": args.l1[tool], "d_in": D_IN,
        "d_sae": D_SAE, "tokens": args.tokens, "epochs": args.epochs, "batch_size": args.batch_size,
        "context_size": 128, "lr": THEIR_LR[tool], "threads": args.threads, "out": str(folder),
    }  # fmt: skip
    (folder / "job.json").write_text(json.dumps(job))
    script = Path(__file__).with_name("peers") / SCRIPTS[tool]
    there = environment(Side(name=side, kind="standard", variants=(), lr=None), args)
    began = time.monotonic()
    checked([str(python_of(side)), str(script), str(folder / "job.json")], env=there, timeout=7200)
    seconds = time.monotonic() - began
    told = json.loads((folder / "told.json").read_text())
    times = len(LAYERS) * len(args.l1[tool]) if way == "single" else 1
    return Run(times * seconds, times * told["model_seconds"], {name: folder / name for name in told["saes"]})


def points(run: Run, store: Path) -> dict[str, list[tuple[float, float]]]:
    """Hook -> (L0, FVU) of its SAEs on the held-out rows of our store, by rising L0."""
    storage = open_store(str(store))
    found: dict[str, list[tuple[float, float]]] = {}
    (harvest,) = {path.parent.parent.name for path in store.glob("activations/*/*/manifest.json")}
    for name, folder in run.saes.items():
        hook = name.rpartition(".l1-")[0]
        manifest = read_manifest(storage, harvest, hook)
        assert manifest is not None, f"{hook} is harvested"
        batches = iterate_rows(storage, manifest, "held_out", 2048, HELD_OUT)
        sae = folded_sae(json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors"))
        sums = reconstruction_metrics({name: sae}, (batch.float() for batch in batches), torch.tensor(manifest.mean))
        result = sums[name].result()
        found.setdefault(hook, []).append((result["l0"], result["fvu"]))
    return {hook: sorted(pairs) for hook, pairs in found.items()}


def fvu_at(pairs: Sequence[tuple[float, float]], l0: float) -> float:
    """Interpolated, log-log."""
    x, y = np.log(np.array(pairs)).T
    return float(np.exp(np.interp(np.log(l0), x, y)))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="JSON lines with a field `text`")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--fewer", type=int, default=60_000)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--longer", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=320)
    parser.add_argument(
        "--ways", nargs="+", default=["store", "stream", "multi"], choices=[*OURS, "multi", "single", "dictionary"]
    )
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default=None, help="else what is native here")
    parser.add_argument("--l1", nargs="+", default=[], metavar="WAY=A,B,C")
    parser.add_argument("--lr", nargs="+", default=[], metavar="WAY=X", help="of ours; else the recipe's")
    args = parser.parse_args(argv)
    args.text = args.text.resolve()
    args.precision = args.precision or ("bfloat16" if native_bfloat16() else "float32")
    args.lr = {way: float(value) for way, value in (one.split("=") for one in args.lr)}
    given = dict(one.split("=") for one in args.l1)
    args.l1 = L1 | {way: tuple(map(float, values.split(","))) for way, values in given.items()}
    args.l1 |= dict.fromkeys(OURS, args.l1["store"])
    for side in ("SAELens", "dictionary_learning"):
        python_of(side)
    print(machine(), args.precision)
    with tempfile.TemporaryDirectory(prefix="midiscover-sweeps-") as folder:
        runs: dict[str, list[Run]] = {way: [] for way in args.ways}
        for repeat in range(args.repeats):
            for way in args.ways:
                place = Path(folder) / f"{way}-{repeat}"
                place.mkdir()
                runs[way].append((ours if way in OURS else theirs)(args, place, way))
                print(f"{way}: {runs[way][-1].seconds:.0f} s", flush=True)
        _tell(runs, Path(folder), args)
    print(machine())
    return 0


def _tell(runs: dict[str, list[Run]], folder: Path, args: argparse.Namespace) -> None:
    first = next(iter(runs))
    title = f"{len(LAYERS)} layers x {len(L1['store'])} l1, {args.tokens:,} tokens, {args.epochs} epochs"
    table = Table("", "seconds", "of it the model's", f"times {first}", title=title)
    for way, made in runs.items():
        ratios = [one.seconds / own.seconds for own, one in zip(runs[first], made, strict=True)]
        middle = (statistics.median(one.seconds for one in made), statistics.median(one.model_seconds for one in made))
        table.add_row(way, *(f"{value:.0f}" for value in middle), f"{statistics.median(ratios):.2f}")
    tables.show(table)
    stored = folder / "store-0" / "store"  # whose held-out rows all are measured on
    if not stored.is_dir():
        return
    sides = {way: points(made[0], stored) for way, made in runs.items() if way != "single"}
    for way, by_hook in sides.items():
        for hook, pairs in by_hook.items():
            print(way, hook, *(f"L0 {l0:.1f} FVU {fvu:.4f}" for l0, fvu in pairs))
    for own, way in itertools.product(sides.keys() & {"store", "fewer", "longer"}, sides.keys() - set(OURS)):
        for hook, mine in sides[own].items():
            low, high = max(mine[0][0], sides[way][hook][0][0]), min(mine[-1][0], sides[way][hook][-1][0])
            if low < high:
                middle = (low * high) ** 0.5
                ratio = fvu_at(mine, middle) / fvu_at(sides[way][hook], middle)
                print(f"{hook}: at L0 {middle:.0f} the FVU of {own} is {ratio:.3f} of {way}'s")


if __name__ == "__main__":
    sys.exit(main())
