"""The folder in the real SAELens, where one is at hand: here, or behind the Python that a variable names."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from midiscover.publish.checks import CFG, TRAINING, WEIGHTS, Failed, Skipped, Subject, check, expect
from midiscover.publish.checks_weights import module

PYTHON = "MIDISCOVER_SAELENS_PYTHON"
"""Environment variable: the interpreter of an environment in which SAELens is installed."""
TOLERANCE = 1e-5
"""Largest difference, times the largest entry where that exceeds 1: float32 has 7 digits, not 7 decimals."""
ROWS = 64
SECONDS = 600


class _Answer(NamedTuple):
    told: str
    ours: dict[str, Tensor]
    theirs: dict[str, Tensor]


def saelens_python() -> str:
    """The interpreter to ask. Skipped where none is known."""
    named = os.environ.get(PYTHON)
    if named:
        return named
    if importlib.util.find_spec("sae_lens") is not None:
        return sys.executable
    raise Skipped(f"SAELens is not installed here, and {PYTHON} names no Python that has it")


def _answer(subject: Subject) -> _Answer:
    return subject.part("the folder in SAELens", lambda: _ask(subject))


def _ask(subject: Subject) -> _Answer:
    python, sae = saelens_python(), module(subject)
    given = {"x": _rows(subject)}
    given["features"] = sae.encode(given["x"])
    ours = {"features": given["features"], "x_hat": sae.decode(given["features"])}
    with tempfile.TemporaryDirectory(prefix="midiscover-saelens-") as there:
        folder = Path(there, "sae")
        folder.mkdir()
        for name in (CFG, WEIGHTS):
            (folder / name).write_bytes(subject.read(name))
        save_file(given, Path(there, "given.safetensors"))
        command = [python, "-I", str(Path(__file__).with_name("saelens_probe.py")), str(folder)]
        command += [str(Path(there, name)) for name in ("given.safetensors", "answer.safetensors")]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        except OSError as error:
            raise Skipped(f"{python} can't be run: {error.strerror}") from None
        except subprocess.TimeoutExpired:
            raise Skipped(f"SAELens did not answer in {SECONDS} seconds") from None
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise Skipped(last) if "No module named 'sae_lens'" in last else Failed(f"SAELens does not load it: {last}")
        return _Answer(done.stdout.strip(), ours, load_file(Path(there, "answer.safetensors")))


def _rows(subject: Subject) -> Tensor:
    """Random activations about where the SAE expects them; about 0 for a transcoder, whose weights do not say."""
    sae = module(subject)
    mean_norm = sae.d_in**0.5
    if subject.has(TRAINING):
        mean_norm = (subject.json(TRAINING).get("normalisation") or {}).get("mean_norm") or mean_norm
    noise = torch.randn(ROWS, sae.d_in, generator=torch.Generator().manual_seed(1)) * (mean_norm / sae.d_in**0.5)
    return noise if sae.transcodes else sae.b_dec + noise


def _equal(subject: Subject, name: str) -> str:
    answer = _answer(subject)
    ours, theirs = answer.ours[name], answer.theirs[name]
    expect(ours.shape == theirs.shape, f"SAELens has shape {list(theirs.shape)}, this version {list(ours.shape)}")
    apart = float((ours - theirs).abs().max()) / max(1.0, float(ours.abs().max()))
    expect(apart <= TOLERANCE, f"they are {apart:.2g} apart")
    return f"{apart:.1e} apart"


@check("saelens")
def saelens_loads_it(subject: Subject) -> str:
    """SAELens loads the folder."""
    return subject.require("the folder in SAELens", lambda: _ask(subject)).told


@check("saelens")
def saelens_encodes_alike(subject: Subject) -> str:
    """SAELens encodes as this version does."""
    return _equal(subject, "features")


@check("saelens")
def saelens_decodes_alike(subject: Subject) -> str:
    """SAELens decodes as this version does."""
    return _equal(subject, "x_hat")
