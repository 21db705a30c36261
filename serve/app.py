"""Starts the application: `python -m serve.app` on this machine, `build` for `serve deploy serve/config.yaml`.

On this machine a Ray of its own is started and ended with it, listening on 127.0.0.1 alone, unless RAY_ADDRESS names
one to join.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Container, Set
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ray
from ray import serve
from ray._private.parameter import RayParams
from ray.serve.schema import ApplicationStatusOverview

from midiscover.configio import to_tree
from midiscover.cores import cores
from midiscover.errors import ConfigError, CorruptError, MiDiscoverError, NotFoundError, StageError
from midiscover.serving import ServeArgs, ServeConfig, parse_serve, serve_config
from midiscover.store.storage import Storage, open_store
from midiscover.tracking import Tracker
from serve.catalog import Catalog
from serve.hosted import Hosted
from serve.replicas import Ingress, InterpreterReplica, first_of_models
from serve.together import KEEP_ALIVE_SECONDS, Address, Together

NAME = "midiscover"
INTERPRETER, INGRESS, TOGETHER = "interpreter", "ingress", "together"
WAITING = 256
"""Requests that wait for an interpreter; more are answered by 503."""
FIRST_KEY = "first key"
LEAST_CPUS = 4
"""That a Ray of this machine claims to have, so that a sweep of POST /train finds its places."""


def build(args: dict[str, Any]) -> serve.Application:
    """For Serve: `import_path: serve.app:build`, with the settings of `midiscover.serving.ServeConfig` as `args`."""
    return application(serve_config(args))


def application(config: ServeConfig, at: Address | None = None, without: Container[str] = ()) -> serve.Application:
    """The deployments for what the store holds now. MiDiscoverErrors for a store or SAE that is not there.

    at: where one process with everything shall listen; None: ingress and interpreters, behind Serve's own HTTP.
    without: names of interpreters that are left out, as they do not start.
    """
    storage = open_store(config.store, create=False, patient=False)
    catalog = Catalog(storage, config)
    catalog.refresh()
    if not catalog.hosted:
        for told in catalog.promoted_wrong:
            raise CorruptError(told)
        for told in catalog.missing.values() if not config.follows else ():  # else one that is promoted may yet come
            raise NotFoundError(told)
    for told in (*catalog.promoted_wrong, *catalog.missing.values()):
        _say(f"left out: {told}")
    tree, firsts = to_tree(config), first_of_models(catalog.hosted)
    if at is not None:
        together: Any = serve.deployment(Together, name=TOGETHER, **_replica_options(config))
        return together.bind(tree, at)
    names = {
        model: INTERPRETER if len(firsts) == 1 else f"{INTERPRETER}-{sae.neuronpedia_model}"
        for model, sae in firsts.items()
    }
    handles = {
        model: _interpreter(config, names[model]).bind(tree, dict(sae.record), sae.neuronpedia_model)
        for model, sae in firsts.items()
        if names[model] not in without
    }
    deployment = serve.deployment(
        name=INGRESS,
        num_replicas=config.ingresses,
        max_ongoing_requests=2 * config.limits.concurrent,  # the guard says no, with a reason
        max_queued_requests=config.limits.concurrent,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=5,
        graceful_shutdown_timeout_s=config.limits.seconds,
    )
    return deployment(serve.ingress()(Ingress)).bind(tree, handles)


def _interpreter(config: ServeConfig, name: str) -> Any:
    """The deployment of one language model."""
    most = config.max_replicas or config.replicas
    scaling: dict[str, Any] = {"num_replicas": config.replicas}
    if most > config.replicas:
        scaling = {
            "autoscaling_config": {
                "min_replicas": config.replicas,
                "max_replicas": most,
                "target_ongoing_requests": 8,
                "upscale_delay_s": 5,
                "downscale_delay_s": 120,
            }
        }
    return serve.deployment(
        InterpreterReplica,
        name=name,
        max_ongoing_requests=config.limits.concurrent,
        max_queued_requests=WAITING,
        **_replica_options(config),
        **scaling,
    )


def _replica_options(config: ServeConfig) -> dict[str, Any]:
    """Of what holds a language model."""
    return {
        "ray_actor_options": {"num_cpus": config.cpus, "num_gpus": config.gpus},
        "health_check_period_s": 5,
        "health_check_timeout_s": 60,
        "graceful_shutdown_timeout_s": config.limits.seconds,
    }


def main(argv: list[str]) -> int:
    """Serve until Ctrl-C or SIGTERM."""
    args = parse_serve(argv)
    storage = open_store(args.config.store, create=False)
    with Tracker.for_store(storage) as tracker:
        key = _first_key(tracker, args)
    _require_free(args.host, args.port)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    _start_ray()
    for number in (signal.SIGINT, signal.SIGTERM):  # Ray puts its own in place
        signal.signal(number, lambda *_: ended.set())
    try:
        _say("starting: the language model and the HTTP interface take some seconds")
        address = _run(args)
        _say(f"{address} serves {storage.uri}")
        if key is not None:
            _say("the first API key, which is shown this once:")
            print(key, flush=True)
        _say(f"try: curl -H 'Authorization: Bearer $KEY' {address}/saes; a browser asks for the key. Ctrl-C ends it.")
        _follow(args, storage, ended)
        _say("ending: requests under way are answered first")
    finally:
        with contextlib.redirect_stdout(io.StringIO()):  # Ray tells there of a task of Serve's that the end cuts off
            serve.shutdown()
            ray.shutdown()
    return 0


def _require_free(host: str, port: int) -> None:
    """Serve's proxy would share a port with another one, and each get a part of the requests."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"{_place(host, port)} can't be listened on: {error.strerror}; give another --port."
            ) from None


