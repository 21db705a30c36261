"""What the recipe of learning rates and the initial densities rest on: short trainings around them, for each kind.

    python -m tests.bench.recipes --folder FOLDER [--text FILE] [--kinds standard topk ...] [--densities] [--small]
    python -m tests.bench.recipes --folder FOLDER --tables        # what is there so far, trains nothing

Corpora: the built-in text, then FILE. Three layers of the embedded model, 120,000 tokens of each corpus, two epochs in
batches of 1,024, 2,304 features, seed 0, L0 60 (k, or the target that a penalty is steered to); other sizes by flags.
The learning rate is the recipe's times 1/2, 1 and 2, or what --factors says; with --densities it is the recipe's, and
the initial density of kinds with a penalty is null, 0.02, 0.05 and 0.1. Transcoders read the input of the MLP and
predict its output.

Held-out rows are judged on the folded weights. A penalty, and the threshold of BatchTopK, end near L0 60, not at it:
FVU is moved to L0 60 along L0^-0.4 before anything is compared, and the tables show it moved. A training that diverged,
or that ended a factor of 2 or more off, comes last. Results made with other settings have a table of their own.

FOLDER keeps the activations and every result: a second run goes on where the first ended. It does not see a change of
the training's code, only of its settings; after such a change name a new folder. Judges nothing: the exit code is 0.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from rich import box
from rich.table import Table
from torch import Tensor

from midiscover import tables
from midiscover.config import TrainConfig
from midiscover.configio import build_config, load_config
from midiscover.evaluate import reconstruction_metrics
from midiscover.ids import fingerprint
from midiscover.resolve import Resolved, resolve
from midiscover.sae.registry import ARCHITECTURES, folded_sae
from midiscover.sae.schedule import peak_lr
from midiscover.saeconfig import SAE_KINDS, PenaltyConfig, SaeConfig
from midiscover.source import harvested, iterate_pairs, open_source
from midiscover.store.blocks import read_manifest
from midiscover.store.loader import iterate_rows
from midiscover.store.storage import open_store
from midiscover.train import Member, Pair, Trained, train
from tests.bench.gpu_planted import Worker
from tests.bench.harvest import machine

ROOT = Path(__file__).parents[2]
KINDS = ("standard", "gated", "jumprelu", "topk", "batchtopk", "matryoshka_batchtopk")
LAYERS = (10, 15, 20)
FACTORS = (0.5, 1.0, 2.0)
DENSITIES = (None, 0.02, 0.05, 0.1)
FVU_SLOPE = 0.4
"""FVU falls with L0^-0.4; the demo's frontier at layer 15 has -0.37."""
FAR = 2.0
"""Factor off the L0 asked for from which an FVU can't be moved there."""
EARLY = 0.05
"""Share of the steps after which L0 is looked at."""
REFERENCE_STEPS = 200
ROWS_PER_BATCH = 4096

Row = dict[str, Any]


class Sizes(NamedTuple):
    """What all trainings of a run share."""

    tokens: int
    d_sae: int
    batch_size: int
    epochs: int
    l0: int


LARGE = Sizes(tokens=120_000, d_sae=2304, batch_size=1024, epochs=2, l0=60)
SMALL = Sizes(tokens=16_000, d_sae=576, batch_size=256, epochs=2, l0=20)


@dataclass(frozen=True, kw_only=True)
class Try:
    """One training: the hook it reads aside, what it is made with."""

    corpus: str
    layer: int
    kind: str
    factor: float
    """Learning rate as a multiple of the recipe's."""
    density: float | None = None
    """Initial density, of a kind with a penalty."""

    @property
    def name(self) -> str:
        density = f".density-{self.density or 'null'}" if has_penalty(self.kind) else ""
        return f"{self.corpus}.l{self.layer}.lr-{self.factor:g}{density}"


def has_penalty(kind: str) -> bool:
    """Whether a kind's sparsity is a penalty's doing."""
    return issubclass(SAE_KINDS[kind], PenaltyConfig)


def transcodes(kind: str) -> bool:
    """Whether a kind reads one hook and predicts another."""
    return ARCHITECTURES[kind].transcodes


def sae_config(kind: str, sizes: Sizes, **given: Any) -> SaeConfig:
    """The kind's defaults at this width and L0."""
    sparsity = {"target_l0": sizes.l0} if has_penalty(kind) else {"k": sizes.l0}
    return SAE_KINDS[kind](d_sae=sizes.d_sae, **sparsity, **given)


