"""`midiscover serve` as a process of its own, on a Ray of its own; ended by its pid."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import requests

from tests.jobs_cli import NOT_NICE, command, environment
from tests.ports import free_port

START_SECONDS = 180.0


@dataclass
class Deployment:
    """A running one."""

    address: str
    key: str
    process: subprocess.Popen[bytes]
    said: Path
    session: requests.Session = field(default_factory=requests.Session)

    def headers(self) -> dict[str, str]:
        """Of a request with the first key."""
        return {"Authorization": f"Bearer {self.key}"}

    def get(self, path: str, **given: Any) -> requests.Response:
        """GET with the key."""
        return self.session.get(f"{self.address}{path}", headers=self.headers(), timeout=60, **given)

    def post(self, path: str, body: Any, **given: Any) -> requests.Response:
        """POST with the key."""
        return self.session.post(f"{self.address}{path}", headers=self.headers(), json=body, timeout=60, **given)

    def workers(self, title: str) -> list[psutil.Process]:
        """Ray's processes below it whose title names this."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if title in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def processes(self) -> str:
        """What runs below it and what it has used, for the report of a test that waited in vain."""
        lines = []
        for process in self.workers(""):
            with contextlib.suppress(psutil.NoSuchProcess):
                used, title = process.cpu_times(), " ".join(process.cmdline())[:90]
                lines.append(
                    f"{process.pid} {process.status()} nice {process.nice()} {used.user + used.system:.1f} s {title}"
                )
        return "\n".join(lines)

    def end(self, number: int = signal.SIGINT) -> int:
        """Ctrl-C; the exit code."""
        self.process.send_signal(number)
        code = self.process.wait(120)
        assert self.process.stdout is not None
        assert self.process.stdout.read() == b"", "nothing is on stdout but the key"
        return code


@contextlib.contextmanager
def deployed(store: Path | str, *flags: str, env: Mapping[str, str] | None = None) -> Iterator[Deployment]:
    """Serve a store until the body ends."""
    port = free_port()
    folder = Path(os.environ.get("PYTEST_TMP", "/tmp"))
    said = folder / f"serve-{port}.err"
    variables = {name: value for name, value in environment(env).items() if name not in NOT_NICE}  # as for a user
    with said.open("wb") as err:
        process = subprocess.Popen(
            command("serve", "--store", str(store), "--port", str(port), "--new-key", *flags),
            env=variables,
            stdout=subprocess.PIPE,
            stderr=err,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    children: list[psutil.Process] = []
    try:
        assert process.stdout is not None
        key = process.stdout.readline().decode().strip()
        assert key.startswith("mdc_"), said.read_text()
        found = Deployment(f"http://127.0.0.1:{port}", key, process, said)
        ends = time.monotonic() + START_SECONDS
        while "Ctrl-C ends it" not in said.read_text():
            assert time.monotonic() < ends, said.read_text()
            time.sleep(0.1)
        children = psutil.Process(process.pid).children(recursive=True)
        yield found
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(90)
            except subprocess.TimeoutExpired:
                process.kill()
        for child in children:
            if child.is_running():
                child.kill()
        if process.stdout is not None:
            process.stdout.close()
        said.unlink(missing_ok=True)
