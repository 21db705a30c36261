"""Whether the scheduler behind `midiscover plan --gpus N` is right: a sweep on one and on two nodes, planned and run.

    python -m tests.bench.plan_nodes [--tokens 60000] [--nodes 1 2]

The nodes are raylets on this machine, each pinned to one core, behind a head without work; a node with its core stands
for a GPU. One node is calibrated, and the same sweep of three layers x three L1 coefficients is planned for each number
of them by those rates and run into a new store, one thread each. Head, driver and agents share the nodes' cores, which
on machines of their own they would not. Judges nothing: the exit code is 0.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

from tests.bench.harvest import machine
from tests.bench.plan import GOAL, calibrate, compare, comparison, planned, taken
from tests.clusters import local_cluster
from tests.postgres import fresh_database, postgres

LAYERS = (10, 15, 20)


def written(folder: Path, tokens: int) -> str:
    """The sweep's settings."""
    config = {
        "name": "nodes",
        "model": {"id": "embedded"},
        "corpus": {"source": "builtin", "max_tokens": tokens},
        "harvest": {"hooks": [f"model.layers.{layer}.mlp.down_proj" for layer in LAYERS]},
        "sae": {"kind": "standard", "expansion_factor": 8},
        "grid": {"sae.l1_coefficient": [1, 2, 4]},
        "train": {"batch_size": 1024, "dtype": "auto"},
        "evaluate": {"ce_tokens": 2048},
        "resources": {"threads": 1, "pack_size": 3, "trainer": "inline"},  # as where there are no GPUs
    }
    path = folder / "nodes.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=60_000, help="tokens of the built-in text")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2], help="rising, at most as many as cores")
    args = parser.parse_args(argv)
    free = sorted(os.sched_getaffinity(0))
    print(machine())
    table = comparison("nodes")
    with (
        tempfile.TemporaryDirectory(prefix="midiscover-bench-") as folder,
        postgres() as server,
        fresh_database(server) as database,
        local_cluster(Path(folder), 0, {"MIDISCOVER_DATABASE_URL": database}) as cluster,
    ):
        config, rates = written(Path(folder), args.tokens), Path(folder) / "rates"
        joined = {**cluster.variables, "RAY_ADDRESS": cluster.gcs}
        for count in args.nodes:
            for _ in range(count - len(cluster.nodes) + 1):
                cluster.add_worker(core=free[len(cluster.nodes) - 1])
            if not rates.exists():
                calibrate(config, rates, joined)
            said = planned(config, rates, "--gpus", str(count), "--gpu", "cpu")
            compare(table, str(count), said, taken(config, Path(folder) / f"store-{count}", joined))
    print(f"Goal: within {GOAL:.0%} in all.\n{machine()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
