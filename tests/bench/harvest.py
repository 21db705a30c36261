"""How fast the harvest on Ray is beside bare loops over the same model, spans and block writer.

    python -m tests.bench.harvest [--tokens 60000] [--model FOLDER] [--repeats 3]

Three loops, one after the other in each repeat, each with a new model and without blocks to find:

ray      `jobs.harvest.harvest`, as a run calls it: Ray Data, one actor, leases of spans, the board.
bare     `Harvester.run` in one process: the same passes and the same background writer, without Ray.
naive    what one would write first: transformers' own model with forward hooks, each block committed before the next
         pass begins. It too stops after the last hook.

Steady rates count the tokens after the first finished batch, until the last one. A whole job goes from the call of the
stage (Ray runs already; the bare loops have their libraries imported, an actor has not) until the manifests stand.
Ratios are medians over repeats, within the same repeat. Tokens per CPU second are those of the loop's own process from
the first batch to the last, and tell more where other programs share the cores. The bound is the time of the model's
multiplications alone, at the rate that plain products of the shapes of its last hooked layer reach here. Judges
nothing: the exit code is 0.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from unittest.mock import patch

import numpy as np
import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn
from torch.utils import benchmark

from jobs.board import Board, watched
from jobs.harvest import ModelPlace, commit_manifests, ensure_corpus, harvest, missing_spans, model_place
from jobs.progress import Bars
from jobs.runtime import Cluster, Node, Slots, cores, ray_session
from midiscover import tables
from midiscover.config import CorpusConfig, HarvestConfig, ModelConfig, ResourcesConfig, RunConfig
from midiscover.corpus import Corpus, CorpusManifest, find_corpus
from midiscover.harvest import Harvester, HarvestJob
from midiscover.ids import hook_layer
from midiscover.launch import JobArgs, Prepared
from midiscover.models import hook_table, resolve_model
from midiscover.reading import CPU_BATCH_TOKENS, position_mask, row_mask
from midiscover.resolve import Resolved, resolve
from midiscover.store import layout
from midiscover.store.blocks import commit_block, commit_tokens, read_manifest
from midiscover.store.manifest import BlockSpan
from midiscover.store.storage import Storage, open_store
from midiscover.tracking import Tracker

GOAL, FLOOR = 0.93, 0.85
MATMUL_SECONDS = 3.0
LOOPS = ("ray", "bare", "naive")
BASE = "bare"
NO_CLUSTER = Cluster(local=True, cores=cores(), nodes=(Node(max(cores() + 1, 4), 0),))
T = TypeVar("T")


class Batch(NamedTuple):
    """A finished batch, as the process that ran it saw it."""

    at: float
    cpu: float
    """CPU seconds of that process so far."""
    tokens: int


class Run(NamedTuple):
    """One loop in one repeat; times are seconds of the monotonic clock, which all processes share."""

    began: float
    ended: float
    batches: list[Batch]
    digests: list[str]
    """sha256 of every block, for the loops must write the same."""

    @property
    def tokens(self) -> int:
        return sum(batch.tokens for batch in self.batches)

    @property
    def steady(self) -> float:
        """Tokens per second from the first to the last finished batch."""
        return self._after_first / (self.batches[-1].at - self.batches[0].at)

    @property
    def per_cpu(self) -> float:
        """Tokens per CPU second of the loop's process, over the same time."""
        return self._after_first / (self.batches[-1].cpu - self.batches[0].cpu)

    @property
    def seconds(self) -> float:
        """From the call to the manifests."""
        return self.ended - self.began

    @property
    def _after_first(self) -> int:
        return self.tokens - self.batches[0].tokens


