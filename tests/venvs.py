"""Virtual environments of other tools, whose pins do not go together with ours: made once per machine, then kept."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from midiscover.digests import cache_dir
from midiscover.saes import SAELENS_VERSION

FINISHED = "finished"
"""Written last; a folder without it is what an interrupted process left, and is made anew."""


def cached_venv(name: str, installs: Iterable[Sequence[str]]) -> Path:
    """The Python of the environment `name`, made by one `pip install` for each of `installs`, in order.

    `name` should hold every version that matters. The test fails with pip's output where pip does.
    """
    folder = cache_dir() / "venvs" / f"{name}-py{sys.version_info.major}.{sys.version_info.minor}"
    python = folder / "bin" / "python"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):  # another process makes it: wait, then use it
        if not (folder / FINISHED).exists():
            shutil.rmtree(folder, ignore_errors=True)
            checked([sys.executable, "-m", "venv", str(folder)])
            for packages in installs:
                checked([str(python), "-m", "pip", "install", "--no-input", *packages])
            (folder / FINISHED).touch()
    return python


def saelens_python() -> Path:
    """The Python of an environment with the SAELens whose format is written; made at the first call, torch and all."""
    torch_version = torch.__version__.partition("+")[0]
    # torch first and alone: it is the large one, and what comes after must not choose another.
    return cached_venv(
        f"saelens-{SAELENS_VERSION}-torch-{torch_version}",
        [[f"torch=={torch_version}"], [f"torch=={torch_version}", f"sae-lens=={SAELENS_VERSION}"]],
    )


def checked(
    command: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None, timeout: float = 1800
) -> str:
    """Run a command and return its output; the test fails with all that it said where it does not end with 0.

    It sees none of our Python's paths, unless `env` is given.
    """
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        command, cwd=cwd, env=kept if env is None else env, capture_output=True, text=True, timeout=timeout, check=False
    )
    if done.returncode:
        pytest.fail(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}\n{done.stderr}", pytrace=False)
    return done.stdout
