"""What a cluster costs beside the same work without one: two nodes against two processes, and a submitted job.

    python -m tests.bench.cluster [--tokens 30000] [--repeats 2] [--submissions 3]

Two nodes: the harvest of the built-in text by two nodes of a Ray cluster, each raylet pinned to one core, against two
processes that are pinned likewise and run the same loop (`Harvester.run`) on half of the blocks each, without Ray. One
thread each, one after the other in each repeat. Rates count the tokens between the time when both have finished their
first batch and the time when the first of them finishes its last. Goal 0.95, floor 0.85. Where there are two cores, the
head, the driver and both raylets' agents share them with the model, which on machines of their own they would not.

Submission: a sweep that stands already, so that nothing is computed, called here and sent through the Jobs API to a
cluster of this machine, in turn; store in SeaweedFS, tracker in PostgreSQL. Judges nothing: the exit code is 0.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich import box
from rich.table import Table

from jobs.board import Board, watched
from jobs.harvest import ensure_corpus, harvest
from jobs.progress import Bars
from jobs.runtime import Slots, cores, ray_session
from midiscover import tables
from midiscover.config import CorpusConfig, HarvestConfig, ModelConfig, ResourcesConfig, RunConfig
from midiscover.corpus import Corpus
from midiscover.harvest import Harvester
from midiscover.models import hook_table, resolve_model
from midiscover.resolve import resolve
from midiscover.store import layout
from midiscover.store.storage import open_store
from tests.bench.harvest import Bench, StampedBoard, machine, model_place, stamp
from tests.clusters import local_cluster
from tests.jobs_cli import midiscover
from tests.postgres import fresh_database, postgres
from tests.runs import write_run
from tests.s3 import s3_server

GOAL, FLOOR = 0.95, 0.85


class ProcessBoard(StampedBoard):
    """The same with a file for each worker, in a folder."""

    def post(self, kind: str, key: str, data: Any = None) -> None:
        Board.post(self, kind, key, data)
        stamp(self.path / str(os.getpid()), data)


def together(folder: Path) -> float:
    """Tokens per second of all processes, while all of them are at work."""
    found = [[line.split() for line in path.read_text().splitlines()] for path in folder.iterdir()]
    series = [[(float(at), int(tokens)) for at, _cpu, tokens in one] for one in found]
    begin, end = max(one[0][0] for one in series), min(one[-1][0] for one in series)
    assert len(series) == 2, f"two processes were to work, not {len(series)}"
    return sum(tokens for one in series for at, tokens in one if begin < at <= end) / (end - begin)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=30_000, help="tokens of the built-in text")
    parser.add_argument("--dtype", default="float32", choices=("bfloat16", "float32"))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--submissions", type=int, default=3)
    args = parser.parse_args(argv)
    print(machine())
    with tempfile.TemporaryDirectory(prefix="midiscover-bench-") as folder:
        if args.repeats:
            _efficiency(Path(folder), args)
        if args.submissions:
            _submission(Path(folder), args.submissions)
    print(machine())
    return 0


def _efficiency(folder: Path, args: argparse.Namespace) -> None:
    bench = _bench(folder, args)
    rates: dict[str, list[float]] = {"two nodes": [], "two processes": []}
    with (
        postgres() as server,
        fresh_database(server) as database,
        local_cluster(folder, 0, {"MIDISCOVER_DATABASE_URL": database}) as cluster,
    ):
        for core in sorted(os.sched_getaffinity(0))[:2]:
            cluster.add_worker(core=core)
        joined = {**cluster.variables, "RAY_ADDRESS": cluster.gcs}
        for repeat in range(args.repeats):
            for way in rates:
                bench.stamps.mkdir()
                if way == "two nodes":
                    with patch.dict(os.environ, joined):
                        _two_nodes(bench)
                else:
                    _two_processes(bench)
                rates[way].append(together(bench.stamps))
                shutil.rmtree(bench.stamps)
                activations = bench.storage.local_path(layout.harvest_folder(bench.resolved.harvest_id))
                assert activations is not None
                shutil.rmtree(activations)
                print(f"repeat {repeat + 1}: {way}: {rates[way][-1]:,.0f} tokens/s", flush=True)
    ratios = [ray / bare for ray, bare in zip(*rates.values(), strict=True)]
    table = Table("harvest by", "tokens/s", "against two processes", "lowest", "highest", box=box.SIMPLE_HEAD)
    for way, found in rates.items():
        shares = ratios if way == "two nodes" else [1.0]
        figures = (f"{statistic(shares):.3f}" for statistic in (statistics.median, min, max))
        table.add_row(way, f"{statistics.median(found):,.0f}", *figures)
    tables.show(table)
    print(f"Goal {GOAL}, floor {FLOOR}.")


def _bench(folder: Path, args: argparse.Namespace) -> Bench:
    model = ModelConfig(id="embedded", dtype=args.dtype)
    config = RunConfig(
        name="bench",
        model=model,
        corpus=CorpusConfig(max_tokens=args.tokens),
        harvest=HarvestConfig(hooks=tuple(hook_table(resolve_model(model)).recommended), block_tokens=1024),
        resources=ResourcesConfig(threads=1, harvest_actors=2),
    )
    resolved = resolve(config)
    place = model_place(resolved, Slots(count=2, cpus=1, gpus=0, threads=1))
    bench = Bench(resolved=resolved, storage=open_store(str(folder / "store")), place=place, stamps=folder / "stamps")
    with bench.prepared() as prepared, Bars("bench") as bars:
        ensure_corpus(prepared, bars)
    return bench


def _two_nodes(bench: Bench) -> None:
    @contextmanager
    def stamped(*args: Any, **settings: Any) -> Iterator[Board]:
        with watched(*args, **settings) as board:
            yield ProcessBoard(board, bench.stamps)

    with (
        patch("jobs.harvest.watched", stamped),
        ray_session() as cluster,
        bench.prepared() as prepared,
        Bars("bench") as bars,
    ):
        harvest(prepared, bench.corpus, cluster, bars)


def _two_processes(bench: Bench) -> None:
    spawn = get_context("spawn")
    processes = [spawn.Process(target=_half, args=(bench, half)) for half in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0


def _half(bench: Bench, half: int) -> None:
    """Every other block, on one core."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[half]})
    corpus = Corpus.open(bench.storage, bench.corpus.id)
    harvester = Harvester(
        bench.job,
        bench.place.load(),
        corpus,
        bench.storage,
        lambda tokens: stamp(bench.stamps / str(os.getpid()), tokens),
    )
    for _ in harvester.run(bench.spans[half::2]):
        continue