class StampedBoard(Board):
    """The board of a harvest, which also writes down when a worker posts: the driver looks only every 0.3 s."""

    def __init__(self, board: Board, path: Path) -> None:
        super().__init__(board.actor)
        self.path = path

    def post(self, kind: str, key: str, data: Any = None) -> None:
        super().post(kind, key, data)
        stamp(self.path, data)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What every loop needs; pickles."""

    resolved: Resolved
    storage: Storage
    place: ModelPlace
    stamps: Path

    @property
    def corpus(self) -> CorpusManifest:
        found = find_corpus(self.storage, self.resolved.corpus_id)
        assert found is not None, "made before any loop runs"
        return found

    @property
    def job(self) -> HarvestJob:
        resolved = self.resolved
        return HarvestJob(harvest_id=resolved.harvest_id, hooks=resolved.hooks, config=resolved.config.harvest)

    @property
    def batch_tokens(self) -> int:
        return self.resolved.config.harvest.batch_tokens or CPU_BATCH_TOKENS

    @contextmanager
    def prepared(self) -> Iterator[Prepared]:
        """The run as a driver holds it; its tracker, which a harvest does not use, lies beside the store."""
        address = f"sqlite:///{self.stamps.with_name('tracker.sqlite')}"
        with closing(Tracker.open(address, self.storage)) as tracker:
            yield Prepared(args=JobArgs(config="bench"), resolved=self.resolved, storage=self.storage, tracker=tracker)

    @property
    def spans(self) -> list[tuple[BlockSpan, list[str]]]:
        return missing_spans(self.resolved, self.corpus, self.storage)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=60_000, help="tokens of the built-in text")
    parser.add_argument("--model", default="embedded", help="folder, GGUF file or hub id; by default the built-in one")
    parser.add_argument("--hooks", nargs="+", help="module paths (outputs); by default the model's recommended three")
    parser.add_argument("--dtype", default="bfloat16", choices=("auto", "bfloat16", "float32"))
    parser.add_argument("--block-tokens", type=int, default=HarvestConfig().block_tokens)
    parser.add_argument("--batch-tokens", type=int, default=CPU_BATCH_TOKENS, help="tokens of a forward pass")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the blocks are written; a temporary folder by default")
    args = parser.parse_args(argv)
    print(machine())
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="midiscover-bench-") as folder:
        bench = _prepare(Path(folder), args)
        runs: dict[str, list[Run]] = {loop: [] for loop in LOOPS}
        starts, rates = [], []
        for repeat in range(args.repeats):
            rates.append(in_child(_matmul_rate, bench))
            for loop in LOOPS:
                if loop == "ray":
                    run, start = _ray(bench)
                    starts.append(start)
                else:
                    run = in_child({"bare": _bare, "naive": _naive}[loop], bench)
                shutil.rmtree(Path(bench.storage.uri, layout.harvest_folder(bench.resolved.harvest_id)))
                bench.stamps.unlink()
                runs[loop].append(run)
                print(f"repeat {repeat + 1}: {loop}: {run.steady:,.0f} tokens/s, {run.seconds:.1f} s", flush=True)
    _report(bench, runs, starts, rates)
    print(machine())
    return 0


def machine() -> str:
    """Cores, processor, load: what a figure needs to be read."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.is_file() else []
    cpu = names[0] if names else platform.processor() or platform.machine()
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cores()} cores ({cpu}){gpu}, load average {load}, torch {torch.__version__}"


