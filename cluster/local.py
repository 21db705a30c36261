"""A cluster on this machine to try things on: `make cluster` and `make cluster-down`, from a clone.

    python -m cluster.local up [--workers 2] [--folder midiscover-cluster]
    python -m cluster.local down [--folder midiscover-cluster]

A Ray head that runs no work, workers, SeaweedFS as the store and PostgreSQL as the tracker: separate processes that
listen on 127.0.0.1 and know each other by random passwords. They are those that the tests use, held by one process in
the background; what is in them goes with it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

from tests.clusters import local_cluster
from tests.postgres import NoPostgresError, fresh_database, postgres
from tests.s3 import s3_server

START_SECONDS = 180.0
STOP_SECONDS = 60.0
ENV = "env"
"""What a shell reads to use the cluster; written once all of it stands."""
PID = "pid"
READY = """\
A cluster of {workers} workers is up, with a store and a database of its own. To use it:

  . {folder}/env
  midiscover doctor quick
  midiscover pipeline quick --resources.threads 1
  midiscover jobs list

`make cluster-down` ends it and removes what it holds."""


def main() -> int:
    """Do what is asked; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cluster.local", description="A cluster on this machine.")
    parser.add_argument("action", choices=["up", "down", "hold"], help="hold: up, in the foreground, until SIGTERM")
    parser.add_argument("--folder", default="midiscover-cluster", type=Path, help="its token, settings and logs")
    parser.add_argument("--workers", default=2, type=int, help="nodes that run work")
    args = parser.parse_args()
    match args.action:
        case "up":
            return up(args.folder, args.workers)
        case "down":
            return down(args.folder)
    return hold(args.folder.resolve(), args.workers)


def up(folder: Path, workers: int) -> int:
    """Start what holds the cluster, and wait until it can be used."""
    if _holder(folder) is not None:
        print(f"A cluster is up already: `. {folder}/env` to use it, `make cluster-down` to end it.", file=sys.stderr)
        return 2
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, parents=True)
    command = [sys.executable, "-m", "cluster.local", "hold", "--folder", str(folder), "--workers", str(workers)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    (folder / PID).write_text(f"{process.pid} {psutil.Process(process.pid).create_time()}\n")
    ends = time.monotonic() + START_SECONDS
    while not (folder / ENV).exists():
        if process.poll() is not None or time.monotonic() > ends:
            _end(process.pid)
            print(f"The cluster did not start: {_last_line(folder / 'log')} ({folder}/log)", file=sys.stderr)
            return 1
        time.sleep(0.2)
    print(READY.format(workers=workers, folder=folder))
    return 0


def down(folder: Path) -> int:
    """End the cluster of a folder; what it held goes with it."""
    holder = _holder(folder)
    if holder is None:
        print(f"No cluster is up in {folder}.", file=sys.stderr)
        return 2
    _end(holder)
    shutil.rmtree(folder, ignore_errors=True)
    return 0


def hold(folder: Path, workers: int) -> int:
    """All servers, for as long as this process lives."""
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with contextlib.ExitStack() as stack:
        try:
            database = stack.enter_context(fresh_database(stack.enter_context(postgres())))
        except NoPostgresError as error:
            print(error, file=sys.stderr)
            return 1
        server = stack.enter_context(s3_server())
        # Threads that wait must not spin: all nodes share these cores.
        nodes = server.environment | {"MIDISCOVER_DATABASE_URL": database, "OMP_WAIT_POLICY": "PASSIVE"}
        cluster = stack.enter_context(local_cluster(folder, workers, nodes))
        variables = {
            **server.environment,  # a local model or text is put into the store from here
            "MIDISCOVER_STORE": server.uri("store"),
            "MIDISCOVER_DATABASE_URL": database,
            **cluster.client(),
        }
        lines = [f"export {name}={shlex.quote(value)}\n" for name, value in variables.items()]
        lines.append(f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH\n")
        made = folder / f".{ENV}"
        made.touch(mode=0o600)
        made.write_text("".join(lines))
        made.replace(folder / ENV)
        ended.wait()
    return 0


def _holder(folder: Path) -> int | None:
    """The pid of the process that holds the cluster of a folder, if it lives."""
    try:
        pid, created = (folder / PID).read_text().split()
        return int(pid) if psutil.Process(int(pid)).create_time() == float(created) else None
    except (OSError, ValueError, psutil.NoSuchProcess):
        return None


def _end(pid: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
        process = psutil.Process(pid)
        os.kill(pid, signal.SIGTERM)
        process.wait(STOP_SECONDS)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


if __name__ == "__main__":
    sys.exit(main())
