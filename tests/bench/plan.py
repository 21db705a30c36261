"""Whether sweeps take what `midiscover plan` says before: the plan and the run, stage by stage.

    python -m tests.bench.plan [CONFIG ...] [--folder FOLDER]

Calibrates this machine with the config before each sweep, plans it, and runs it into a new store. When a stage ended is
told by the files in the store: the last manifest of a hook, the last SAE that is trained, the last that is measured.
Goal: in all, within 25 % of what it takes. Judges nothing: the exit code is 0.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.table import Table

from midiscover import tables
from tests.bench.harvest import machine
from tests.jobs_cli import midiscover

CONFIGS = ("quick", "demo", str(Path(__file__).with_name("plan_kinds.yaml")))
GOAL = 0.25
HOUR = 3600.0


class Times(NamedTuple):
    """Seconds of the stages; a plan's start and harvest are one, since both end with the last block."""

    harvest: float
    train: float
    evaluate: float
    report: float

    @property
    def whole(self) -> float:
        """In all."""
        return sum(self)


def calibrate(config: str, store: Path, env: Mapping[str, str] | None = None) -> None:
    """Measure the rates that plans with this store reckon with."""
    done = midiscover("calibrate", config, "--store", str(store), env=env, timeout=HOUR)
    assert done.code == 0, done.err
    print(f"{config}: calibrated in {done.seconds:.0f} s", flush=True)


def planned(config: str, store: Path, *flags: str) -> Times:
    """What the plan says."""
    done = midiscover("plan", config, "--store", str(store), "--json", *flags)
    assert done.code == 0, done.err
    (plan,) = json.loads(done.out)
    seconds: dict[str, float] = {}
    for stage in plan["stages"]:
        seconds[stage["name"]] = seconds.get(stage["name"], 0.0) + stage["seconds"]
    return Times(seconds["start"] + seconds["harvest"], seconds["train"], seconds["evaluate"], seconds["report"])


def taken(config: str, store: Path, env: Mapping[str, str] | None = None) -> Times:
    """What the sweep takes."""
    began = time.time()
    done = midiscover("sweep", config, "--store", str(store), env=env, timeout=2 * HOUR)
    assert done.code == 0, done.err
    ended = time.time()

    def last(pattern: str) -> float:
        """When it was written; where activations are streamed there are none."""
        return max(
            (path.stat().st_mtime for path in store.glob(pattern)), default=began
        )  # nothing, where it is streamed

    marks = [
        began,
        last("activations/*/*/manifest.json"),
        last("saes/*/training.json"),
        last("saes/*/evaluations/*.json"),
        ended,
    ]
    return Times(*(b - a for a, b in zip(marks, marks[1:], strict=False)))


def comparison(label: str) -> Table:
    """Of plans and runs, still empty."""
    return Table(label, "", *(f"{name}, s" for name in Times._fields), "in all, s", "plan / run", box=box.SIMPLE_HEAD)


def compare(table: Table, label: str, said: Times, took: Times) -> None:
    """Add a plan and its run, and show the table."""
    for name, times, ratio in (("plan", said, ""), ("run", took, f"{said.whole / took.whole:.2f}")):
        table.add_row(label, name, *(f"{one:.0f}" for one in times), f"{times.whole:.0f}", ratio)
    tables.show(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", default=CONFIGS, metavar="CONFIG")
    parser.add_argument("--folder", type=Path, help="where the stores are made; a temporary folder by default")
    args = parser.parse_args(argv)
    print(machine())
    table = comparison("config")
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="midiscover-bench-", dir=args.folder) as folder:
        for config in args.configs:
            store = Path(folder) / Path(config).stem
            calibrate(config, store)
            compare(table, config, planned(config, store), taken(config, store))
    print(f"Goal: within {GOAL:.0%} in all.\n{machine()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