def config_tree(args: argparse.Namespace, source: str, kind: str) -> dict[str, Any]:
    """The run that harvests what `kind` reads, and that says how all trainings are made."""
    sizes: Sizes = args.sizes
    braces = "{" + ",".join(map(str, args.layers)) + "}"
    side = "mlp:in" if transcodes(kind) else "mlp.down_proj"
    return {
        "name": "recipes",
        "model": {"id": "embedded", "dtype": "auto"},
        "corpus": {"source": source, "max_tokens": sizes.tokens, "context_size": 128},
        "harvest": {"hooks": f"model.layers.{braces}.{side}"},
        "sae": {"kind": kind},
        "train": {
            "epochs": sizes.epochs,
            "batch_size": sizes.batch_size,
            "dtype": "auto",
            "report_every": 1,
            "checkpoint_every": 1e9,
        },
        "resources": {"threads": args.threads, "harvest_actors": 1},
    }


def settings_of(args: argparse.Namespace, kind: str) -> dict[str, Any]:
    """All that the results of one kind depend on besides what a `Try` says."""
    sae, common = asdict(sae_config(kind, args.sizes)), build_config(config_tree(args, "builtin", kind)).train
    sae.pop("initial_density", None)
    recipe = peak_lr(common, d_sae=args.sizes.d_sae, steps=REFERENCE_STEPS)
    return {"tokens": args.sizes.tokens, "sae": sae, "train": asdict(common), "recipe_lr_at_200_steps": recipe}


def results_of(args: argparse.Namespace, kind: str) -> Path:
    """The folder of a kind's results under the present settings; made, with the settings in it, by a run."""
    return args.folder / "results" / f"{kind}.{fingerprint('recipes', 1, settings_of(args, kind))}"


class Corpus:
    """One text's activations at the hooks that a group of kinds reads."""

    def __init__(self, args: argparse.Namespace, label: str, source: str, kind: str) -> None:
        """`midiscover harvest` of a small config, unless the store has it all."""
        path = args.folder / f"{label}.{'pairs' if transcodes(kind) else 'rows'}.yaml"
        path.write_text(yaml.safe_dump(config_tree(args, source, kind)))
        store = str(args.folder / f"store-{label}")
        self.resolved: Resolved = resolve(load_config(path))
        self.storage = open_store(store)
        harvest = self.resolved.harvest_id
        if any(read_manifest(self.storage, harvest, hook) is None for hook in self.resolved.hooks):
            command = [sys.executable, "-m", "midiscover.cli", "harvest", str(path), "--store", store]
            subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
        self.hooks = {
            layer: (sae.point.hook, sae.output_hook) for layer, sae in zip(args.layers, self.resolved.saes, strict=True)
        }
        self.held: dict[int, tuple[list[Tensor | Pair], Tensor]] = {}

    def held_out(self, layer: int) -> tuple[list[Tensor | Pair], Tensor]:
        """All usable held-out rows, or pairs, in batches, and the training rows' mean of what is reconstructed."""
        if layer not in self.held:
            inputs, outputs = (harvested(self.storage, self.resolved.harvest_id, hook) for hook in self.hooks[layer])
            rows: Iterator[Tensor | Pair]
            if inputs.hook == outputs.hook:
                rows = iter(iterate_rows(self.storage, inputs, "held_out", ROWS_PER_BATCH))
            else:
                rows = iterate_pairs(self.storage, inputs, outputs, "held_out", ROWS_PER_BATCH)
            self.held[layer] = list(rows), torch.tensor(outputs.mean)
        return self.held[layer]

    def measured(self, each: Try, config: SaeConfig, d_sae: int) -> Row:
        """Train one SAE and measure it; `fvu` is None where it diverged."""
        common: TrainConfig = self.resolved.config.train
        hook, output = self.hooks[each.layer]
        source = open_source(self.storage, self.resolved.harvest_id, hook, output, common)
        steps = len(source)
        recipe = peak_lr(common, d_sae=d_sae, steps=steps)
        settings = replace(common, lr=recipe * each.factor)
        began = time.monotonic()
        (made,) = train(
            [Member(id="sae", config=config, train=settings, d_sae=d_sae)], source, Worker(torch.device("cpu"))
        )
        row = asdict(each) | {"lr": settings.lr, "steps": steps, "seconds": time.monotonic() - began, "d_sae": d_sae}
        if not isinstance(made, Trained):
            return row | {"fvu": None, "l0": None, "dead_share": None, "l0_early": None, "coefficient": None}
        shape = {"d_in": made.sae.d_in, "d_sae": d_sae, "architecture": made.sae.saelens_architecture}
        sae = folded_sae(shape | made.sae.saelens_fields(), made.weights)
        rows, mean = self.held_out(each.layer)
        metrics = reconstruction_metrics({"sae": sae}, rows, mean)["sae"].result()
        return row | {
            "fvu": metrics["fvu"],
            "l0": metrics["l0"],
            "dead_share": metrics["dead_share"],
            "l0_early": made.history["l0"][round(EARLY * steps)],
            "coefficient": made.coefficient,
            "held_out": metrics["tokens"],
        }


