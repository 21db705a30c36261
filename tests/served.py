"""A small store to serve, and the application over it in this process: no Ray, no port, everything else real."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from midiscover.serving import ServeConfig, serve_config
from midiscover.store.storage import Storage, open_store
from midiscover.tracking import Tracker
from serve.access import Access
from serve.catalog import Catalog
from serve.context import Context
from serve.interpreter import Interpreter
from serve.web import create_app
from tests.ports import free_port


@dataclass
class Meter:
    """Keeps what the guard counted."""

    requests: list[tuple[str, str, int]] = field(default_factory=list)

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """One request."""
        self.requests.append((route, method, status))


@dataclass
class Served:
    """The application, and the keys to it."""

    client: TestClient
    context: Context
    interpreter: Interpreter
    keys: Mapping[str, str]
    meter: Meter

    def headers(self, scope: str = "read") -> dict[str, str]:
        """Of a request with the key of this scope."""
        return {"Authorization": f"Bearer {self.keys[scope]}"}

    def get(self, path: str, scope: str = "read", **given: Any) -> Any:
        """GET."""
        return self.client.get(path, headers=self.headers(scope), **given)

    def post(self, path: str, body: Any, scope: str = "read") -> Any:
        """POST of JSON."""
        return self.client.post(path, json=body, headers=self.headers(scope))

    @property
    def saes(self) -> list[str]:
        """Ids of what is hosted."""
        return [sae.id for sae in self.context.catalog.hosted]


@contextmanager
def served(store: Path | Storage, jobs: Any = None, **settings: Any) -> Iterator[Served]:
    """Serve a store in this process."""
    storage = open_store(str(store), create=False) if isinstance(store, Path) else store
    config: ServeConfig = serve_config(
        {"store": storage.uri, "threads": 1, "allowed_hosts": ["testserver", "127.0.0.1"], **settings}
    )
    with Tracker.for_store(storage) as tracker:
        keys = {scope: tracker.create_key(scope, [scope]) for scope in ("read", "steer", "admin")}
        catalog, access = Catalog(storage, config), Access(tracker.list_keys)
        catalog.refresh()
        access.refresh()
        interpreter = Interpreter(config, catalog.default().record)
        context = Context(
            config=config,
            catalog=catalog,
            access=access,
            models={catalog.default().model: interpreter},
            tracker=tracker,
            jobs=lambda: jobs,
        )
        meter = Meter()
        with TestClient(create_app(context, meter), raise_server_exceptions=False) as client:
            yield Served(client, context, interpreter, keys, meter)


async def collected(pieces: AsyncIterator[Any]) -> list[Any]:
    """All of a stream."""
    return [piece async for piece in pieces]


@pytest.fixture(scope="session")
def store_to_serve(finished: Path) -> Path:
    """The store of `finished`."""
    return finished / "store"


@pytest.fixture(scope="module")
def store(store_to_serve: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, so that keys of one test file are not those of another."""
    copy = tmp_path_factory.mktemp("copy") / "store"
    shutil.copytree(store_to_serve, copy)
    return copy


@pytest.fixture(scope="module")
def api(store: Path) -> Iterator[Served]:
    """The application over that copy."""
    with served(store) as one:
        yield one


@contextmanager
def live(one: Served) -> Iterator[str]:
    """The same application behind a port of 127.0.0.1, for clients that need one; gives its address."""
    with listening(one.client.app) as port:
        yield f"http://127.0.0.1:{port}"


@contextmanager
def listening(app: Any) -> Iterator[int]:
    """An ASGI application behind a port of 127.0.0.1; gives the port."""
    import uvicorn

    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    ends = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < ends, "the server did not start"
        time.sleep(0.02)
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join(20)
