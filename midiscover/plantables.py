"""What `midiscover plan` and `midiscover calibrate` print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from midiscover.plan import Plan
from midiscover.rates import Rates
from midiscover.summary import fixed, percent
from midiscover.tables import empty

SETTING = "resources.activations"
BAR = 30
"""Columns of the stages over time."""
SHAPE = (576, 4608, 4096, 60)
"""d_in, d_sae, tokens and L0 at which step times are printed."""


def plan_table(plan: Plan) -> RenderableType:
    """The stages one after another, with what bounds each."""
    table = empty("stage", ">time", ">share", "", ">TFLOP", ">GB stored", "most of it goes to")
    at = 0.0
    for stage in plan.stages:
        table.add_row(
            stage.name,
            duration(stage.seconds),
            percent(stage.seconds / plan.seconds),
            _bar(at, at + stage.seconds, plan.seconds),
            fixed(stage.flops / 1e12, 1) if stage.flops else "",
            fixed(stage.bytes / 1e9, 2) if stage.bytes else "",
            stage.bound,
        )
        at += stage.seconds
    table.add_section()
    total = [sum(getattr(stage, name) for stage in plan.stages) for name in ("flops", "bytes")]
    table.add_row("in all", duration(plan.seconds), "", "", fixed(total[0] / 1e12, 1), fixed(total[1] / 1e9, 2), "")
    return Group(table, *(Text(note, style="yellow") for note in plan.notes))


def ways(plans: Mapping[str, Plan], chosen: str) -> list[str]:
    """What the other way to have activations would take, where there is one."""
    others = [f"{duration(plan.seconds)} with {SETTING} {way}" for way, plan in plans.items() if way != chosen]
    return [f"Activations: {chosen}, by {SETTING}; the same would take {other}." for other in others]


def scaling_table(plans: Sequence[Plan], price: float | None) -> RenderableType:
    """The same sweep on more and more GPUs."""
    names = list(dict.fromkeys(stage.name for stage in plans[0].stages))
    money = [">US$"] if price is not None else []
    table = empty(">GPUs", *(f">{name}" for name in names), ">in all", ">GPU hours", *money, ">of ideal", "longest")
    fewest = min(plans, key=lambda plan: plan.gpus)
    ideal = fewest.seconds * max(1, fewest.gpus)
    for plan in plans:
        hours = max(1, plan.gpus) * plan.seconds / 3600
        times = [sum(stage.seconds for stage in plan.stages if stage.name == name) for name in names]
        table.add_row(
            str(plan.gpus),
            *(duration(seconds) for seconds in times),
            duration(plan.seconds),
            fixed(hours, 2),
            *([] if price is None else [fixed(hours * price, 2)]),
            percent(ideal / (max(1, plan.gpus) * plan.seconds)),
            plan.bottleneck.name,
        )
    return table


def inputs(plan: Plan) -> str:
    """What a plan reckons with, in sentences."""
    rates, work = plan.rates, plan.work
    about = "" if work.exact else "about "
    source = f"measured {rates.measured[:10]}" if rates.measured else "reckoned from its data sheet, not measured"
    return (
        f"{plan.saes} SAEs in {plan.packs} packs, {about}{work.train:,} training and {work.held_out:,} held-out "
        f"tokens; rates of {rates.device}, {source}: language model {rates.model_flops / 1e12:,.3g} TFLOP/s, store "
        f"{rates.write / 1e6:,.0f} MB/s written and {rates.read / 1e6:,.0f} read by a worker."
    )


def rates_table(rates: Rates) -> RenderableType:
    """Measured rates."""
    d_in, d_sae, tokens, l0 = SHAPE
    table = empty("what", ">rate", "")
    table.add_row("language model, to the hook", fixed(rates.model_flops / 1e9, 1), "GFLOP/s")
    table.add_row("language model, spliced, with cross-entropy", fixed(rates.logits_flops / 1e9, 1), "GFLOP/s")
    table.add_row("loading its weights", fixed(rates.load_bytes / 1e6, 0), "MB/s")
    table.add_row("making a corpus", fixed(rates.tokenise, 0), "tokens/s")
    for kind, cost in rates.steps.items():
        seconds = cost.seconds(rows=2 * d_in, d_sae=d_sae, tokens=tokens, l0=l0)
        table.add_row(f"step of {kind}", fixed(1000 * seconds, 1), f"ms ({tokens:,} x {d_in} -> {d_sae:,}, L0 {l0})")
    table.add_row("to the store", fixed(rates.write / 1e6, 0), "MB/s")
    table.add_row("from the store", fixed(rates.read / 1e6, 0), "MB/s")
    for name, seconds in rates.starts.items():
        table.add_row(f"start: {name}", fixed(seconds, 1), "s")
    return table


def duration(seconds: float) -> str:
    """For people: 42 s, 12.3 min, 5.1 h."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _bar(begin: float, end: float, whole: float) -> str:
    first = min(BAR - 1, round(begin / whole * BAR))
    last = max(first + 1, round(end / whole * BAR))
    return " " * first + "█" * (last - first)
