"""The `midiscover` command as a user runs it: another process, its exit code, its output, its time."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from midiscover.cli import entry as midiscover_entry

ROOT = Path(__file__).resolve().parent.parent
FORGOTTEN = (
    "MIDISCOVER_STORE",
    "MIDISCOVER_DATABASE_URL",
    "MIDISCOVER_WANDB_PROJECT",
    "RAY_ADDRESS",
    "AWS_ENDPOINT_URL",
    "AWS_ACCESS_KEY_ID",
)
NOT_NICE = {"RAY_worker_niceness": "0", "MIDISCOVER_NICENESS": "0"}
"""Of all tests: where one has no Ray, a niceness of 15 would leave another's workers a thirtieth of a core."""


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
    assert "streaming_executor" not in done.stdout + done.stderr, "Ray Data's own log is not for users"
    return Done(done.returncode, done.stdout, done.stderr, time.monotonic() - began)


def refused(*arguments: str, env: Mapping[str, str] | None = None) -> Done:
    """`midiscover ARGUMENTS` in this process: for what ends before a Ray is started. Spares 5 to 15 s of imports.

    Where the command would become its job, the job's own entry is called. Each way into a process of its own is
    tested elsewhere.
    """
    out, err, began = io.StringIO(), io.StringIO(), time.monotonic()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        patch.dict(os.environ, env or {}),
        patch.object(os, "execv", _become),
    ):
        for name in FORGOTTEN:
            os.environ.pop(name, None)
        with patch.object(sys, "argv", ["midiscover", *arguments]):
            try:
                midiscover_entry()
                code = 0
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else 0
    return Done(code, out.getvalue(), err.getvalue(), time.monotonic() - began)


def _become(_python: str, command: list[str]) -> None:
    """What os.execv of a job would run."""
    flag, module, *arguments = command[1:]
    assert flag == "-m"
    from jobs.runtime import run_main

    with patch.object(sys, "argv", [module, *arguments]):
        run_main(importlib.import_module(module).main)
