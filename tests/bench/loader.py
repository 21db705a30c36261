"""How fast the loader is beside a plain sequential read of the same block files, and how well it shuffles.

    python -m tests.bench.loader [--gib 1] [--d-in 2560] [--shuffle-tokens 50000] [--evict]

Each repeat reads the files plainly (every block into new memory; the same with a sha256; into one reused buffer), then
streams two epochs through the loader, the first of which verifies the sha256 of every block, then one epoch of a new
stream whose blocks are verified already. The goal, 0.8, holds the verified epoch against the plain read with sha256,
for a core hashes 1.8 GB/s whoever asks, and the others against the plain read. With `--shuffle-tokens` so large that
one pool holds everything, nothing overlaps in the first epoch, and later ones come from memory.

Rates are bytes of block files per second of wall time; ratios are medians over repeats, within the same repeat. CPU
time is that of all threads, and tells more where other programs share the cores. `--evict` drops the files from the
page cache before each pass that reads them.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from midiscover.store import blocks, layout
from midiscover.store.blocks import HookManifest, block_plan, commit_block, write_manifest
from midiscover.store.loader import ActivationStream
from midiscover.store.local import LocalStorage
from midiscover.store.order import shuffle_quality

GOAL = 0.8
HARVEST, HOOK = "h.0000000000", "model.layers.0.mlp.fc2"


class Cost(NamedTuple):
    """Seconds of one pass."""

    wall: float
    cpu: float


def main(argv: list[str] | None = None) -> int:
    """Print the tables; the exit code is 1 where the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the blocks in GiB")
    parser.add_argument("--d-in", type=int, default=2560)
    parser.add_argument("--context-size", type=int, default=128)
    parser.add_argument("--block-tokens", type=int, default=12_288)
    parser.add_argument("--shuffle-tokens", type=int, nargs="+", default=[50_000])
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--evict", action="store_true", help="read from disk instead of the page cache")
    parser.add_argument("--folder", type=Path, help="where the blocks are written; a temporary folder by default")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        storage = LocalStorage(Path(folder))
        manifest = _harvest(storage, args)
        worst = [_report(storage, manifest, shuffle_tokens, args) for shuffle_tokens in args.shuffle_tokens]
    return 0 if min(worst) >= GOAL else 1


def _harvest(storage: LocalStorage, args: argparse.Namespace) -> HookManifest:
    windows = max(1, round(args.gib * 2**30 / (2 * args.d_in * args.context_size)))
    plan = block_plan(windows, 0, context_size=args.context_size, block_tokens=args.block_tokens)
    generator = torch.Generator().manual_seed(0)
    rows = {}
    for span in plan:
        count = (span.stop_window - span.start_window) * args.context_size
        acts = torch.randn(count, args.d_in, generator=generator).bfloat16()
        mask = torch.zeros(count, dtype=torch.uint8)
        mask[:: args.context_size] = blocks.Mask.SPECIAL
        rows[span.index] = commit_block(storage, HARVEST, HOOK, span, acts, acts.float().norm(dim=1), mask)
    return write_manifest(storage, HARVEST, HOOK, plan, rows, lineage={})


