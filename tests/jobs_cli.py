"""The `midiscover` command as a user runs it: another process, its exit code, its output, its time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FORGOTTEN = (
    "MIDISCOVER_STORE",
    "MIDISCOVER_DATABASE_URL",
    "MIDISCOVER_WANDB_PROJECT",
    "RAY_ADDRESS",
    "AWS_ENDPOINT_URL",
    "AWS_ACCESS_KEY_ID",
)


class Done(NamedTuple):
    """A finished command."""

    code: int
    out: str
    err: str
    seconds: float


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables of a user who has set nothing, with `extra`."""
    kept = {name: value for name, value in os.environ.items() if name not in FORGOTTEN}
    return kept | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"} | dict(extra or {})


def command(*arguments: str) -> list[str]:
    """`midiscover ARGUMENTS` by this interpreter."""
    return [sys.executable, "-m", "midiscover.cli", *arguments]


def midiscover(
    *arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None, timeout: float = 280
) -> Done:
    """Run the command to its end."""
    began = time.monotonic()
    done = subprocess.run(
        command(*arguments), cwd=cwd, env=environment(env), capture_output=True, text=True, timeout=timeout, check=False
    )
    return Done(done.returncode, done.stdout, done.stderr, time.monotonic() - began)
