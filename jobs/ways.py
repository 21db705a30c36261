"""Whether a sweep stores activations or streams them from a live model, as its settings or the planner say."""

from __future__ import annotations

from collections.abc import Callable

from jobs.harvest import missing_spans
from jobs.nodes import accelerators
from jobs.runtime import Cluster
from midiscover.corpus import CorpusManifest
from midiscover.errors import ConfigError, NotFoundError
from midiscover.plantables import duration
from midiscover.rates import Rates, known_rates
from midiscover.resolve import Resolved
from midiscover.store import layout
from midiscover.store.documents import dump, read_json
from midiscover.store.storage import Storage
from midiscover.ways import AUTO, STORE, STREAM, plan_ways, quicker, why_not_streamed
from midiscover.work import Work


def streams_activations(
    resolved: Resolved, storage: Storage, corpus: CorpusManifest, cluster: Cluster, say: Callable[[str], None]
) -> bool:
    """Whether the packs of a sweep run the language model themselves.

    What `auto` came to is kept with the sweep, so that later runs go on in the same way. ConfigError where streaming
    is asked for and can't be.
    """
    asked = resolved.config.resources.activations
    rows = corpus.windows["train"] * corpus.context_size
    if asked == AUTO:
        key = layout.sweep_file(resolved.sweep_id, "activations.json")
        found = read_json(storage, key)
        if found is None:
            storage.create(key, dump({"v": 1, "activations": _quicker(resolved, storage, corpus, rows, cluster, say)}))
            found = read_json(storage, key)
        # Asked again: with more workers, say, the same sweep can't be streamed any more.
        return (found or {}).get("activations") == STREAM and why_not_streamed(resolved, rows) is None
    reason = why_not_streamed(resolved, rows) if asked == STREAM else None
    if reason is not None:
        raise ConfigError(f"resources.activations is stream, but {reason}; set it to store.")
    return asked == STREAM


def _quicker(
    resolved: Resolved,
    storage: Storage,
    corpus: CorpusManifest,
    rows: int,
    cluster: Cluster,
    say: Callable[[str], None],
) -> str:
    if why_not_streamed(resolved, rows) or not any(missing_spans(p, corpus, storage) for p in resolved.parts()):
        return STORE
    rates = _rates(resolved, storage, cluster)
    if rates is None:
        say("activations are stored: nothing is known of this device's rates; `midiscover calibrate` measures them")
        return STORE
    work = Work(corpus.tokens["train"], corpus.tokens["held_out"], exact=True)
    ways = plan_ways(resolved, work, rates, gpus=int(cluster.gpus), cores=cluster.cores, memory=cluster.memory)
    best = quicker(ways, cluster.memory)
    say(
        "resources.activations auto: "
        + ", ".join(f"{way} would take {duration(plan.seconds)}" for way, plan in ways.items())
        + f"; {best} it is"
    )
    for note in ways[best].notes:
        say(note)
    return best


def _rates(resolved: Resolved, storage: Storage, cluster: Cluster) -> Rates | None:
    """Of the cluster's GPUs, or of this machine's CPU."""
    for device in accelerators() if cluster.gpus else ["cpu"]:
        try:
            return known_rates(storage, device, *resolved.dtypes)
        except (NotFoundError, ConfigError):
            continue
    return None
