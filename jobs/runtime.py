"""What every driver shares: a Ray to run on, how the work is laid over it, and how a job ends.

A driver joins the Ray of RAY_ADDRESS where it is set (so on a cluster), else starts one on this machine and ends it.
"""

from __future__ import annotations

import _thread
import gc
import importlib
import json
import logging
import math
import os
import secrets
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType, ModuleType
from typing import Any, NoReturn

import ray
from ray.exceptions import RayTaskError

from jobs.nodes import Node, ask_for, give_back, working_nodes
from midiscover import lineage
from midiscover.config import ResourcesConfig
from midiscover.cores import cores, no_room, packs_at_once, places_on
from midiscover.errors import ConfigError, MiDiscoverError, StageError, TrackingError

LOCAL_LOGICAL_CPUS = 4
"""Least CPUs a local Ray claims to have: with fewer, a stage's actors and its driver tasks wait for each other."""
ASK_AGAIN_SECONDS = 10.0
"""After an interrupt, which may take so long to clean up."""
CLIENT = "MIDISCOVER_CLIENT"
"""Environment variable of a submitted driver: the versions of whoever submitted it, as JSON."""
OBJECT_STORE_BYTES = 200 * 2**20
"""Only manifest rows pass through the object store."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """The nodes that run work, those that an autoscaler was asked for among them."""

    local: bool
    cores: int
    """Real cores of this machine; of the smallest node on a cluster."""
    nodes: tuple[Node, ...]

    @property
    def gpus(self) -> float:
        """GPUs of all nodes."""
        return sum(node.gpus for node in self.nodes)

    @property
    def memory(self) -> float:
        """Bytes of RAM for each card, or of a node where there are no cards; of the node that has least."""
        return min(node.memory / max(1, node.gpus) for node in self.nodes if node.gpus or not self.gpus)

    def fits(self, cpus: float, gpus: float) -> int:
        """How many workers that take so much find a place at once; a worker never spans two nodes."""
        return sum(_places(node, cpus, gpus) for node in self.nodes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Slots:
    """How many pieces of a stage's work run at once, and what each process takes."""

    count: int
    cpus: float
    gpus: float
    threads: int
    workers: int = 1
    """Processes of one piece."""


