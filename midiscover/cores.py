"""How many cores and cards there are to share, what they are made for, how packs share them, and how a process that
computes sets itself up."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import re
import subprocess
from functools import cache
from pathlib import Path

SCALING = 0.9
"""Threads are taken to speed a pack up by their number to this power."""
SMALL_BELOW = 2**32
"""Multiply-adds of x @ W_enc below which a step is taken by one core. By measurement: tests/bench/RESULTS.md."""
SPARSE_BELOW = 0.12
"""Share of entries that fire below which a sparse code is made. By measurement: tests/bench/step.py."""
SPARSE_BELOW_ON_GPU = 0.008
"""The same where kernels gather the entries. By measurement: tests/bench/gpu_kinds.py."""
NODE_CARDS = 8
"""Cards of a node, where it is not there yet to be asked."""
CARDS_SECONDS = 20.0
"""How long the driver of NVIDIA's cards may take to name them; it wakes each one up."""

_DRIVER, _CPUS = Path("/proc/driver/nvidia/version"), Path("/proc/cpuinfo")
# Of control groups, version 1 and 2.
_MEMORY_LIMITS = Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory.max")
_BFLOAT16_FROM = 8.0  # Ampere's compute capability
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT_BYTES, _LARGEST_KEPT = 2**30, 2**25  # more than 32 MiB glibc does not allow for the second


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> int:
    """Bytes of RAM of this machine, or of the container that this process runs in, as Ray counts them."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = next((file.read_text().strip() for file in _MEMORY_LIMITS if file.exists()), "")
    return min(total, int(limit)) if limit.isdecimal() else total  # "max": no limit


@cache
def native_bfloat16() -> bool:
    """Whether this machine multiplies bfloat16 matrices in hardware: its NVIDIA cards, else its CPU by its flags."""
    if _DRIVER.exists():
        oldest = _oldest_card()
        return oldest is None or oldest >= _BFLOAT16_FROM
    if _CPUS.exists():
        return re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", _CPUS.read_text()) is not None
    return platform.system() == "Darwin" and platform.machine() == "arm64" and "M1" not in platform.processor()


def _oldest_card() -> float | None:
    """The least compute capability of this machine's cards; None where nobody says it, as without `nvidia-smi`."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=CARDS_SECONDS).stdout
        return min(map(float, told.split()))
    except (OSError, subprocess.SubprocessError, ValueError):  # ValueError: no card, or a driver that does not know
        return None


def places_on(cards: float, each: float) -> int:
    """How many workers that take `each` GPUs find a place on the cards of one node."""
    if each >= 1:
        return int(cards // each)
    return int(cards) * int(1 / each + 1e-9)  # a share never spans two cards: 0.6 of a GPU fits once on each


def on_nodes(cards: int, each: float) -> int:
    """The same on so many cards in nodes of NODE_CARDS, the last of what is left; a worker never spans two nodes."""
    nodes, rest = divmod(cards, NODE_CARDS)
    return nodes * places_on(NODE_CARDS, each) + places_on(rest, each)


def no_room(stage: str, workers: int, cpus: float, gpus: float, have: str) -> str:
    """Why a stage does not fit what there is, which `have` says: for people."""
    return (
        f"The {stage} needs {workers} workers of {cpus:g} CPUs and {gpus:g} GPUs and one CPU more; {have}. Add nodes, "
        "or lower harvest_actors, workers, threads, gpus_per_model or the GPU shares in resources."
    )


def packs_at_once(packs: int, *, cores: int, most: int, nodes: int = 1, threads: int | None = None) -> int:
    """Packs that a node trains at once so that all end soonest: 3 equal packs on 2 cores run one after another.

    most: at most so many on a node; threads: of a pack, None: what the cores give each.
    """

    def seconds(per_node: int) -> float:
        return math.ceil(packs / (per_node * nodes)) / (threads or cores // per_node) ** SCALING

    return min(range(1, most + 1), key=lambda n: (seconds(n), n))


def compute_on(threads: int) -> None:
    """Let this process's matrix products use so many cores, and let it keep up to 1 GiB of the memory that it frees.

    glibc gives memory back as soon as a tensor of some MB is freed, and every step has it filled with zeros again, page
    by page: language models read text 1.2 to 1.3 times faster without (tests/bench/RESULTS.md).
    """
    import torch  # plans are made without it, and it takes seconds

    torch.set_num_threads(threads)
    change = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if change is not None:  # other C libraries have their own ways
        change(_TRIM_THRESHOLD, _KEPT_BYTES)
        change(_MMAP_THRESHOLD, _LARGEST_KEPT)
