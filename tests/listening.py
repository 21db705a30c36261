"""A server of a test's own on a free port of this machine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler], **given: Any) -> Iterator[str]:
    """Has `handler`, with these attributes, answer until the block ends; gives the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler,), given))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
