"""How many cores there are to share, and how packs share them."""

from __future__ import annotations

import math
import os

SCALING = 0.9
"""Threads are taken to speed a pack up by their number to this power."""


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def packs_at_once(packs: int, *, cores: int, most: int, nodes: int = 1, threads: int | None = None) -> int:
    """Packs that a node trains at once so that all end soonest: 3 equal packs on 2 cores run one after another.

    most: at most so many on a node; threads: of a pack, None: what the cores give each.
    """

    def seconds(per_node: int) -> float:
        return math.ceil(packs / (per_node * nodes)) / (threads or cores // per_node) ** SCALING

    return min(range(1, most + 1), key=lambda n: (seconds(n), n))
