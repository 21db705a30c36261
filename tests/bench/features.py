"""How fast features are collected, beside a loop over features; and whether memory depends on the corpus.

    python -m tests.bench.features [--d-in 2560] [--d-sae 20480] [--tokens 100000] [--l0 50] [--small]

A random SAE whose biases let each feature fire on a share l0 / d_sae of random rows, read from blocks on disk.

- `collect`: the whole of one SAE's pass (`midiscover.features.collect`): statistics, histogram, all contexts, sample.
- `records`: what follows it (`midiscover.features.finish`): logit lens over `--vocabulary` random rows, neighbours,
  correlations, both parquet files. It costs the same whatever the corpus.
- `loop`: what a loop over features does: encode one feature over all rows, then its statistics, histogram and top
  contexts. Measured on `--looped` features and scaled to all; intervals, random contexts and correlations are left out.
- memory: peak resident size of a process that does both for a quarter of `--tokens`, and of one that does for all.

Prints a table and judges nothing: the exit code is 0. Goals: one SAE in minutes, 10 times the loop, flat memory.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from midiscover.config import FeaturesConfig
from midiscover.features.collect import Part, collect_chunk, merged
from midiscover.features.finish import Finisher
from midiscover.features.plan import Plan, plan_features
from midiscover.packing import Windows
from midiscover.sae.base import Sae, bias_for_density
from midiscover.sae.registry import folded_sae
from midiscover.store import blocks
from midiscover.store.blocks import block_plan, commit_block, read_block, read_manifest, write_manifest
from midiscover.store.local import LocalStorage
from tests.bench.harvest import machine

HARVEST, HOOK, CONTEXT = "h.0000000000", "model.layers.0.mlp.fc2", 128
_SHAPE = ("d_in", "d_sae", "l0", "vocabulary")


def write_rows(storage: LocalStorage, tokens: int, d_in: int) -> None:
    """Blocks of random activations."""
    plan = block_plan(-(-tokens // CONTEXT), 0, context_size=CONTEXT, block_tokens=12_288)
    rows = {}
    for span in plan:
        count = (span.stop_window - span.start_window) * CONTEXT
        acts = torch.randn(count, d_in, generator=torch.Generator().manual_seed(span.index)).bfloat16()
        mask = torch.zeros(count, dtype=torch.uint8)
        mask[::CONTEXT] = blocks.Mask.SPECIAL
        rows[span.index] = commit_block(storage, HARVEST, HOOK, span, acts, acts.float().norm(dim=1), mask)
    write_manifest(storage, HARVEST, HOOK, plan, rows, lineage={})


def random_sae(d_in: int, d_sae: int, l0: float) -> Sae:
    """Random directions, and biases with which `l0` features fire on a row, on average."""
    generator = torch.Generator().manual_seed(0)
    decoder = torch.randn(d_sae, d_in, generator=generator)
    decoder /= decoder.norm(dim=1, keepdim=True)
    encoder = decoder.T.contiguous()
    bias = bias_for_density(torch.randn(4096, d_in, generator=generator) @ encoder, l0 / d_sae)
    weights = {"W_enc": encoder, "b_enc": bias, "W_dec": decoder, "b_dec": torch.zeros(d_in)}
    return folded_sae({"architecture": "standard", "d_in": d_in, "d_sae": d_sae}, weights)


def opened(folder: Path, tokens: int) -> tuple[LocalStorage, Plan]:
    """The first `tokens` rows, about, of what was written."""
    storage = LocalStorage(folder)
    manifest = read_manifest(storage, HARVEST, HOOK)
    assert manifest is not None
    plan = plan_features(manifest, FeaturesConfig(max_tokens=10**9))
    kept = plan.blocks[: max(1, round(len(plan.blocks) * tokens / plan.rows))]
    return storage, Plan(manifest=manifest, blocks=kept, settings=plan.settings)


def collect(folder: Path, tokens: int, sae: Sae) -> tuple[Part, float]:
    """A part of all rows, and seconds; chunk by chunk, as the job does it."""
    storage, plan = opened(folder, tokens)
    began = time.perf_counter()
    part = merged(collect_chunk(storage, {"sae": sae}, plan, chunk)["sae"] for chunk in plan.chunks())
    return part, time.perf_counter() - began


def random_corpus(windows: int, vocabulary: int) -> Any:
    """What records need of a corpus: windows of random ids, all of one document."""
    ids = torch.randint(vocabulary, (windows, CONTEXT), generator=torch.Generator().manual_seed(0)).int().numpy()
    shard = SimpleNamespace(start_window=0, stop_window=windows)
    manifest = SimpleNamespace(id="c.0000000000", shards=[shard])
    return SimpleNamespace(manifest=manifest, windows=lambda a, b: Windows(ids[a:b], 0 * ids[a:b]))


def records(folder: Path, tokens: int, sae: Sae, part: Part, vocabulary: int) -> float:
    """Seconds to write the records of a part."""
    storage, plan = opened(folder, tokens)
    began = time.perf_counter()
    Finisher(
        storage=storage,
        sae_id="bench",
        sae=sae,
        plan=plan,
        corpus=random_corpus(plan.blocks[-1].stop_window, vocabulary),
        strings=lambda ids: [f"token {token}" for token in ids],
        unembedding=torch.randn(vocabulary, sae.d_out, generator=torch.Generator().manual_seed(1)).bfloat16(),
    ).finish(part)
    return time.perf_counter() - began


@torch.no_grad()
def loop(folder: Path, tokens: int, sae: Sae, looped: int) -> float:
    """Seconds for `looped` features, one after another, over rows that are in memory already."""
    storage, plan = opened(folder, tokens)
    x = torch.cat([read_block(storage, HARVEST, HOOK, row).acts for row in plan.blocks]).float()
    began = time.perf_counter()
    for f in range(looped):
        values = torch.relu(x @ sae.W_enc[:, f] + sae.b_enc[f])
        fired = values[values > 0]
        if len(fired):
            torch.histc(fired, 50)
            _ = fired.mean(), fired.std(), fired.quantile(torch.tensor([0.25, 0.5, 0.75, 0.9, 0.95, 0.99]))
            windows = values.view(-1, CONTEXT)
            best = windows.amax(1).topk(min(20, len(windows))).indices
            _ = [windows[window].clone() for window in best.tolist()]
    return time.perf_counter() - began


def peak(folder: Path, tokens: int, args: argparse.Namespace) -> float:
    """GiB of a process of its own that makes the records of `tokens` rows."""
    given = {"child": folder, "tokens": tokens} | {name: getattr(args, name) for name in _SHAPE}
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "tests.bench.features", *words]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, default=2560)
    parser.add_argument("--d-sae", type=int, default=20_480)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--l0", type=float, default=50)
    parser.add_argument("--vocabulary", type=int, default=51_200)
    parser.add_argument("--looped", type=int, default=50, help="features of the loop")
    parser.add_argument("--small", action="store_true", help="a small SAE and few tokens")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.small:
        args.d_in, args.d_sae, args.tokens, args.vocabulary = 256, 2048, 25_000, 5000
    sae = random_sae(args.d_in, args.d_sae, args.l0)
    if args.child is not None:
        part, _ = collect(args.child, args.tokens, sae)
        records(args.child, args.tokens, sae, part, args.vocabulary)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(LocalStorage(folder), args.tokens, args.d_in)
        part, seconds = collect(folder, args.tokens, sae)
        written = records(folder, args.tokens, sae, part, args.vocabulary)
        looped = loop(folder, args.tokens, sae, args.looped) * args.d_sae / args.looped
        peaks = [peak(folder, tokens, args) for tokens in (args.tokens // 4, args.tokens)]
    rows = part.rows
    flops = 2 * args.d_in * args.d_sae * rows
    title = f"{args.d_sae:,} features, d_in {args.d_in:,}, {rows:,} tokens, L0 {args.l0:g}; {machine()}"
    table = Table("", "seconds", "tokens/s", "against the loop", title=title)
    times = {"collect, all of it": seconds, "records": written, "both": seconds + written}
    for name, cost in times.items():
        table.add_row(name, f"{cost:.1f}", f"{rows / cost:,.0f}", f"{looped / cost:.1f}")
    table.add_row(f"loop over features (x {args.d_sae // args.looped})", f"{looped:.1f}", f"{rows / looped:,.0f}", "1")
    Console(width=110).print(table)
    print(f"Dense encode alone is {flops / 1e12:.2f} TFLOP: {flops / seconds / 1e9:.0f} GFLOP/s of it reached in all.")
    print(f"Peak memory: {peaks[0]:.2f} GiB at {args.tokens // 4:,} tokens, {peaks[1]:.2f} GiB at {args.tokens:,}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