def tries_of(args: argparse.Namespace, corpus: str, kind: str) -> list[Try]:
    """What is asked for of one kind on one corpus. The recipe's own point is in both modes."""
    if args.densities and not has_penalty(kind):
        return []
    default = getattr(SAE_KINDS[kind](), "initial_density", None)
    points = [(1.0, density) for density in DENSITIES] if args.densities else [(f, default) for f in args.factors]
    return [
        Try(corpus=corpus, layer=layer, kind=kind, factor=factor, density=density)
        for layer in args.layers
        for factor, density in points
    ]


def run(args: argparse.Namespace) -> None:
    """Make every result that is not there, one corpus after the other."""
    for label, source in args.corpora.items():
        corpora: dict[bool, Corpus] = {}
        for kind in args.kinds:
            results = results_of(args, kind)
            results.mkdir(parents=True, exist_ok=True)
            default = getattr(SAE_KINDS[kind](), "initial_density", None)
            about = {"sizes": args.sizes._asdict(), "initial_density": default, "settings": settings_of(args, kind)}
            (results / "settings.json").write_text(json.dumps(about, indent=1))
            for each in tries_of(args, label, kind):
                path = results / f"{each.name}.json"
                if path.exists():
                    continue
                group = transcodes(kind)
                if group not in corpora:
                    corpora[group] = Corpus(args, label, source, kind)
                given = {"initial_density": each.density} if has_penalty(kind) else {}
                row = corpora[group].measured(each, sae_config(kind, args.sizes, **given), args.sizes.d_sae)
                partial = path.with_suffix(".partial")
                partial.write_text(json.dumps(row, indent=1))
                partial.rename(path)
                print(f"{kind}.{each.name}: {cell(row, args.sizes.l0)}, {row['seconds']:.0f} s", flush=True)


def compared(row: Row, l0: float) -> float:
    """The FVU that counts, moved to `l0`; infinite where the training diverged or ended too far off."""
    if row["fvu"] is None or not math.isfinite(row["fvu"]) or not l0 / FAR < row["l0"] < l0 * FAR:
        return math.inf
    return row["fvu"] * (row["l0"] / l0) ** FVU_SLOPE


def cell(row: Row, l0: float) -> str:
    """FVU as compared, and in brackets L0 and the share of dead features."""
    if row["fvu"] is None:
        return "diverged"
    value = compared(row, l0)
    shown = f"{value:.4f}" if math.isfinite(value) else "far"
    return f"{shown} ({row['l0']:.1f}, {row['dead_share']:.0%})"


