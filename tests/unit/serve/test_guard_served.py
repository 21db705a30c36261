"""The guard between a real router and a real server: paths under a prefix, and answers that nobody takes."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route
from starlette.testclient import TestClient

from serve.guard import ELSEWHERE, PART
from tests.served import listening
from tests.unit.serve.test_guard import SCOPES, guarded, text_of


@pytest.mark.parametrize("path", ["/mid/train", "/mid/health", "/mid/login", "/train", "/mid"])
def test_under_a_root_path_nothing_is_answered(path: str) -> None:
    """Starlette looks a route up without it, so that /mid/train is /train to it and nothing to a list of paths."""
    ran: list[str] = []

    async def runs(request: Request) -> None:
        ran.append(request.url.path)

    routes: Any = Starlette(routes=[Route(one, runs, methods=["POST"]) for one in ("/train", "/health", "/login")])
    client = TestClient(guarded(routes, allowed_hosts=["testserver"]), root_path="/mid")
    for scope in (*SCOPES, None):
        answer = client.post(path, json={}, headers={"X-Api-Key": text_of(scope)} if scope else {})
        assert (answer.status_code, answer.json()["detail"]) == (404, ELSEWHERE)
    assert ran == []


class Large:
    """Answers at once with one body, as large as no buffer of a connection is."""

    body = bytes(range(256)) * 100_003

    def __init__(self) -> None:
        self.began, self.ends = threading.Event(), list[str]()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-length", str(len(self.body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        self.began.set()
        try:
            await send({"type": "http.response.body", "body": self.body})
            self.ends.append("sent")
        except BaseException as error:
            self.ends.append(type(error).__name__)
            raise


def asking(port: int, buffer: int = 4096) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    client.connect(("127.0.0.1", port))
    client.settimeout(20)
    head = f"GET /saes HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Api-Key: {text_of('read')}\r\n\r\n"
    client.sendall(head.encode())
    return client


def until(holds: Callable[[], bool], seconds: float = 10) -> None:
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.02)


def received(client: socket.socket, *, slowly: float = 0.0) -> bytes:
    """The body, up to its end or to that of the connection; with a pause after each piece for so many seconds."""
    ends, found, head = time.monotonic() + slowly, bytearray(), 0
    while not head or len(found) < head + len(Large.body):
        piece = client.recv(2**16)
        if not piece:
            break
        found += piece
        head = head or found.find(b"\r\n\r\n") + len(b"\r\n\r\n")
        if time.monotonic() < ends:
            time.sleep(0.02)
    return bytes(found[head:])


def test_an_answer_keeps_its_place_until_it_is_taken() -> None:
    app: Any = Large()
    guard = guarded(app, allowed_hosts=["127.0.0.1"], limits={"concurrent_per_key": 2})
    with listening(guard) as port:
        clients = [asking(port) for _ in range(2)]
        until(lambda: guard._running.total() == 2 and app.began.is_set())
        time.sleep(0.3)
        assert (guard._running.total(), app.ends) == (2, [])
        with asking(port) as third:
            assert third.recv(2**16).startswith(b"HTTP/1.1 429")
        for client in clients:
            assert received(client) == Large.body
        until(lambda: guard._running.total() == 0)
        assert app.ends == ["sent"] * 2
        for client in clients:
            client.close()


def test_an_answer_of_which_nothing_is_taken_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    app: Any = Large()
    guard = guarded(app, allowed_hosts=["127.0.0.1"], limits={"seconds": 1.0})
    with listening(guard) as port, caplog.at_level("INFO", "midiscover.serve"), asking(port) as client:
        until(lambda: app.ends == ["_UntakenError"])
        until(lambda: guard._running.total() == 0)
        assert PART < len(received(client)) < len(Large.body), "the connection is closed"
    (line,) = [record for record in caplog.records if record.getMessage() == "request"]
    assert line.fields["status"] == 499  # type: ignore[attr-defined]
    assert not [record for record in caplog.records if record.getMessage() == "failed"]


def test_who_takes_an_answer_slowly_gets_it_whole() -> None:
    app: Any = Large()
    guard = guarded(app, allowed_hosts=["127.0.0.1"], limits={"seconds": 2.0})
    with listening(guard) as port, asking(port, 2**17) as client:
        taking = threading.Timer(3.5, lambda: app.ends.append("3.5 s"))
        taking.start()
        assert received(client, slowly=4.0) == Large.body
        until(lambda: app.ends == ["3.5 s", "sent"])  # so that it took longer than the limit
