"""The deployments of Ray Serve: an ingress that speaks HTTP and holds no model, and interpreters that hold one.

One interpreter deployment for each language model that the hosted SAEs read; one forward of it serves all SAEs asked,
so nothing is routed by SAE. What an interpreter answers is plain arrays, never a tensor and never a dense code. Where
one machine has one interpreter, both are one process: `together`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Literal

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.util.metrics import Counter, Gauge, Histogram

from midiscover.serving import ServeConfig, serve_config
from midiscover.store.storage import open_store
from midiscover.tracking import Tracker
from serve.access import Access
from serve.catalog import Catalog
from serve.context import Context
from serve.exchange import Front, Model, Problem, Query, SteerPiece, SteerRequest, TextAnswer
from serve.hosted import Hosted
from serve.logs import structured
from serve.problems import ProblemError

BUSY = "All interpreters are busy; try again in a moment."
LOST = "The interpreter was lost while it worked on this; ask again."
GAUGES = ("sae_bytes", "cache_bytes")
COUNTS = ("texts", "tokens", "batches", "generated_tokens", "sae_loads", "cache_hits", "cache_misses")
log = logging.getLogger("midiscover.serve")


class InterpreterReplica:
    """`serve.interpreter.Interpreter` as a deployment; torch is loaded where it runs, not where it is deployed."""

    def __init__(self, tree: dict[str, Any], record: dict[str, Any], label: str) -> None:
        structured()
        from serve.interpreter import Interpreter

        self._inner = Interpreter(serve_config(tree), record)
        self._meter = InterpreterMeter(label)

    async def read(self, texts: Sequence[str], queries: Sequence[Query], front: Front) -> list[TextAnswer] | Problem:
        """See `exchange.Model`."""
        answer = await self._inner.read(texts, queries, front)
        self._meter.tell(await self._inner.facts())
        return answer

    async def concept(self, name: str, saes: Sequence[str], top: int) -> dict[str, Any] | Problem:
        """See `exchange.Model`."""
        return await self._inner.concept(name, saes, top)

    async def tokenise(self, text: str, front: Front) -> TextAnswer | Problem:
        """See `exchange.Model`."""
        return await self._inner.tokenise(text, front)

    async def direction(self, sae: str, feature: int, which: Literal["encoder", "decoder"]) -> list[float] | Problem:
        """See `exchange.Model`."""
        return await self._inner.direction(sae, feature, which)

    async def nearest(self, sae: str, vector: Sequence[float] | int, top: int) -> list[tuple[int, float]] | Problem:
        """See `exchange.Model`."""
        return await self._inner.nearest(sae, vector, top)

    async def steer(self, request: SteerRequest) -> AsyncIterator[SteerPiece | Problem]:
        """See `exchange.Model`."""
        try:
            async for piece in self._inner.steer(request):
                yield piece
        finally:
            self._meter.tell(await self._inner.facts())

    async def facts(self) -> dict[str, Any]:
        """See `exchange.Model`."""
        return {**await self._inner.facts(), "pid": os.getpid()}

    def check_health(self) -> None:
        """Asked by Serve every few seconds; a replica that raises is replaced."""
        self._inner.check_health()


class RemoteModel:
    """An interpreter deployment as the ingress sees it."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._stream = handle.options(stream=True)

    async def read(self, texts: Sequence[str], queries: Sequence[Query], front: Front) -> list[TextAnswer] | Problem:
        """See `exchange.Model`."""
        return await self._asked("read", texts, queries, front)

    async def concept(self, name: str, saes: Sequence[str], top: int) -> dict[str, Any] | Problem:
        """See `exchange.Model`."""
        return await self._asked("concept", name, saes, top)

    async def tokenise(self, text: str, front: Front) -> TextAnswer | Problem:
        """See `exchange.Model`."""
        return await self._asked("tokenise", text, front)

    async def direction(self, sae: str, feature: int, which: Literal["encoder", "decoder"]) -> list[float] | Problem:
        """See `exchange.Model`."""
        return await self._asked("direction", sae, feature, which)

    async def nearest(self, sae: str, vector: Sequence[float] | int, top: int) -> list[tuple[int, float]] | Problem:
        """See `exchange.Model`."""
        return await self._asked("nearest", sae, vector, top)

    async def steer(self, request: SteerRequest) -> AsyncIterator[SteerPiece | Problem]:
        """See `exchange.Model`."""
        try:
            pieces: Any = self._stream.steer.remote(request)
            async for piece in pieces:
                yield piece
        except BackPressureError:
            yield Problem(503, BUSY)
        except (RayActorError, RayServeException):
            yield Problem(503, LOST)

    async def facts(self) -> dict[str, Any]:
        """See `exchange.Model`."""
        return await self._asked("facts")

    async def _asked(self, method: str, *args: Any) -> Any:
        try:
            return await getattr(self._handle, method).remote(*args)
        except BackPressureError as error:
            raise ProblemError(503, BUSY) from error
        except (RayActorError, RayServeException) as error:
            raise ProblemError(503, LOST) from error