@contextmanager
def ray_session(nodes: int | None = None, say: Callable[[str], None] = print) -> Iterator[Cluster]:
    """Join or start Ray; ends only what it started. nodes: how many to ask a joined cluster's autoscaler for."""
    address = os.environ.get("RAY_ADDRESS")
    signal.signal(signal.SIGTERM, terminate)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in a script's background, which Ctrl-C leaves alone
        signal.signal(signal.SIGINT, interrupt)
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    options: dict[str, Any] = {"address": address}
    if not address:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        options = {
            "address": "local",
            "num_cpus": max(cores() + 1, LOCAL_LOGICAL_CPUS),
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
    _start(options | quiet, tries=1 if address else 2)
    # Ray puts its own handler in place, which aborts the process and leaves the tracker saying "running".
    signal.signal(signal.SIGTERM, terminate)
    asked = nodes if address else None
    try:
        with insisting():
            yield _cluster(ask_for(asked, say) if asked else working_nodes(), local=not address)
    finally:
        try:
            if asked:
                give_back()
        finally:
            ray.shutdown()


def ray_data() -> ModuleType:
    """Ray Data, told to be quiet: importing it, which takes a second, makes it talkative."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors reach us as exceptions, and are told once
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray.data


class RayLater:
    """A `ray_session` for a driver that may not need one: begun when `cluster` is first asked for, or before.

    Leaving the body ends what was begun in it.
    """

    def __init__(self, nodes: int | None, say: Callable[[str], None]) -> None:
        self._stack, self._cluster, self._given = ExitStack(), None, (nodes, say)

    def __enter__(self) -> RayLater:
        return self

    def __exit__(self, *error: Any) -> None:
        self.end()

    def begin_while_importing(self, module: str) -> None:
        """Begin now. Each takes seconds, and Ray mostly waits for its servers."""
        threading.Thread(target=importlib.import_module, args=(module,), name=f"import {module}", daemon=True).start()
        self.cluster()

    def cluster(self) -> Cluster:
        """The cluster that this driver works on."""
        if self._cluster is None:
            self._cluster = self._stack.enter_context(ray_session(*self._given))
        return self._cluster

    def end(self) -> None:
        """The stage is over; nothing is left to do where none was begun."""
        self._stack.close()


def _cluster(nodes: tuple[Node, ...], *, local: bool) -> Cluster:
    if not nodes:
        raise StageError(
            "Ray has no node with a CPU to work on; add a worker node, or say with resources.nodes how many an "
            "autoscaler shall add."
        )
    several = max(len(nodes), sum(node["Alive"] for node in ray.nodes())) > 1
    if several and not os.environ.get("MIDISCOVER_DATABASE_URL"):
        raise TrackingError(
            "A Ray of several nodes needs a database that all can rely on: set MIDISCOVER_DATABASE_URL to a "
            "PostgreSQL, such as postgresql://user:password@host/midiscover."
        )
    return Cluster(local=local, cores=cores() if local else int(min(node.cpus for node in nodes)), nodes=nodes)


_asked, _terminated = threading.Event(), threading.Event()


def interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    """Ctrl-C. That it was asked for is kept, for the case that the exception gets lost; see `insisting`."""
    _asked.set()
    raise KeyboardInterrupt


def terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
    """SIGTERM ends a driver as Ctrl-C does: what is committed is kept, and the tracker is told.

    By the same exception, because Ray's own code hands on a KeyboardInterrupt and not every other.
    """
    _terminated.set()
    interrupt(_signal, _frame)


@contextmanager
def insisting(seconds: float = ASK_AGAIN_SECONDS) -> Iterator[None]:
    """Interrupt the main thread again as long as it stays in the body after it was asked to end.

    An exception that is raised where Python ignores it (a callback of Ray's, a destructor) is gone, and the driver
    would go on to the end of the stage.
    """
    _asked.clear()
    left = threading.Event()

    def ask_again() -> None:
        while not left.wait(min(seconds, 0.5)):
            if _asked.is_set() and not left.wait(seconds):
                _thread.interrupt_main(signal.SIGTERM if _terminated.is_set() else signal.SIGINT)

    thread = threading.Thread(target=ask_again, name="insisting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join()


def _start(options: Mapping[str, Any], tries: int) -> None:
    """Start or join Ray. On a machine that is busy a Ray of our own may come too late for its own clock (30 s), and the
    next one, for which everything is in memory, does not. StageError where none starts.
    """
    for last in [*[False] * (tries - 1), True]:
        try:
            with _silent_start():
                ray.init(**options)
            return
        except Exception as error:  # Ray raises its own and plain ones
            ray.shutdown()
            if last or "timed out during startup" not in str(error):
                told = f"Ray did not start: {last_line(error)} Run the same command again; it continues."
                raise StageError(told) from error


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


def model_slots(cluster: Cluster, resources: ResourcesConfig) -> Slots:
    """Language-model actors: one per GPU share (or per so many GPUs), or one per node on CPU with all its cores."""
    if cluster.gpus:
        gpus = resources.gpus_per_model if resources.gpus_per_model > 1 else resources.gpus_per_actor
        count = resources.harvest_actors or max(1, on_cards(cluster, gpus))
        return _checked("harvest", cluster, Slots(count=count, cpus=1, gpus=gpus, threads=1))
    count = resources.harvest_actors or len(cluster.nodes)
    per_node = math.ceil(count / len(cluster.nodes))
    threads = resources.threads or max(1, cluster.cores // per_node)
    return _checked(
        "harvest", cluster, Slots(count=count, cpus=_cpus(cluster, threads, per_node), gpus=0, threads=threads)
    )


def pack_slots(cluster: Cluster, resources: ResourcesConfig, packs: int) -> Slots:
    """Packs at once: on GPUs one for each share, on CPU the number that ends soonest (`packs_at_once`)."""
    workers = resources.workers
    if cluster.gpus:
        count = max(1, min(packs, on_cards(cluster, resources.pack_share()) // workers))
        slots = Slots(count=count, cpus=1, gpus=resources.gpus_per_pack, threads=1, workers=workers)
        return _checked("sweep", cluster, slots)
    if workers > 1:
        return _shared_slots(cluster, resources, packs)
    nodes = len(cluster.nodes)
    most = max(1, cluster.cores // (resources.threads or 1) - (0 if cluster.local else 1))

    per_node = packs_at_once(packs, cores=cluster.cores, most=most, nodes=nodes, threads=resources.threads)
    threads = resources.threads or max(1, cluster.cores // per_node)
    count = min(packs, per_node * nodes)
    return _checked(
        "sweep", cluster, Slots(count=count, cpus=_cpus(cluster, threads, per_node), gpus=0, threads=threads)
    )


def _shared_slots(cluster: Cluster, resources: ResourcesConfig, packs: int) -> Slots:
    """Packs of several processes each, on CPU: as many as find a place, a process a node where that is enough."""
    nodes, workers = len(cluster.nodes), resources.workers
    per_node = math.ceil(workers / nodes)
    threads = resources.threads or max(1, cluster.cores // per_node)
    count = max(1, min(packs, nodes * per_node // workers))
    slots = Slots(count=count, cpus=_cpus(cluster, threads, per_node), gpus=0, threads=threads, workers=workers)
    return _checked("sweep", cluster, slots)


def on_cards(cluster: Cluster, gpus: float) -> int:
    """Workers of one CPU and `gpus` GPUs that run at once where a CPU stays free for Ray's own tasks."""
    return min(cluster.fits(1, gpus), int(sum(node.cpus for node in cluster.nodes)) - 1)


def _cpus(cluster: Cluster, threads: int, per_node: int) -> int:
    """CPUs that each of `per_node` workers asks Ray for; one stays free on each node for Ray's own tasks."""
    return 1 if cluster.local else max(1, min(threads, (cluster.cores - 1) // per_node))


def _places(node: Node, cpus: float, gpus: float) -> int:
    places = int(node.cpus / cpus + 1e-9)
    return min(places, places_on(node.gpus, gpus)) if gpus else places


def _checked(stage: str, cluster: Cluster, slots: Slots) -> Slots:
    """Refuse what would wait for ever: Ray schedules nothing that does not fit, and says nothing."""
    fits, count = cluster.fits(slots.cpus, slots.gpus), slots.count * slots.workers
    spare = sum(node.cpus for node in cluster.nodes) - count * slots.cpus
    if fits < count or spare < 1:
        have = ", ".join(f"{node.cpus:g} CPUs and {node.gpus:g} GPUs" for node in cluster.nodes)
        raise StageError(no_room(stage, count, slots.cpus, slots.gpus, f"Ray's nodes have {have}"))
    return slots


def run_main(main: Callable[[list[str]], int | None]) -> None:
    """Run a driver's `main` and exit: 0, 1: a stage failed, 2: wrong input, 130: Ctrl-C, 143: SIGTERM."""
    try:
        check_client()
        code = main(sys.argv[1:]) or 0
    except MiDiscoverError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted: what is committed is kept; run the same command again to go on.", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: threads of Ray may still be in C++ code, which the interpreter's end would pull from under them.
        os._exit(143 if _terminated.is_set() else 130)
    gc.freeze()  # or the exit walks every object that torch, transformers and Ray made once more: a second or two
    sys.exit(code)


def check_client() -> None:
    """Hold a submitted driver's versions against its client's. ConfigError where Python or Ray differ, a line where
    anything else does: numbers may then not be those of a run there."""
    told = os.environ.get(CLIENT)
    if not told:
        return
    theirs, ours = json.loads(told), lineage.versions()
    for name in sorted(theirs.keys() | ours.keys()):
        there, here = theirs.get(name), ours.get(name)
        if name == "python" and there and here:
            there, here = (".".join(version.split(".")[:2]) for version in (there, here))
        if there != here:
            if name in ("python", "ray"):
                raise ConfigError(
                    f"The cluster has {name} {here}, and the job was submitted from {there}; use the same."
                )
            print(f"versions: the cluster has {name} {here}, and the client {there}", file=sys.stderr)


def last_line(error: BaseException) -> str:
    """The last line of an error that came through Ray: its cause, below a worker's traceback."""
    return str(error).strip().splitlines()[-1]


def own_error(error: BaseException) -> MiDiscoverError | None:
    """The MiDiscoverError inside an error that came through Ray, if there is one."""
    seen: BaseException | None = error
    while seen is not None:
        # Ray gives its own error the class of its cause as well; its message is the worker's whole traceback.
        if isinstance(seen, MiDiscoverError) and not isinstance(seen, RayTaskError):
            sentence = str(seen).partition("\n")[0]  # Ray Data appends advice on its retries
            return seen if sentence == str(seen) else type(seen)(sentence)
        seen = getattr(seen, "cause", None) or seen.__cause__ or seen.__context__
    return None