def _submission(folder: Path, repeats: int) -> None:
    seconds: dict[str, list[float]] = {"here": [], "submitted": []}
    with s3_server() as server, postgres() as address, fresh_database(address) as database:
        nodes = {**server.environment, "MIDISCOVER_DATABASE_URL": database}
        config = str(write_run(folder))
        with local_cluster(folder, 1, nodes) as cluster:
            ways = {"here": nodes | {"MIDISCOVER_CLUSTER": ""}, "submitted": cluster.client() | server.environment}
            for repeat in range(repeats + 1):  # the first makes it
                for way, variables in ways.items():
                    done = midiscover("sweep", config, "--store", server.uri("store"), env=variables, timeout=600)
                    assert done.code == 0, done.err
                    if repeat:
                        seconds[way].append(done.seconds)
    table = Table("a sweep that stands already", "s", "lowest", "highest", box=box.SIMPLE_HEAD)
    for way, found in seconds.items():
        table.add_row(way, *(f"{statistic(found):.1f}" for statistic in (statistics.median, min, max)))
    tables.show(table)
    medians = [statistics.median(found) for found in seconds.values()]
    print(f"Submission costs {medians[1] - medians[0]:.1f} s: {cores()} cores for client, driver, head and node.")


if __name__ == "__main__":
    sys.exit(main())