def _place(host: str, port: int) -> str:
    """As in an address: what has colons of its own in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_together(config: ServeConfig) -> bool:
    """Whether one process does it all, which on one machine is fastest."""
    return config.one_process and not os.environ.get("RAY_ADDRESS")


def _follow(args: ServeArgs, storage: Storage, ended: threading.Event) -> None:
    """Until it is to end: deploy again where SAEs of a language model come that no interpreter runs yet."""
    if _is_together(args.config):  # which follows by itself
        ended.wait()
        return
    catalog = Catalog(storage, args.config)
    running = {sae.model for sae in _hosted(catalog)}
    while not ended.wait(args.config.refresh_seconds):
        models = {sae.model: sae.model_name for sae in _hosted(catalog)}
        new = sorted(models[model] for model in models.keys() - running)
        if new:
            _say(f"starting an interpreter of {', '.join(new)}, which new SAEs read")
            _deploy(args)
            running = running | models.keys()


def _hosted(catalog: Catalog) -> list[Hosted]:
    with contextlib.suppress(MiDiscoverError):  # a store that is away; the ingress says so
        catalog.refresh()
    return catalog.hosted


def _first_key(tracker: Tracker, args: ServeArgs) -> str | None:
    """A key with every scope where there is none yet, or where one is asked for."""
    valid = [key for key in tracker.list_keys() if key.revoked_at is None]
    return tracker.create_key(FIRST_KEY, ["admin"]) if args.new_key or not valid else None


def _start_ray() -> None:
    address = os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"address": address}
    if not address:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # A job's `python` is found there: ours, and not the system's.
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        os.environ.setdefault("RAY_worker_niceness", "0")  # of what answers; jobs take their own, see `jobs`
        options = {
            "address": "local",
            "num_cpus": max(LEAST_CPUS, cores() + 1),
            "include_dashboard": True,  # which runs the jobs of POST /train
            "dashboard_host": "127.0.0.1",
            "object_store_memory": 200 * 2**20,
        }
    try:
        with _agent_on_a_free_port():
            ray.init(**options, log_to_driver=False, logging_level=logging.ERROR, configure_logging=True)
    except Exception as error:  # Ray raises its own and plain ones
        ray.shutdown()
        raise StageError(f"Ray did not start: {str(error).strip().splitlines()[-1]}") from error


def _agent_on_a_free_port() -> AbstractContextManager[Any]:
    """A Ray that starts in its body can run jobs whatever other Ray is on this machine.

    The agent that starts them listens on one fixed port, for which `ray.init`, unlike `ray start`, has no argument;
    where another Ray's agent has it, ours goes on without, and every job is refused for want of an agent.
    """
    return patch.object(RayParams, "__init__", partialmethod(RayParams.__init__, dashboard_agent_listen_port=0))


def _run(args: ServeArgs) -> str:
    """Deploy and wait; the address."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(
        proxy_location="Disabled" if _is_together(args.config) else "HeadOnly",
        http_options={
            "host": args.host,
            "port": args.port,
            "request_timeout_s": 2 * args.config.limits.seconds,
            "keep_alive_timeout_s": KEEP_ALIVE_SECONDS,
        },
    )
    _deploy(args)
    return f"http://{_place(args.host, args.port)}"


def _deploy(args: ServeArgs) -> None:
    """What is deployed already and has not changed goes on; an interpreter that does not start is left out."""
    # All share the cores of this machine, so none is set aside for a replica: training takes what is left.
    config = args.config if os.environ.get("RAY_ADDRESS") else replace(args.config, cpus=0)
    at = (args.host, args.port) if _is_together(config) else None
    prefix = None if at else "/"
    without: set[str] = set()
    while True:
        app = application(config, at, without)
        try:
            serve.run(app, name=NAME, route_prefix=prefix, logging_config={"log_level": "ERROR"})
            return
        except Exception as error:  # Serve tells of a replica that did not start in many lines
            status = serve.status().applications.get(NAME)
            if status is None:
                raise StageError(f"The application did not start: {error}") from error
            failed, rest = _interpreters(status, without)
            if not failed or not rest:
                raise StageError(f"The application did not start: {_told(status)}") from error
            _say(f"left out: {_told(status)}")
            without |= failed


def _interpreters(status: ApplicationStatusOverview, without: Set[str]) -> tuple[set[str], set[str]]:
    """Names of those that did not start, and of the others, but for those that were left out."""
    found = {name: one.status.value for name, one in status.deployments.items() if name.startswith(INTERPRETER)}
    failed = {name for name, one in found.items() if one in ("DEPLOY_FAILED", "UNHEALTHY")}
    return failed - without, found.keys() - failed - without


def _told(status: ApplicationStatusOverview) -> str:
    """What Serve says of an application, and the end of what it says of each deployment: of a traceback the error."""
    ends: list[str] = []
    for deployment in status.deployments.values():
        lines = reversed(deployment.message.strip().splitlines())
        ends.append(" ".join(reversed(list(itertools.takewhile(lambda line: not line.startswith(" "), lines)))))
    return " ".join(" ".join(part.split())[-600:] for part in (status.message, *ends) if part)


def _say(text: str) -> None:
    print(f"serve: {text}", file=sys.stderr, flush=True)


def _entry() -> None:
    try:
        code = main(sys.argv[1:])
    except MiDiscoverError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    sys.exit(code)


if __name__ == "__main__":
    _entry()