def _report(storage: LocalStorage, manifest: HookManifest, shuffle_tokens: int, args: argparse.Namespace) -> float:
    """Measure and print one pool size; returns the lowest of the ratios that have a goal."""
    paths = [storage.local_path(layout.block_file(HARVEST, HOOK, row.file)) for row in manifest.blocks]
    size = sum(row.bytes for row in manifest.blocks)
    columns: dict[str, list[Cost]] = {
        name: [] for name in ("plain", "hashed", "reused", "first", "second", "unverified")
    }
    for _ in range(args.repeats):
        for name, read in (("plain", _plain), ("hashed", _hashed), ("reused", _reused)):
            _evict(paths, args.evict)
            columns[name].append(_timed(lambda read=read: read(paths)))
        _evict(paths, args.evict)
        for name, cost in zip(("first", "second"), _epochs(storage, manifest, shuffle_tokens, args), strict=True):
            columns[name].append(cost)
        _evict(paths, args.evict)
        columns["unverified"].append(
            _timed(lambda: _exhaust(_stream(storage, manifest, shuffle_tokens, args, epochs=1)))
        )
    stream = _stream(storage, manifest, shuffle_tokens, args)
    table = Table(
        "pass", "GB/s", "CPU s/GB", "/ plain", "/ plain with sha256",
        title=f"{size / 2**30:.2f} GiB, d_in {manifest.d_in}, pools of {shuffle_tokens:,} rows, "
        f"batch {args.batch_size:,}, {'disk' if args.evict else 'page cache'}, {torch.get_num_threads()} torch threads",
    )  # fmt: skip
    labels = {
        "plain": "plain read, new memory",
        "hashed": "plain read with sha256, new memory",
        "reused": "plain read, reused buffer",
        "first": "loader, first epoch (sha256 verified)",
        "second": "loader, second epoch",
        "unverified": "loader, first epoch of a new stream, verified before",
    }
    for name, label in labels.items():
        rate = size / statistics.median(cost.wall for cost in columns[name]) / 1e9
        cpu = statistics.median(cost.cpu for cost in columns[name]) / (size / 1e9)
        table.add_row(
            label, f"{rate:.2f}", f"{cpu:.2f}", *(f"{_ratio(columns, name, base):.2f}" for base in ("plain", "hashed"))
        )
    console = Console(width=110)
    console.print(table)
    quality = shuffle_quality(manifest, batch_size=args.batch_size, shuffle_tokens=shuffle_tokens)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    console.print(
        f"same-window batch-mates per row: {quality.mates:.3f}; ideal of the pool {quality.ideal_pool:.3f}, "
        f"of all rows {quality.ideal_all:.3f}. Pools hold {stream.buffer_bytes / 2**30:.2f} GiB; peak memory of the "
        f"process {peak:.2f} GiB.\n"
    )
    goals = (("first", "hashed"), ("second", "plain"), ("unverified", "plain"))
    return min(_ratio(columns, name, base) for name, base in goals)


def _ratio(columns: dict[str, list[Cost]], name: str, base: str) -> float:
    """Speed of `name` over speed of `base`, median over repeats."""
    return statistics.median(b.wall / a.wall for a, b in zip(columns[name], columns[base], strict=True))


def _stream(
    storage: LocalStorage, manifest: HookManifest, shuffle_tokens: int, args: argparse.Namespace, epochs: int = 2
) -> ActivationStream:
    return ActivationStream(
        storage, manifest, batch_size=args.batch_size, epochs=epochs, seed=0, shuffle_tokens=shuffle_tokens
    )


def _exhaust(stream: ActivationStream) -> None:
    for _ in stream:
        continue


def _epochs(
    storage: LocalStorage, manifest: HookManifest, shuffle_tokens: int, args: argparse.Namespace
) -> tuple[Cost, Cost]:
    """Cost of the first epoch, as in a new process, and of the second."""
    blocks._verified.clear()
    stream = _stream(storage, manifest, shuffle_tokens, args)
    marks = [_now()]
    for number, _ in enumerate(stream, 1):
        if number in (len(stream) // 2, len(stream)):
            marks.append(_now())
    first, second = (Cost(b.wall - a.wall, b.cpu - a.cpu) for a, b in pairwise(marks))
    return first, second


def _plain(paths: list[Path]) -> None:
    for path in paths:
        data = bytearray(path.stat().st_size)
        with path.open("rb", buffering=0) as file:
            file.readinto(data)
        torch.frombuffer(data, dtype=torch.bfloat16, count=len(data) // 2)


def _hashed(paths: list[Path]) -> None:
    for path in paths:
        data = bytearray(path.stat().st_size)
        with path.open("rb", buffering=0) as file:
            file.readinto(data)
        hashlib.sha256(data).hexdigest()
        torch.frombuffer(data, dtype=torch.bfloat16, count=len(data) // 2)


def _reused(paths: list[Path]) -> None:
    data = bytearray(max(path.stat().st_size for path in paths))
    for path in paths:
        with path.open("rb", buffering=0) as file:
            file.readinto(data)
        torch.frombuffer(data, dtype=torch.bfloat16, count=len(data) // 2)


def _timed(action: Callable[[], None]) -> Cost:
    began = _now()
    action()
    ended = _now()
    return Cost(ended.wall - began.wall, ended.cpu - began.cpu)


def _now() -> Cost:
    return Cost(time.perf_counter(), time.process_time())


def _evict(paths: list[Path], wanted: bool) -> None:
    for path in paths if wanted else ():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    sys.exit(main())
