"""The deployment of Ray Serve for one machine with one interpreter: HTTP and language model in one process."""

from __future__ import annotations

import logging
import math
import threading
import time
from typing import Any

import uvicorn

from midiscover.errors import StageError
from midiscover.serving import serve_config
from serve.logs import structured
from serve.replicas import InterpreterReplica, RequestMeter, first_of_models, watched_context

KEEP_ALIVE_SECONDS = 30
"""Of a connection on which nothing comes."""
AGAIN_SECONDS = 60.0
"""How long a language model that could not be loaded is left alone before it is tried again."""
Address = tuple[str, int]
"""Host and port."""
log = logging.getLogger("midiscover.serve")


class Together:
    """HTTP and an interpreter of each language model in one process, with a port of its own.

    The way through Serve's proxy and from process to process takes as long as a fifth of a short text's forward pass on
    two cores. Serve starts this process, asks after its health, starts it anew when it dies, and has it end in order.
    """

    def __init__(self, tree: dict[str, Any], at: Address) -> None:
        """StageError, with the reasons, where SAEs are hosted and none of their language models can be loaded."""
        structured()
        from serve.web import create_app

        self._server: HttpServer | None = None
        self._tree, self._config = tree, serve_config(tree)
        self._models: dict[tuple[str, str], InterpreterReplica] = {}
        self._failed: dict[tuple[str, str], tuple[float, str]] = {}
        self._context = watched_context(self._config, self._models)
        self._load_models()
        if self._failed and not self._models:
            raise StageError("; ".join(told for _, told in self._failed.values()))
        threading.Thread(target=self._follow, name="models", daemon=True).start()
        self._server = HttpServer(create_app(self._context, RequestMeter()), at, self._config.limits.seconds)

    def _load_models(self) -> None:
        """Those that hosted SAEs read; one that can't be loaded takes no other down."""
        for model, sae in first_of_models(self._context.catalog.hosted).items():
            at, before = self._failed.get(model, (-math.inf, ""))
            if model in self._models or time.monotonic() - at < AGAIN_SECONDS:
                continue
            try:
                self._models[model] = InterpreterReplica(self._tree, dict(sae.record), sae.neuronpedia_model)
                self._failed.pop(model, None)
            except Exception as error:  # of the model, its disk or the card; it may only be out of reach
                told = f"{sae.model_name}, which {sae.id} reads, can't be loaded: {str(error) or type(error).__name__}"
                self._failed[model] = (time.monotonic(), told)
                if told != before:
                    log.warning("model_broken", extra={"fields": {"sae": sae.id, "reason": told}})

    def _follow(self) -> None:
        """Load the language models of SAEs that come later."""
        while True:
            time.sleep(self._config.refresh_seconds)
            self._load_models()

    def check_health(self) -> None:
        """See `InterpreterReplica.check_health`."""
        for model in list(self._models.values()):
            model.check_health()
        if self._server is not None:
            self._server.check()

    def __del__(self) -> None:
        """Called by Serve before it ends the process."""
        if self._server is not None:
            self._server.end()
            self._context.close()


class HttpServer:
    """An ASGI application on an address, in a thread."""

    def __init__(self, app: Any, at: Address, seconds: float) -> None:
        """seconds: how long requests under way may take at the end. RuntimeError where the address is taken."""
        self._seconds = seconds
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                *at,
                lifespan="off",
                log_config=None,
                access_log=False,  # our own log has a line for each request
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=math.ceil(seconds),
            )
        )
        self._thread = threading.Thread(target=self._server.run, name="http", daemon=True)
        self._thread.start()
        while not self._server.started:
            self.check()
            time.sleep(0.01)

    def check(self) -> None:
        """RuntimeError where it has ended."""
        if not self._thread.is_alive():
            raise RuntimeError(f"{self._server.config.host}:{self._server.config.port} is not listened on any more.")

    def end(self) -> None:
        """Listen no more, and answer what is under way."""
        self._server.should_exit = True
        self._thread.join(self._seconds)
