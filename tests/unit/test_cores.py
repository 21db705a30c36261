"""A process that computes keeps what it frees: counted in pages that the kernel had to give."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import torch
from midiscover.cores import compute_on

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(4_000_000)  # 16 MB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

mine = torch.ones(4_000_000)
before = faults()
compute_on(1)
faults()
print(before, faults(), torch.get_num_threads())
"""
MAPPED = {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"}
"""glibc's own beginning, held fast: else it may raise it at the first large block, or not, by where the heap lies."""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have other ways")
def test_freed_memory_is_not_asked_for_again() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env=os.environ | MAPPED
    )
    before, after, threads = map(int, done.stdout.split())
    assert threads == 1
    assert before > 70_000, "glibc gave the memory back after each of them"
    assert after < 100
