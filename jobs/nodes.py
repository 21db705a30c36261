"""The machines a run is laid over: those that are there, and those that an autoscaler adds for it.

`resources.nodes` says how many. The first tells what they are like, so a run is planned for all of them at once and
begins as soon as one is there; work that is meant for the others waits for them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import ray
from ray.autoscaler.sdk import request_resources

from midiscover.errors import StageError

FIRST_NODE_SECONDS = 1200.0
"""How long the first node may take: a cloud's machine, and the installation on it."""
LOOK_SECONDS = 1.0


class Node(NamedTuple):
    """What one machine offers."""

    cpus: float
    gpus: float
    memory: float = math.inf
    """Bytes of RAM for what runs on it, as Ray counts them."""


def working_nodes() -> tuple[Node, ...]:
    """What Ray has, node by node; nodes that run no work (a head with 0 CPUs) are left out."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return tuple(
        Node(have["CPU"], have.get("GPU", 0), have.get("memory", math.inf))
        for have in resources
        if have.get("CPU", 0) >= 1
    )


def accelerators() -> list[str]:
    """Kinds of GPU, as Ray calls them, in lower case: h100, a100."""
    prefix = "accelerator_type:"
    return sorted(name.removeprefix(prefix).lower() for name in ray.cluster_resources() if name.startswith(prefix))


def ask_for(count: int, say: Callable[[str], None]) -> tuple[Node, ...]:
    """Ask the autoscaler for as many nodes as make `count`, wait for the first, and return what there will be.

    Nodes that are still to come are taken to be like the largest that is there. StageError where none comes.
    """
    there = working_nodes()
    if not there:
        request_resources(bundles=[{"CPU": 1}])
        say(f"no node is there yet; {count} are asked for")
        there = _first(time.monotonic() + FIRST_NODE_SECONDS)
    like = max(there, key=lambda node: (node.gpus, node.cpus))
    coming = (like,) * max(0, count - len(there))
    if coming:
        request_resources(bundles=[_bundle(node) for node in (*there, *coming)])
        say(f"{len(there)} of {count} nodes are there ({like.cpus:g} CPUs, {like.gpus:g} GPUs); the rest is asked for")
    return there + coming


def _first(ends: float) -> tuple[Node, ...]:
    while not (there := working_nodes()):
        if time.monotonic() > ends:
            raise StageError(
                f"No node came within {FIRST_NODE_SECONDS / 60:.0f} minutes; look at the autoscaler (`ray status` on "
                "the head), or start nodes and leave resources.nodes away."
            )
        time.sleep(LOOK_SECONDS)
    return there


def _bundle(node: Node) -> dict[str, float]:
    return {"CPU": node.cpus} | ({"GPU": node.gpus} if node.gpus else {})


def give_back() -> None:
    """What was asked for is needed no longer; the autoscaler removes nodes once they are idle.

    Ray holds one request for the whole cluster, so another run's goes as well. Its actors and trials keep its nodes.
    """
    request_resources(bundles=[])
