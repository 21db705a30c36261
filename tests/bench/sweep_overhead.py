"""What Tune costs a sweep: its packs as trials beside a plain loop over the same packs.

    python -m tests.bench.sweep_overhead [--steps 150] [--d-in 256] [--repeats 3]

Three packs of three SAEs each, on a harvest of random activations made for it, one pack at a time with the same
threads, one way after the other in each repeat:

plain      `jobs.crews.run_crew` for each pack, in one process, with a board that only notes the time.
inline     `jobs.packs.run_packs`, as a sweep calls it: a Tune trial per pack, the board watched by the driver.
ray_train  the same with each pack in a Ray Train TorchTrainer, for information.

Ray runs before the clock starts; its own start is listed apart, for the harvest before has paid it already. The plain
loop's libraries are imported before the clock starts, those of a trial are not. `training` adds up the seconds that the
SAEs' steps took, which tells a slower training from a longer start. Overheads are medians over repeats, within the same
repeat. Goal: at most 10 % or 15 s. Judges nothing: the exit code is 0.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.table import Table

from jobs.board import Board, Event, watched
from jobs.crews import run_crew
from jobs.packs import run_packs
from jobs.packworker import PackJob
from jobs.runtime import Slots, cores, pack_slots, ray_session
from midiscover import ids, tables
from midiscover.config import HarvestConfig, ResourcesConfig, RunConfig, TrainConfig
from midiscover.configio import expand_grid
from midiscover.models import HookTable, ModelIdentity
from midiscover.resolve import PlannedSae, Resolved, make_packs
from midiscover.saeconfig import StandardConfig
from midiscover.store import layout
from midiscover.store.blocks import Mask, block_plan, commit_block, write_manifest
from midiscover.store.documents import read_json
from midiscover.store.local import LocalStorage
from midiscover.texts import SourceIdentity
from tests.bench.harvest import in_child, machine

GOAL_SHARE, GOAL_SECONDS = 0.10, 15.0
BASE, GATED = "plain", "inline"
WAYS = (BASE, GATED, "ray_train")
HARVEST = "h.0123456789"
HOOKS = tuple(f"model.layers.{layer}.mlp.down_proj" for layer in range(3))
L1 = (3.0, 8.0, 20.0)
CONTEXT_SIZE = 128


class Run(NamedTuple):
    """One way in one repeat, in seconds."""

    wall: float
    training: float
    """In the steps of all SAEs."""
    to_first: float
    """From the call to the first report of a pack."""
    after_last: float
    """From the last SAE to the return."""
    weights: tuple[str, ...]
    """sha256 of the SAEs, for all ways must make the same."""


class NotingBoard(Board):
    """A board without an actor: keeps what happened, and when."""

    def __init__(self) -> None:
        super().__init__(None)
        self.events: list[tuple[float, Event]] = []

    def post(self, kind: str, key: str, data: Any = None) -> None:
        self.note(Event(kind, key, data))

    def note(self, event: Event) -> bool:
        """Keep an event; every one counts as a step forward."""
        self.events.append((time.monotonic(), event))
        return True


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pack_flags(parser, threads=cores())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS[1:], default=WAYS[1:])
    parser.add_argument("--folder", type=Path, help="where the harvest is written; a temporary folder by default")
    args = parser.parse_args(argv)
    print(machine())
    ways = (BASE, *args.ways)
    runs: dict[str, list[Run]] = {way: [] for way in ways}
    starts: list[float] = []
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="midiscover-bench-") as folder:
        storage = LocalStorage(Path(folder))
        job = prepare(storage, args)
        for repeat in range(args.repeats):
            for way in ways:
                if way == BASE:
                    run = in_child(_plain, job)
                else:
                    run, start = _ray(replace(job, trainer=way))
                    starts.append(start)
                for made in ("saes", "sweeps"):
                    shutil.rmtree(storage.local_path(made), ignore_errors=True)
                runs[way].append(run)
                print(f"repeat {repeat + 1}: {way}: {run.wall:.1f} s, {run.training:.1f} s of it training", flush=True)
    _report(runs, starts, args)
    print(machine())
    return 0


def add_pack_flags(parser: argparse.ArgumentParser, *, threads: int) -> None:
    """What `prepare` reads."""
    parser.add_argument("--steps", type=int, default=150, help="steps of each pack")
    parser.add_argument("--d-in", type=int, default=256)
    parser.add_argument("--expansion-factor", type=float, default=8)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=threads, help="of a pack")


def prepare(storage: LocalStorage, args: argparse.Namespace) -> PackJob:
    """A harvest of three hooks, and the grid over it as a sweep plans it."""
    config = RunConfig(
        name="bench",
        harvest=HarvestConfig(hooks=HOOKS),
        sae=StandardConfig(expansion_factor=args.expansion_factor),
        grid=({"sae.l1_coefficient": L1},),
        train=TrainConfig(batch_size=args.batch_size),
        resources=ResourcesConfig(threads=args.threads),
    )
    _write_harvest(storage, config, args)
    points = [(point, ids.sae_id(point, harvest=HARVEST, d_in=args.d_in)) for point in expand_grid(config)]
    saes = tuple(
        PlannedSae(
            id=name,
            point=point,
            d_in=args.d_in,
            d_sae=point.sae.width(args.d_in),
            d_out=args.d_in,
            output_hook=point.hook,
            harvest_id=HARVEST,
        )
        for point, name in points
    )
    evaluation = ids.evaluation_id(config.evaluate)
    table = HookTable(
        model="random", n_layers=len(HOOKS), d_model=args.d_in, vocab_size=0, context_length=None, parameters=0,
        supports_sdpa=True, flops_per_token=0.0, hooks={},
    )  # fmt: skip
    resolved = Resolved(
        config=config,
        model=ModelIdentity(name="random", digest="0", tokenizer_digest="0"),
        table=table,
        source=SourceIdentity(name="random", digest="0"),
        corpus_id="c.0123456789",
        harvest_id=HARVEST,
        evaluation_id=evaluation,
        sweep_id=ids.sweep_id(config.name, [sae.id for sae in saes], evaluation),
        hooks={hook: sae.d_in for hook, sae in zip(HOOKS, saes[:: len(L1)], strict=True)},
        saes=saes,
    )
    return PackJob(
        resolved=resolved,
        crews=tuple((pack,) for pack in make_packs(saes, None, {sae.id for sae in saes})),
        storage=storage,
        board=NotingBoard(),
        slots=Slots(count=1, cpus=1, gpus=0, threads=args.threads),
        trainer="inline",
        prepend_bos=False,
    )


def _write_harvest(storage: LocalStorage, config: RunConfig, args: argparse.Namespace) -> None:
    """As many rows as one epoch of `--steps` takes, the same for every hook."""
    windows = -(-args.steps * args.batch_size // CONTEXT_SIZE)
    plan = block_plan(windows, 0, context_size=CONTEXT_SIZE, block_tokens=config.harvest.block_tokens)
    generator = torch.Generator().manual_seed(0)
    rows: dict[str, dict[int, Any]] = {hook: {} for hook in HOOKS}
    for span in plan:
        count = (span.stop_window - span.start_window) * CONTEXT_SIZE
        acts = torch.randn(count, args.d_in, generator=generator).bfloat16()
        mask = torch.full((count,), Mask.USABLE, dtype=torch.uint8)
        for hook in HOOKS:
            rows[hook][span.index] = commit_block(storage, HARVEST, hook, span, acts, acts.float().norm(dim=1), mask)
    for hook in HOOKS:
        write_manifest(storage, HARVEST, hook, plan, rows[hook], lineage={})


def _plain(job: PackJob) -> Run:
    board = NotingBoard()
    began = time.monotonic()
    for crew in job.crews:
        run_crew(replace(job, board=board), crew)
    return _run(job, board, began)


def _ray(job: PackJob) -> tuple[Run, float]:
    """The stage as a sweep runs it; also the seconds until Ray stood."""
    notes = NotingBoard()
    called = time.monotonic()
    with ray_session() as cluster:
        began = time.monotonic()
        slots = pack_slots(cluster, job.resolved.config.resources, len(job.crews))
        with watched("sweep", notes.note, stall_seconds=job.resolved.config.resources.stall_seconds) as board:
            run_packs(replace(job, board=board, slots=slots))
        return _run(job, notes, began), began - called


def _run(job: PackJob, board: NotingBoard, began: float) -> Run:
    ended = time.monotonic()
    trained = [read_json(job.storage, layout.training(sae.id)) for sae in job.resolved.saes]
    done = [record for record in trained if record is not None]
    assert len(done) == len(trained), "an SAE is not trained; the events of the board say why"
    return Run(
        wall=ended - began,
        training=sum(record["seconds"] for record in done),
        to_first=min(at for at, event in board.events if event.kind == "pack") - began,
        after_last=ended - max(at for at, event in board.events if event.kind == "trained"),
        weights=tuple(record["weights_sha256"] for record in done),
    )


def _report(runs: dict[str, list[Run]], starts: list[float], args: argparse.Namespace) -> None:
    median = statistics.median
    packs = (
        f"{len(HOOKS)} packs of {len(L1)} SAEs, d_in {args.d_in}, d_sae {round(args.expansion_factor * args.d_in):,}"
    )
    table = Table(
        "way", "seconds", "training", "to first report", "after last SAE", "overhead, s", "overhead",
        title=f"{packs}, {args.steps} steps of {args.batch_size:,}, {args.threads} threads, medians of {args.repeats}",
        box=box.SIMPLE_HEAD,
    )  # fmt: skip
    overheads = {}
    for way, of in runs.items():
        seconds = median(run.wall - base.wall for run, base in zip(of, runs[BASE], strict=True))
        share = median(run.wall / base.wall - 1 for run, base in zip(of, runs[BASE], strict=True))
        overheads[way] = (seconds, share)
        cells = [median(getattr(run, name) for run in of) for name in ("wall", "training", "to_first", "after_last")]
        table.add_row(way, *(f"{cell:.1f}" for cell in cells), f"{seconds:.1f}", f"{share:.1%}")
    tables.show(table)
    same = len({run.weights for of in runs.values() for run in of}) == 1
    print(
        f"Goal for `{GATED}`: at most {GOAL_SHARE:.0%} or {GOAL_SECONDS:g} s. Ray itself stood after "
        f"{median(starts):.1f} s, not counted above; reports of trials are seen every 0.3 s. "
        f"SAEs of all ways and repeats {'are identical' if same else 'DIFFER'}."
    )


if __name__ == "__main__":
    sys.exit(main())
