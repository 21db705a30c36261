"""What every driver shares: a Ray to run on, how the work is laid over it, and how a job ends.

A driver joins the Ray of RAY_ADDRESS where it is set (so on a cluster), else starts one on this machine and ends it.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray

from midiscover.config import ResourcesConfig
from midiscover.errors import MiDiscoverError, StageError

LOCAL_LOGICAL_CPUS = 4
"""Least CPUs a local Ray claims to have: with fewer, a stage's actors and its driver tasks wait for each other."""
OBJECT_STORE_BYTES = 200 * 2**20
"""Only manifest rows pass through the object store."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """What Ray has, summed over its nodes."""

    local: bool
    cpus: int
    """Real cores here; Ray's CPUs on a cluster."""
    gpus: int
    nodes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Slots:
    """How many workers of a stage run at once, and what each takes."""

    count: int
    cpus: float
    gpus: float
    threads: int


@contextmanager
def ray_session() -> Iterator[Cluster]:
    """Join or start Ray; ends only what it started."""
    address = os.environ.get("RAY_ADDRESS")
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    with _silent_start():
        if address:
            ray.init(address=address, **quiet)
        else:
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            ray.init(
                address="local",
                num_cpus=max(cores(), LOCAL_LOGICAL_CPUS),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                **quiet,
            )
    try:
        have = ray.cluster_resources()
        nodes = sum(1 for node in ray.nodes() if node["Alive"])
        cpus = int(have.get("CPU", 0)) if address else cores()
        yield Cluster(local=not address, cpus=cpus, gpus=int(have.get("GPU", 0)), nodes=nodes)
    finally:
        ray.shutdown()


@contextmanager
def _silent_start() -> Iterator[None]:
    """Keep Ray's C++ start-up lines from the terminal; what goes wrong comes as an exception all the same."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def model_slots(cluster: Cluster, resources: ResourcesConfig) -> Slots:
    """Language-model actors: one per GPU share, or one per node on CPU with all its cores."""
    if cluster.gpus:
        count = resources.harvest_actors or max(1, int(cluster.gpus / resources.gpus_per_actor))
        return _checked("harvest", Slots(count=count, cpus=1, gpus=resources.gpus_per_actor, threads=1))
    count = resources.harvest_actors or cluster.nodes
    threads = resources.threads or max(1, cluster.cpus // count)
    # One logical CPU less than the cores: a stage of actors that hold every CPU can't start its own tasks.
    cpus = 1 if cluster.local else max(1, min(threads, cluster.cpus // count - 1))
    return _checked("harvest", Slots(count=count, cpus=cpus, gpus=0, threads=threads))


def pack_slots(cluster: Cluster, resources: ResourcesConfig, packs: int) -> Slots:
    """Packs at once. On CPU the number that leaves no core idle at the end: 3 equal packs on 2 cores run one by one."""
    if cluster.gpus:
        count = max(1, min(packs, int(cluster.gpus / resources.gpus_per_pack)))
        return _checked("sweep", Slots(count=count, cpus=1, gpus=resources.gpus_per_pack, threads=1))
    most = min(packs, cluster.cpus if resources.threads is None else max(1, cluster.cpus // resources.threads))
    count = min(range(1, most + 1), key=lambda n: (math.ceil(packs / n) * n / packs, -n))
    threads = resources.threads or max(1, cluster.cpus // count)
    cpus = 1 if cluster.local else max(1, min(threads, cluster.cpus // count - 1))
    return _checked("sweep", Slots(count=count, cpus=cpus, gpus=0, threads=threads))


def _checked(stage: str, slots: Slots) -> Slots:
    """Refuse what would wait for ever: Ray schedules nothing that does not fit, and says nothing."""
    have = ray.cluster_resources()
    cpus, gpus = have.get("CPU", 0), have.get("GPU", 0)
    need_cpus = slots.count * slots.cpus + 1
    if need_cpus > cpus or slots.count * slots.gpus > gpus:
        raise StageError(
            f"The {stage} needs {need_cpus:g} CPUs and {slots.count * slots.gpus:g} GPUs at once, and Ray has {cpus:g} "
            f"and {gpus:g}. Add nodes, or lower resources.harvest_actors, resources.threads or the GPU shares."
        )
    return slots


def run_main(main: Callable[[list[str]], int | None]) -> None:
    """Run a driver's `main` and exit: 0, 1 for a stage that failed, 2 for wrong input, 130 for Ctrl-C."""
    try:
        code = main(sys.argv[1:]) or 0
    except MiDiscoverError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted: what is committed is kept; run the same command again to go on.", file=sys.stderr)
        code = 130
    sys.exit(code)


def own_error(error: BaseException) -> MiDiscoverError | None:
    """The MiDiscoverError inside an error that came through Ray, if there is one."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MiDiscoverError):
            return seen
        seen = getattr(seen, "cause", None) or seen.__cause__ or seen.__context__
    return None
