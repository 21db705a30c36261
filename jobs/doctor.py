"""What a run needs, looked at on every node of a cluster. `python -m jobs.doctor [CONFIG] [--store URI]`

Without a cluster, the machine it is called on. Exit code 1 where anything fails.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.runtime import own_error, ray_session, run_main
from midiscover.config import RunConfig
from midiscover.configio import find_config, load_config
from midiscover.doctor import Finding, examine, report
from midiscover.launch import parse_doctor

SECONDS = 120.0
"""How long a node may take to answer; the first task there loads torch."""


def main(argv: list[str]) -> int:
    """Look, and print what was found."""
    args = parse_doctor(argv)
    config = load_config(find_config(args.config), args.overrides) if args.config else None
    findings = _everywhere(args.store, config) if os.environ.get("RAY_ADDRESS") else examine(args.store, config)
    return report(findings, as_json=args.json)


def _everywhere(store: str | None, config: RunConfig | None) -> list[Finding]:
    """The driver's machine, then each node of the cluster."""
    findings = [found._replace(machine=f"{found.machine} (driver)") for found in examine(store, config)]
    look: Any = ray.remote(examine)
    # Where an autoscaler is to bring the nodes, one of them tells what they are like.
    nodes = 1 if config is not None and config.resources.nodes else None
    with ray_session(nodes, lambda line: print(f"doctor: {line}", file=sys.stderr)):
        asked = {
            node["NodeID"][:8]: look.options(
                num_cpus=0,
                max_retries=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            ).remote(store, config)
            for node in ray.nodes()
            if node["Alive"] and node["Resources"].get("CPU")
        }
        for node, answer in asked.items():
            try:
                there = ray.get(answer, timeout=SECONDS)
                findings += [found._replace(machine=f"{found.machine} {node}") for found in there]
            except Exception as error:  # Ray raises its own kinds
                told = own_error(error) or " ".join(str(error).split())
                findings.append(Finding(node, "node", "fails", f"it does not answer: {told}"))
    return findings


if __name__ == "__main__":
    run_main(main)
