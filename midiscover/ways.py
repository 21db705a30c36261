"""The two ways to have activations: stored by a harvest, or streamed from a language model beside the SAEs.

Storing pays where they are read more than once; streaming needs no room, and no time of a store.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from midiscover.errors import ConfigError
from midiscover.plan import Plan, plan_sweep
from midiscover.rates import Rates
from midiscover.resolve import Resolved, pool_tokens
from midiscover.work import Work

STORE, STREAM, AUTO = "store", "stream", "auto"
"""Words of `resources.activations`."""


def why_not_streamed(resolved: Resolved, rows: int) -> str | None:
    """Why a sweep over so many training rows must store them; None where it need not. Half a sentence."""
    resources = resolved.config.resources
    if resources.workers > 1:
        return f"resources.workers is {resources.workers}, and each of them would run the whole language model"
    if resources.gpus_per_model > 1:
        return f"resources.gpus_per_model is {resources.gpus_per_model}, and a pack's process has one card"
    for sae in resolved.saes:
        epochs = sae.point.train.epochs
        if epochs > 1 and rows > pool_tokens(sae):
            return (
                f"train.epochs is {epochs}, and {rows:,} rows are more than train.shuffle_tokens holds in memory, so "
                "that the language model would run anew for each"
            )
    return None


def plan_ways(
    resolved: Resolved,
    work: Work,
    rates: Rates,
    *,
    gpus: int = 0,
    cores: int = 1,
    bandwidth: float | None = None,
    memory: float = math.inf,
) -> dict[str, Plan]:
    """The stages of a sweep on `gpus` cards of `rates`, or on the cores of a machine, for each way to have activations.

    bandwidth: bytes/s of the store in all; None: as much as the workers take. memory: bytes of RAM for each card, or of
    the machine where there are none; that a way takes more is among the notes.
    """
    ways = [STORE] if why_not_streamed(resolved, work.train) else [STORE, STREAM]
    plans = {
        way: plan_sweep(resolved, work, rates, gpus=gpus, cores=cores, bandwidth=bandwidth, streamed=way == STREAM)
        for way in ways
    }
    short = {
        way: f"activations: {way} takes {plan.host / 1e9:,.1f} GB of RAM{' for each card' if gpus else ''}, and there "
        f"are {memory / 1e9:,.1f} here"
        for way, plan in plans.items()
        if plan.host > memory
    }
    is_open = resolved.config.resources.activations == AUTO
    return {
        way: replace(plan, notes=(*plan.notes, *(note for other, note in short.items() if is_open or other == way)))
        for way, plan in plans.items()
    }


def quicker(ways: Mapping[str, Plan], memory: float = math.inf) -> str:
    """The way that takes less time, of those that so much RAM holds; where it holds none, the one that takes least."""
    fitting = [way for way, plan in ways.items() if plan.host <= memory]
    return min(fitting, key=lambda way: ways[way].seconds) if fitting else min(ways, key=lambda way: ways[way].host)


def chosen_way(resolved: Resolved, ways: Mapping[str, Plan], memory: float = math.inf) -> str:
    """The way that the settings ask for, or the quicker that so much RAM holds. ConfigError where it can't be."""
    asked = resolved.config.resources.activations
    if asked == AUTO:
        return quicker(ways, memory)
    if asked not in ways:
        reason = why_not_streamed(resolved, ways[STORE].work.train)
        raise ConfigError(f"resources.activations is {asked}, but {reason}; set it to store.")
    return asked
