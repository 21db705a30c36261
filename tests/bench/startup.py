"""From the command to the first training step on a warm store: which second goes where.

    python -m tests.bench.startup [--repeats 5] [--folder FOLDER]

Harvests the corpus of `quick` once, then runs sweeps of one new SAE over it, each as `midiscover sweep` does, in a
process of its own whose stages are stamped from within. The first training step is seen by the driver when its report
arrives, at most 0.3 s later. Parts are medians; imports above half a second are listed from a run of their own under
`-X importtime`, which slows them. Goal 8 s. Judges nothing: the exit code is 0.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from midiscover import tables
from tests.jobs_cli import environment, midiscover

GOAL = 8.0
FLAGS = ("quick", "--grid.sae.l1_coefficient", "[2]", "--evaluate.ce_tokens", "0", "--train.report_every", "1")
PARTS = {
    "python": "Python itself, and this script",
    "imports": "importing jobs.sweep",
    "prepared": "config, model, text, store and tracker",
    "ray": "Ray; meanwhile importing torch and Ray Tune",
    "packs": "what stands already, the packs",
    "started": "Tune, and the process of the first trial",
    "stepped": "opening the activations, making the SAE, the first step",
}
IMPORTS = re.compile(r"import time: +\d+ \| +(\d+) \| ( *)(\S+)")


def run(store: str, seed: str, began: str) -> None:
    """A sweep whose stages are stamped, in this process."""
    stamps = {"python": time.time() - float(began)}

    def stamp(name: str) -> None:
        stamps.setdefault(name, time.time() - float(began))

    from jobs import sweep

    stamp("imports")
    prepare, begin = sweep.prepare, sweep.RayLater.begin_while_importing

    def prepared(args: Any) -> Any:
        made = prepare(args)
        stamp("prepared")
        return made

    def begun(self: Any, module: str) -> None:
        begin(self, module)
        from jobs import sweeprun

        stamp("ray")
        run_packs, on_event = sweeprun.run_packs, sweeprun.Recorder.on_event

        def packs(job: Any) -> None:
            stamp("packs")
            run_packs(job)

        def noted(self: Any, event: Any) -> bool:
            if event.kind in ("started", "pack"):
                stamp({"started": "started", "pack": "stepped"}[event.kind])
            return on_event(self, event)

        sweeprun.run_packs = packs
        sweeprun.Recorder.on_event = noted  # type: ignore[method-assign]

    sweep.prepare = prepared
    sweep.RayLater.begin_while_importing = begun  # type: ignore[method-assign]
    code = sweep.main([*FLAGS, "--store", store, "--train.seed", seed])
    assert code == 0, code
    print(json.dumps(stamps))


def heavy_imports() -> list[tuple[str, float]]:
    """Modules whose import takes more than half a second, with what they import; those of a heavy one first."""
    line = [sys.executable, "-X", "importtime", "-c", "import jobs.sweeprun"]
    told = subprocess.run(line, capture_output=True, text=True, check=True, env=environment()).stderr
    found = [(match[3], int(match[1]) / 1e6) for match in map(IMPORTS.match, told.splitlines()) if match]
    return [(name, seconds) for name, seconds in found if seconds > 0.5]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables."""
    from tests.bench.harvest import machine  # imports torch, which what is measured here does when it gets to it

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the store is made; a temporary folder by default")
    args = parser.parse_args(argv)
    print(machine())
    with tempfile.TemporaryDirectory(prefix="midiscover-bench-", dir=args.folder) as folder:
        store = str(Path(folder) / "store")
        done = midiscover("harvest", *FLAGS, "--store", store, timeout=3600)
        assert done.code == 0, done.err
        found = []
        for seed in range(args.repeats):
            code = "import sys; from tests.bench.startup import run; run(*sys.argv[1:])"
            line = [sys.executable, "-c", code, store, str(seed), str(time.time())]
            told = subprocess.run(line, capture_output=True, text=True, env=environment(), cwd=os.getcwd(), check=False)
            assert told.returncode == 0, told.stderr[-2000:]
            found.append(json.loads(told.stdout.splitlines()[-1]))
            print(f"repeat {seed + 1}: {found[-1]['stepped']:.1f} s", flush=True)
    table = Table("until", "seconds", "lowest", "highest", box=box.SIMPLE_HEAD)
    before = dict.fromkeys(range(len(found)), 0.0)
    for name, text in PARTS.items():
        parts = [each[name] - before[i] for i, each in enumerate(found)]
        before = {i: each[name] for i, each in enumerate(found)}
        table.add_row(text, f"{statistics.median(parts):.2f}", f"{min(parts):.2f}", f"{max(parts):.2f}")
    whole = [each["stepped"] for each in found]
    table.add_row("in all", f"{statistics.median(whole):.2f}", f"{min(whole):.2f}", f"{max(whole):.2f}")
    tables.show(table)
    for name, seconds in heavy_imports():
        print(f"  {seconds:.1f} s  {name}")
    print(f"Goal {GOAL:g} s.\n{machine()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
