"""Where a result came from: code, library versions, owner, time. Loads neither torch nor ray."""

from __future__ import annotations

import getpass
import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import midiscover

LIBRARIES = ("torch", "transformers", "ray", "safetensors", "numpy")


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def owner() -> str:
    """Who runs this: $MIDISCOVER_OWNER, else the name of the operating system's user."""
    named = os.environ.get("MIDISCOVER_OWNER")
    if named:
        return named
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown"


@cache
def code() -> dict[str, str | None]:
    """Version of miDiscover and, in a checkout, the commit (with '+' where files differ from it)."""
    return {"version": midiscover.__version__, "commit": os.environ.get("MIDISCOVER_COMMIT") or _commit()}


@cache
def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        return head + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=5)
    return done.stdout.strip()
