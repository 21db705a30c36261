"""How fast this machine, or a node of a cluster, is. `python -m jobs.calibrate [CONFIG] [--store URI]`

Measures what `midiscover plan` reckons with, for about a minute, and keeps it in the store: the start of Ray, of a
worker and of a Tune trial here, and in a worker that takes a language model's place the rates of its device.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from typing import Any

import ray
from ray import tune

from jobs.harvest import ModelPlace, model_place
from jobs.runtime import Cluster, model_slots, own_error, ray_session, run_main
from midiscover import figures, plantables, tables
from midiscover.calibrate import Shape, measure
from midiscover.launch import Prepared, parse_calibrate, prepare
from midiscover.rates import Rates, write_rates
from midiscover.store.storage import Storage


def main(argv: list[str]) -> int:
    """Measure, and say where it is kept."""
    args = parse_calibrate(argv)
    began = time.monotonic()
    prepared = prepare(args)
    prepared.close()
    subprocess.run([sys.executable, "-c", "import jobs.sweeprun"], check=True)
    starts = {"driver": time.monotonic() - began}
    began = time.monotonic()
    with ray_session(prepared.resolved.config.resources.nodes, lambda line: print(line, file=sys.stderr)) as cluster:
        starts["ray"] = time.monotonic() - began
        starts["trial"] = _trial()
        starts["figures"] = _figures()
        rates = _in_a_worker(prepared, cluster, starts)
    key = write_rates(prepared.storage, rates)
    tables.show(plantables.rates_table(rates))
    print(f"{rates.device}: kept in {prepared.storage.uri}/{key}")
    return 0


def _in_a_worker(prepared: Prepared, cluster: Cluster, starts: dict[str, float]) -> Rates:
    slots = model_slots(cluster, prepared.resolved.config.resources)
    work: Any = ray.remote(_measure).options(num_cpus=slots.cpus, num_gpus=slots.gpus, max_retries=0)
    place = model_place(prepared.resolved, slots)
    try:
        return ray.get(work.remote(place, prepared.resolved, prepared.storage, starts, time.time()))
    except Exception as error:
        raise own_error(error) or error from error


def _measure(place: ModelPlace, resolved: Any, storage: Storage, starts: dict[str, float], called: float) -> Rates:
    starts = starts | {"worker": time.time() - called}
    began = time.monotonic()
    lm = place.load()
    loaded = time.monotonic() - began
    first = resolved.saes[0]
    return measure(
        lm,
        resolved.table,
        first.point.hook,
        storage,
        shape=Shape(first.d_in, first.d_sae),
        settings=first.point.train,
        model_dtype=place.dtype,
        load_seconds=loaded,
        starts=starts,
    )


def _trial() -> float:
    """Seconds from Tune's call until a trial that loads what a pack loads has ended."""

    def nothing(_config: dict[str, Any]) -> None:
        import jobs.packs  # noqa: F401  # what a real one loads

        tune.report({"done": 1})

    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="midiscover-tune-") as folder:
        run_config = tune.RunConfig(name="calibrate", storage_path=folder, verbose=0)
        tune.Tuner(tune.with_resources(nothing, {"cpu": 1}), run_config=run_config).fit()
    return time.monotonic() - began


def _figures() -> float:
    """Seconds of the first picture of a process."""
    rows = [
        {"sae_id": str(i), "hook": "h", "layer": 0, "kind": "standard", "control": None, "l0": 10.0 * i, "fvu": 1 / i}
        for i in range(1, 4)
    ]
    began = time.monotonic()
    figures.png(figures.frontier_chart(rows))
    return time.monotonic() - began


if __name__ == "__main__":
    run_main(main)