class Ingress:
    """Keys, limits, catalog and routes; asks the interpreters."""

    def __init__(self, tree: dict[str, Any], models: dict[tuple[str, str], DeploymentHandle]) -> None:
        structured()
        self._config = serve_config(tree)
        self._models = models
        self._context: Context | None = None

    def __serve_build_asgi_app__(self) -> Any:
        """Serve asks for the application once the replica stands."""
        from serve.web import create_app

        models = {model: RemoteModel(handle) for model, handle in self._models.items()}
        self._context = watched_context(self._config, models)
        return create_app(self._context, RequestMeter())

    def __del__(self) -> None:
        """Called by Serve before it ends the process."""
        if self._context is not None:
            self._context.close()


def watched_context(config: ServeConfig, models: Mapping[tuple[str, str], Model]) -> Context:
    """What the routes work with; threads look again for SAEs and keys."""
    storage = open_store(config.store, create=False, patient=False)
    tracker = Tracker.for_store(storage)
    catalog, access = Catalog(storage, config), Access(tracker.list_keys)
    for look in (catalog.refresh, access.refresh):
        look()
    catalog.watch()
    access.watch(config.refresh_seconds)
    return Context(
        config=config,
        catalog=catalog,
        access=access,
        models=models,
        tracker=tracker,
        jobs=lambda: jobs_client(config),
    )


def first_of_models(saes: Sequence[Hosted]) -> dict[tuple[str, str], Hosted]:
    """Language model -> the first SAE that reads it."""
    firsts: dict[tuple[str, str], Hosted] = {}
    for sae in saes:
        firsts.setdefault(sae.model, sae)
    return firsts


def jobs_client(config: ServeConfig) -> Any:
    """A client of the Jobs API of the named cluster, or of the Ray that this runs in."""
    from ray.job_submission import JobSubmissionClient

    address = config.jobs or dashboard()
    if address is None:
        raise ProblemError(503, "This deployment's Ray has no dashboard, so it can't run jobs; set `jobs`.")
    return JobSubmissionClient(address)


def dashboard() -> str | None:
    """Address of the dashboard of the Ray that this process belongs to."""
    from ray.experimental.internal_kv import _internal_kv_get

    found = _internal_kv_get("dashboard", namespace=b"dashboard") or _internal_kv_get("webui:url")
    return f"http://{found.decode()}" if found else None


class RequestMeter:
    """Numbers about requests, through Ray's metrics to Prometheus."""

    def __init__(self) -> None:
        tags = ("route", "method", "status")
        self._requests = Counter("midiscover_requests", "Requests answered.", tag_keys=tags)
        bounds: list[float] = [5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 60_000]
        self._ms = Histogram("midiscover_request_ms", "Time to the answer.", boundaries=bounds, tag_keys=("route",))

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """See `guard.Meter`."""
        self._requests.inc(tags={"route": route, "method": method, "status": str(status)})
        self._ms.observe(max(1000 * seconds, 0.001), tags={"route": route})


class InterpreterMeter:
    """Numbers about an interpreter, through Ray's metrics to Prometheus."""

    def __init__(self, model: str) -> None:
        tags = ("model",)
        self._tags = {"model": model}
        self._counters = {n: Counter(f"midiscover_{n}", n.replace("_", " "), tag_keys=tags) for n in COUNTS}
        self._gauges = {n: Gauge(f"midiscover_{n}", n.replace("_", " "), tag_keys=tags) for n in GAUGES}
        bounds: list[float] = [16, 64, 256, 1024, 4096]
        self._sizes = Histogram(
            "midiscover_batch_tokens", "Tokens of a forward pass.", boundaries=bounds, tag_keys=tags
        )
        self._told: dict[str, float] = dict.fromkeys(COUNTS, 0)

    def tell(self, facts: dict[str, Any]) -> None:
        """What has been added since the last time."""
        added = {name: facts[name] - self._told[name] for name in COUNTS}
        for name, value in added.items():
            if value:
                self._counters[name].inc(value, tags=self._tags)
                self._told[name] = facts[name]
        for name, gauge in self._gauges.items():
            gauge.set(facts[name], tags=self._tags)
        if added["batches"]:
            self._sizes.observe(max(added["tokens"] / added["batches"], 1), tags=self._tags)
