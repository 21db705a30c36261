"""A process that computes keeps what it frees: counted in pages that the kernel had to give."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from midiscover import cores
from midiscover.cores import native_bfloat16

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


@pytest.mark.parametrize(
    ("told", "native"),
    [
        ("8.0\n", True),
        ("10.0\n9.0\n", True),
        ("9.0\n7.5\n", False),
        ("7.0\n", False),
        ("[N/A]\n", True),
        ("", True),
        ('Field "compute_cap" is not a valid field to query.\n', True),
        (None, True),
    ],
)
def test_cards_before_ampere_are_no_bfloat16_machines(
    told: str | None, native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An A100, an H100 beside a B200, a T4 beside an H100, a V100; where nobody says, a card counts as a new one."""
    driver, asked = tmp_path / "version", tmp_path / "asked"
    driver.write_text("NVRM version")
    if told is not None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\necho \"$@\" >> {asked}\ncat <<'END'\n{told}END\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin" if told is not None else str(tmp_path))
    monkeypatch.setattr(cores, "_DRIVER", driver)
    native_bfloat16.cache_clear()
    try:
        assert [native_bfloat16(), native_bfloat16()] == [native, native]
    finally:
        native_bfloat16.cache_clear()
    if told is not None:
        assert asked.read_text() == "--query-gpu=compute_cap --format=csv,noheader\n", "asked once"


def test_a_driver_that_does_not_answer_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, driver = tmp_path / "nvidia-smi", tmp_path / "version"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    driver.write_text("NVRM version")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(cores, "_DRIVER", driver)
    monkeypatch.setattr(cores, "CARDS_SECONDS", 0.2)
    native_bfloat16.cache_clear()
    began = time.monotonic()
    try:
        assert native_bfloat16()
    finally:
        native_bfloat16.cache_clear()
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("limits", "expected"),
    [({}, None), ({0: "5000\n"}, 5000), ({1: "6000\n"}, 6000), ({1: "max\n"}, None), ({0: "9" * 18}, None)],
)
def test_the_memory_of_a_container_is_what_it_may_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: dict[int, str], expected: int | None
) -> None:
    files = tmp_path / "memory.limit_in_bytes", tmp_path / "memory.max"
    for place, text in limits.items():
        files[place].write_text(text)
    monkeypatch.setattr(cores, "_MEMORY_LIMITS", files)
    whole = psutil.virtual_memory().total
    assert cores.memory() == (whole if expected is None else expected)