def table_of(title: str, rows: Sequence[Row], axis: str, values: Sequence[Any], reference: Any, l0: float) -> Table:
    """One kind's table: a line per corpus and layer, a column per value of `axis`, and under them what they come to.

    Rank and ratio (FVU over that in the column of `reference`, geometric mean) are over the lines that are complete.
    """
    heads = ["null" if value is None else f"{value:g}" for value in values]
    table = Table("corpus", "layer", *heads, title=title, box=box.SIMPLE_HEAD)
    lines: dict[tuple[str, int], dict[Any, Row]] = {}
    for row in sorted(rows, key=lambda row: (row["corpus"] != "builtin", row["corpus"], row["layer"])):
        lines.setdefault((row["corpus"], row["layer"]), {})[row[axis]] = row
    complete: list[list[float]] = []
    for (corpus, layer), line in lines.items():
        fvus = {value: compared(line[value], l0) for value in values if value in line}
        whole = len(fvus) == len(values)
        best = min(fvus, key=lambda value: fvus[value]) if whole else "-"
        shown = [cell(line[v], l0) + ("*" if v == best else "") if v in line else "-" for v in values]
        table.add_row(corpus, str(layer), *shown, end_section=(corpus, layer) == list(lines)[-1])
        if whole:
            complete.append(list(fvus.values()))

    def foot(name: str, text: Callable[[int], str]) -> None:
        table.add_row(name, "", *(text(i) for i in range(len(values))))

    if complete:
        at = list(values).index(reference) if reference in values else 0
        foot("mean rank", lambda i: f"{sum(rank(line, i) for line in complete) / len(complete):.2f}")
        foot(f"FVU / {heads[at]}'s", lambda i: f"{geometric([line[i] / line[at] for line in complete]):.4f}")
    early = [[row["l0_early"] / row["d_sae"] for row in rows if row[axis] == v and row["l0_early"]] for v in values]
    foot("L0 early, at most", lambda i: f"{max(early[i]):.1%} of features" if early[i] else "-")
    return table


def rank(line: Sequence[float], i: int) -> float:
    """Place of entry `i`, 1 for the lowest; equals share the mean of their places."""
    below, same = sum(other < line[i] for other in line), sum(other == line[i] for other in line)
    return below + (same + 1) / 2


def geometric(ratios: Sequence[float]) -> float:
    """Geometric mean; infinite with an infinite ratio, NaN where the reference itself is infinite."""
    return math.exp(sum(math.log(r) if r > 0 else math.nan for r in ratios) / len(ratios))


def show(args: argparse.Namespace) -> None:
    """Print the tables of all results in the folder, those of other settings too."""
    print("FVU, moved to the L0 asked for along L0^-0.4 (L0 as measured, dead features); * the best of its line.")
    print(f"'L0 early': features per token in the batch at {EARLY:.0%} of the steps, as a share of all features.")
    for kind in args.kinds:
        for results in sorted((args.folder / "results").glob(f"{kind}.*")):
            about: Mapping[str, Any] = json.loads((results / "settings.json").read_text())
            rows = [json.loads(path.read_text()) for path in sorted(results.glob("*.lr-*.json"))]
            other = "" if results == results_of(args, kind) else f" (other settings: {results.name})"
            l0, default = about["sizes"]["l0"], about["initial_density"]
            usual = [row for row in rows if row["density"] == default]
            if len({row["factor"] for row in usual}) > 1:
                title = f"{kind}{other}: learning rate over the recipe's"
                factors = sorted({row["factor"] for row in usual})
                tables.show(table_of(title, usual, "factor", factors, 1.0, l0))
            at_recipe = [row for row in rows if row["factor"] == 1]
            if len({row["density"] for row in at_recipe}) > 1:
                title = f"{kind}{other}: initial density"
                tables.show(table_of(title, at_recipe, "density", DENSITIES, default, l0))


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing, then print the tables."""
    args = arguments(argv)
    print(machine())
    if not args.tables:
        run(args)
    show(args)
    return 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `sizes` and `corpora` follow from it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where everything is kept")
    parser.add_argument("--text", type=Path, help="the second corpus: a text, jsonl or parquet file")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=list(SAE_KINDS), metavar="KIND")
    parser.add_argument("--layers", nargs="+", type=int, default=LAYERS)
    parser.add_argument("--factors", nargs="+", type=float, default=FACTORS, help="learning rates over the recipe's")
    parser.add_argument("--densities", action="store_true", help="initial densities instead of learning rates")
    parser.add_argument("--tables", action="store_true", help="print what is there so far, and end")
    parser.add_argument("--small", action="store_true", help="a few steps of small SAEs, to see that it runs")
    parser.add_argument("--threads", type=int, default=1)
    for name in Sizes._fields:
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, help=f"instead of {getattr(LARGE, name):,}")
    args = parser.parse_args(argv)
    given = {name: value for name in Sizes._fields if (value := getattr(args, name)) is not None}
    args.sizes = (SMALL if args.small else LARGE)._replace(**given)
    args.corpora = {"builtin": "builtin"}
    if args.text:
        args.corpora[args.text.stem] = str(args.text.resolve())
    args.folder = args.folder.resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    return args


if __name__ == "__main__":
    sys.exit(main())