def in_child(function: Callable[..., T], *args: Any) -> T:
    """Call a function in a new process, as an actor's is, and return what it returns."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def stamp(path: Path, tokens: int) -> None:
    """Add a batch to the file of a run."""
    with path.open("a") as file:
        file.write(f"{time.monotonic()} {time.process_time()} {tokens}\n")


def _prepare(folder: Path, args: argparse.Namespace) -> Bench:
    model = ModelConfig(id=args.model, dtype=args.dtype)
    hooks = tuple(args.hooks or hook_table(resolve_model(model)).recommended)
    gpu = torch.cuda.is_available()
    config = RunConfig(
        name="bench",
        model=model,
        corpus=CorpusConfig(max_tokens=args.tokens),
        harvest=HarvestConfig(hooks=hooks, block_tokens=args.block_tokens, batch_tokens=args.batch_tokens),
        resources=ResourcesConfig(threads=args.threads, harvest_actors=1),
    )
    resolved = resolve(config)
    slots = Slots(count=1, cpus=1, gpus=int(gpu), threads=1 if gpu else args.threads)
    place = model_place(resolved, slots)
    bench = Bench(resolved=resolved, storage=open_store(str(folder / "store")), place=place, stamps=folder / "stamps")
    with bench.prepared() as prepared, Bars("bench") as bars:
        ensure_corpus(prepared, bars)
    return bench


def _ray(bench: Bench) -> tuple[Run, float]:
    """The stage as a driver runs it; also the seconds until Ray stood."""

    @contextmanager
    def stamped(*args: Any, **settings: Any) -> Iterator[Board]:
        with watched(*args, **settings) as board:
            yield StampedBoard(board, bench.stamps)

    called = time.monotonic()
    with patch("jobs.harvest.watched", stamped), ray_session() as cluster:
        began = time.monotonic()
        _stage(bench, cluster)
        return _run(bench, began), began - called


def _bare(bench: Bench) -> Run:
    """Our own loop without Ray."""
    began = time.monotonic()
    model = bench.place.load()
    corpus = Corpus.open(bench.storage, bench.corpus.id)
    harvester = Harvester(bench.job, model, corpus, bench.storage, lambda tokens: stamp(bench.stamps, tokens))
    for _ in harvester.run(bench.spans):
        continue
    _stage(bench, NO_CLUSTER)
    return _run(bench, began)


def _naive(bench: Bench) -> Run:
    """transformers and forward hooks; nothing overlaps."""
    began = time.monotonic()
    model = _HookedModel(bench)
    corpus = Corpus.open(bench.storage, bench.corpus.id)
    batch_windows = max(1, bench.batch_tokens // corpus.manifest.context_size)
    for span, hooks in bench.spans:
        ids, doc = (torch.from_numpy(np.array(part)) for part in corpus.windows(span.start_window, span.stop_window))
        acts: dict[str, list[Tensor]] = {hook: [] for hook in hooks}
        for start in range(0, len(ids), batch_windows):
            batch = slice(start, start + batch_windows)
            for hook, value in model.activations(ids[batch], doc[batch] == -1).items():
                acts[hook].append(value)
            stamp(bench.stamps, ids[batch].numel())
        commit_tokens(bench.storage, bench.job.harvest_id, span, ids)
        codes = position_mask(ids, doc, model.special, mask_first=bench.job.config.mask_first).flatten()
        for hook in hooks:
            rows = torch.cat(acts[hook])
            norm = rows.float().norm(dim=-1)
            mask = row_mask(codes, norm, bench.job.config.outlier_norm)
            commit_block(bench.storage, bench.job.harvest_id, hook, span, rows.bfloat16(), norm, mask)
    _stage(bench, NO_CLUSTER)
    return _run(bench, began)


class _AllFired(Exception):
    """Ends a forward pass."""


class _HookedModel:
    """transformers' model with a forward hook on each module."""

    def __init__(self, bench: Bench) -> None:
        loaded = bench.place.load()
        self.model, self.device = loaded.model, loaded.device
        self.special = torch.tensor(sorted(loaded.tokenizer.all_special_ids), dtype=torch.int32)
        self.hooks = list(bench.resolved.hooks)
        self.found: dict[str, Tensor] = {}
        for hook in self.hooks:
            self.model.get_submodule(hook).register_forward_hook(partial(self._keep, hook))

    @torch.inference_mode()
    def activations(self, ids: Tensor, padding: Tensor) -> dict[str, Tensor]:
        """[tokens, d_in] of each hook for ids [windows, context_size]; padding is true where there is no token."""
        self.found = {}
        mask = (~padding).long().to(self.device) if bool(padding.any()) else None
        with suppress(_AllFired):
            self.model(input_ids=ids.to(self.device, torch.long), attention_mask=mask, use_cache=False)
        return {hook: value.flatten(0, 1).cpu() for hook, value in self.found.items()}

    def _keep(self, hook: str, _module: nn.Module, _inputs: object, output: Any) -> None:
        self.found[hook] = output if isinstance(output, Tensor) else output[0]
        if len(self.found) == len(self.hooks):
            raise _AllFired


def _stage(bench: Bench, cluster: Cluster) -> None:
    """The harvest as a driver calls it; where every block stands it writes the manifests only."""
    with bench.prepared() as prepared, Bars("bench") as bars:
        harvest(prepared, bench.corpus, cluster, bars)
    commit_manifests(bench.resolved, bench.corpus, bench.storage)


