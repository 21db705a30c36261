"""connection.py: who has no token, or another one, is told; and nobody is waited for without end."""

from __future__ import annotations

import asyncio
import json
import threading
from base64 import b64encode
from collections.abc import AsyncIterator, Iterator
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.job_submission import JobStatus

from jobs import connection, submit
from midiscover.errors import ConfigError, StageError
from tests.unit.test_submit import FakeClient


class Answers(BaseHTTPRequestHandler):
    """A dashboard without a token, for whom a job runs; of its log it sends a line and then nothing, nor any answer."""

    log_asked = False
    over: threading.Event

    def do_GET(self) -> None:
        if self.path.endswith("/logs/tail"):
            type(self).log_asked = True
            key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
            self.send_response(101)
            for name, value in {
                "Upgrade": "websocket",
                "Connection": "Upgrade",
                "Sec-WebSocket-Accept": b64encode(sha1(key.encode()).digest()).decode(),
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"\x81\x04one\n")
        if self.log_asked:
            self.over.wait(60)
            return
        told = {"type": "SUBMISSION", "status": "RUNNING", "entrypoint": "x", "submission_id": "job"}
        version = {"version": "4", "ray_version": ray.__version__, "ray_commit": "x", "session_name": "x"}
        body = json.dumps(version if self.path == "/api/version" else told).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def dashboard() -> Iterator[str]:
    """Address of one that answers until it is asked for a log."""
    answers = type("Answers", (Answers,), {"over": threading.Event()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), answers)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    answers.over.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_cluster_that_falls_silent_is_given_up(
    dashboard: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its connections stay open, as where the other end of a tunnel has stopped: nothing ever breaks."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    for module in (connection, submit):
        monkeypatch.setattr(module, "SILENT_SECONDS", 2.0)
    monkeypatch.setattr(submit, "AWAY_SECONDS", 0.5)
    client = connection.connect(dashboard)
    assert client.get_job_info("job").status == JobStatus.RUNNING
    with pytest.raises(StageError, match=r"The cluster has not answered for .*Read timed out"):
        submit.follow_job(client, "job")
    assert capsys.readouterr().out == "one\n"


def test_a_quiet_job_is_followed_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its cluster answers: that it says nothing for long is no sign of anything."""
    monkeypatch.setattr(submit, "SILENT_SECONDS", 0.05)
    monkeypatch.setattr(submit, "AWAY_SECONDS", 0.0)

    class Quiet(FakeClient):
        async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
            self.asked += 1
            self.status = JobStatus.SUCCEEDED if self.asked > 5 else JobStatus.RUNNING
            yield "one\n"
            if self.asked <= 5:
                await asyncio.sleep(60)
            yield "two\n"

    client: Any = Quiet([])
    client.status = JobStatus.RUNNING
    assert submit.follow_job(client, "job") == 0
    assert client.asked == 6
    assert capsys.readouterr().out == "one\ntwo\n"


def test_a_cluster_without_a_token_and_a_token_that_is_not_there_are_told(
    dashboard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    with pytest.raises(ConfigError, match=f"The cluster at {dashboard} asks for no token"):
        connection.connect(dashboard)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nonexistent")
    with pytest.raises(ConfigError, match=r"token can't be read from /nonexistent \(FileNotFoundError\)"):
        connection.connect(dashboard)
    (tmp_path / "token").write_text("0" * 64 + "\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert connection.connect(dashboard).get_job_status("job") == JobStatus.RUNNING
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(ConfigError, match="RAY_AUTH_MODE is 'disabled'"):
        connection.connect(dashboard)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    (tmp_path / "token").write_text("\n")
    with pytest.raises(ConfigError, match=f"The cluster at {dashboard} asks for no token"):
        connection.connect(dashboard)
