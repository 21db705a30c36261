"""A proxy before an S3 server that breaks requests on order, as networks and busy servers do."""

from __future__ import annotations

import random
import threading
from collections import Counter
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class FaultProxy:
    """Passes requests on to `endpoint`, but for those that it is told to break; `broken` counts these.

    cut_bodies, lose_replies: how many from now on. A cut body is a GET answer of which only half arrives; a lost reply
    is a PUT that is carried out, but whose answer is a dropped connection. shares: `503`, `cut`, `lost` -> the share of
    requests that meet this, by a seeded chance, for as long as it stands there. down: every connection is dropped.
    """

    def __init__(self, endpoint: str, seed: int = 0) -> None:
        """Listen on a free port of 127.0.0.1."""
        self.cut_bodies = self.lose_replies = 0
        self.broken: Counter[str] = Counter()
        self.shares: dict[str, float] = {}
        self.down = False
        self._chance = random.Random(seed)
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, urlsplit(endpoint).netloc))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def breaks(self, how: str, left: int = 0) -> bool:
        """Whether this request is to meet a fault; counts it."""
        with self._lock:
            broken = left > 0 or self._chance.random() < self.shares.get(how, 0.0)
            self.broken[how] += broken
            return broken

    def __enter__(self) -> FaultProxy:
        """Serve from a thread."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _handler(proxy: FaultProxy, upstream: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass_on(self) -> None:
            self.close_connection = True
            if proxy.down:
                proxy.broken["down"] += 1
                return
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if proxy.breaks("503"):
                self.send_response(503)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            connection = HTTPConnection(upstream, timeout=30)
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():  # Host as the client signed it
                if name.lower() != "expect":
                    connection.putheader(name, value)
            connection.endheaders(body or None)
            answer = connection.getresponse()
            data = answer.read()
            connection.close()
            if self.command == "PUT" and proxy.breaks("lost", proxy.lose_replies):
                proxy.lose_replies = max(0, proxy.lose_replies - 1)
                return
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("connection", "date", "server", "transfer-encoding", "content-length"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length", str(len(data))) if self.command == "HEAD" else str(len(data))
            self.send_header("Content-Length", length)
            self.end_headers()
            whole = self.command == "GET" and len(data) > 1 and answer.status < 300
            if whole and proxy.breaks("cut", proxy.cut_bodies):
                proxy.cut_bodies = max(0, proxy.cut_bodies - 1)
                data = data[: len(data) // 2]
            self.wfile.write(data)

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _pass_on

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    return Handler