def _run(bench: Bench, began: float) -> Run:
    ended = time.monotonic()
    lines = [line.split() for line in bench.stamps.read_text().splitlines()]
    manifests = [read_manifest(bench.storage, bench.resolved.harvest_id, hook) for hook in bench.resolved.hooks]
    return Run(
        began=began,
        ended=ended,
        batches=[Batch(float(at), float(cpu), int(tokens)) for at, cpu, tokens in lines],
        digests=[row.sha256 for manifest in manifests if manifest is not None for row in manifest.blocks],
    )


@torch.inference_mode()
def _matmul_rate(bench: Bench) -> float:
    """FLOP/s of the products of one layer, the last that is read, one after the other on a batch of tokens."""
    model = bench.place.load()
    last = list(bench.resolved.hooks)[-1]
    number = hook_layer(last)
    path = "" if number is None else last[: last.index(f".{number}.") + len(f".{number}")]
    weights = [weight for weight in model.model.get_submodule(path).parameters() if weight.ndim == 2]
    inputs = {width: torch.randn(bench.batch_tokens, width).to(weights[0]) for width in {w.shape[1] for w in weights}}
    timer = benchmark.Timer(
        "for weight in weights: linear(inputs[weight.shape[1]], weight)",
        globals={"weights": weights, "inputs": inputs, "linear": nn.functional.linear},
        num_threads=bench.place.threads,
    )
    seconds = timer.blocked_autorange(min_run_time=MATMUL_SECONDS).median
    return 2 * bench.batch_tokens * sum(weight.numel() for weight in weights) / seconds


def _report(bench: Bench, runs: dict[str, list[Run]], starts: list[float], rates: list[float]) -> None:
    config, median = bench.resolved.config, statistics.median
    table = Table(
        *("loop", "tokens/s", f"/ {BASE}", "lowest", "highest", "tokens per CPU s"),
        *("whole job, s", f"tokens/s / {BASE}", "to first batch, s", "after last, s"),
        title=f"{bench.resolved.model.name}, {config.model.dtype}, {len(bench.resolved.hooks)} hooks, "
        f"{runs[BASE][0].tokens:,} tokens in blocks of {config.harvest.block_tokens:,}, {bench.place.threads} threads, "
        f"medians of {len(runs[BASE])}",
        box=box.SIMPLE_HEAD,
    )
    for loop, of in runs.items():
        steady = [run.steady / base.steady for run, base in zip(of, runs[BASE], strict=True)]
        whole = [base.seconds / run.seconds for run, base in zip(of, runs[BASE], strict=True)]
        table.add_row(
            loop,
            f"{median(run.steady for run in of):,.0f}",
            *(f"{statistic(steady):.3f}" for statistic in (median, min, max)),
            f"{median(run.per_cpu for run in of):,.0f}",
            f"{median(run.seconds for run in of):.1f}",
            f"{median(whole):.3f}",
            f"{median(run.batches[0].at - run.began for run in of):.1f}",
            f"{median(run.ended - run.batches[-1].at for run in of):.1f}",
        )
    tables.show(table)
    same = len({tuple(run.digests) for of in runs.values() for run in of}) == 1
    flops = max(bench.resolved.table.require(hook).flops_per_token for hook in bench.resolved.hooks)
    bound = median(rates) / flops
    shares = ", ".join(f"{loop} {median(run.steady for run in runs[loop]) / bound:.2f}" for loop in LOOPS)
    print(
        f"Goal {GOAL}, floor {FLOOR} of `{BASE}` for `ray`. Ray itself stood after {median(starts):.1f} s, not counted "
        f"above. Blocks of all loops and repeats {'are identical' if same else 'DIFFER'}.\n"
        f"Bound: {flops / 1e9:.3f} GFLOP per token, and {median(rates) / 1e9:,.0f} GFLOP/s of plain products of the "
        f"model's shapes ({min(rates) / 1e9:,.0f} to {max(rates) / 1e9:,.0f}), make {bound:,.0f} tokens/s; reached: "
        f"{shares}."
    )


if __name__ == "__main__":
    sys.exit(main())
