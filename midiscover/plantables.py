"""What `midiscover plan` and `midiscover calibrate` print."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from midiscover.plan import Plan, Stage
from midiscover.rates import Rates
from midiscover.summary import fixed, percent
from midiscover.tables import Fitted, empty

SETTING = "resources.activations"
BAR = 24
"""Columns of the stages over time."""
SPARED = ("report", "start", "longest", "of ideal", "GPU hours", "evaluate", "harvest", "train")
"""Columns of several numbers of GPUs that a narrow terminal does without, in this order."""
SPARED_OF_WAYS = ("TFLOP", "GB read", "GB of RAM", "GPU hours", "GB stored", "GB of\u00a0a\u00a0card")
"""The same of both ways to have activations."""
SHAPE = (576, 4608, 4096, 60)
"""d_in, d_sae, tokens and L0 at which step times are printed."""


def plan_table(plan: Plan) -> RenderableType:
    """The stages one after another, with what bounds each and what it takes: two tables where one is too wide."""
    wide = partial(_stages, plan, times=True, amounts=True)
    narrow = Group(_stages(plan, times=True), "", _stages(plan, amounts=True))
    return Group(Fitted(wide, lambda: narrow), *(Text(f"Note: {note}.", style="yellow") for note in plan.notes))


def _stages(plan: Plan, *, times: bool = False, amounts: bool = False) -> Table:
    titles = [*([">time", ">share", ""] if times else []), *(_amount_titles(plan) if amounts else [])]
    table = empty("stage", *titles, *(["most of it goes to"] if times else []))
    at = 0.0
    for stage in plan.stages:
        bar = _bar(at, at + stage.seconds, plan.seconds)
        spent = [duration(stage.seconds), percent(stage.seconds / plan.seconds), bar] if times else []
        taken = _amounts(plan, stage) if amounts else []
        table.add_row(stage.name, *spent, *taken, *([stage.bound] if times else []))
        at += stage.seconds
    table.add_section()
    whole = [duration(plan.seconds), "", ""] if times else []
    table.add_row("in all", *whole, *(_amounts(plan, totals(plan)) if amounts else []))
    return table


def totals(plan: Plan) -> Stage:
    """All stages as one: sums, and of memory the most."""
    flops, written, read = (sum(getattr(stage, name) for stage in plan.stages) for name in ("flops", "written", "read"))
    card = max(stage.card for stage in plan.stages)
    return Stage("in all", plan.seconds, flops, written, read, card, plan.host, plan.bottleneck.name)


def _amount_titles(plan: Plan) -> list[str]:
    return [">TFLOP", ">GB stored", ">GB read", *([">GB of\u00a0a\u00a0card"] if plan.gpus else []), ">GB of RAM"]


def _amounts(plan: Plan, stage: Stage) -> list[str]:
    sizes = [stage.written, stage.read, *([stage.card] if plan.gpus else []), stage.host]
    flops = fixed(stage.flops / 1e12, 1) if stage.flops else ""
    return [flops, *(fixed(size / 1e9, 2) if size else "" for size in sizes)]


def ways_table(plans: Mapping[str, Plan], chosen: str, price: float | None) -> RenderableType:
    """The same sweep with activations stored and streamed; the way that is taken is marked."""
    return _sparing(partial(_ways_table, plans, chosen, price), SPARED_OF_WAYS)


def _ways_table(plans: Mapping[str, Plan], chosen: str, price: float | None, spared: Sequence[str]) -> Table:
    first = plans[chosen]
    titles = ["way", "", ">time", *_amount_titles(first), *_cost_titles(first, price)]
    rows: list[list[RenderableType]] = []
    for way, plan in plans.items():
        mark = Text("taken" if way == chosen else "", style="bold cyan")
        rows.append([way, mark, duration(plan.seconds), *_amounts(plan, totals(plan)), *_costs(plan, price)])
    return _without(spared, titles, rows)


def _sparing(build: Callable[[Sequence[str]], Table], spared: Sequence[str]) -> Fitted:
    """A table that leaves out as many of these columns, in their order, as do not fit."""
    return Fitted(*(partial(build, spared[:less]) for less in range(len(spared) + 1)))


def _without(spared: Sequence[str], titles: Sequence[str], rows: Sequence[Sequence[RenderableType]]) -> Table:
    shown = [place for place, title in enumerate(titles) if title.removeprefix(">") not in spared]
    table = empty(*(titles[place] for place in shown))
    for row in rows:
        table.add_row(*(row[place] for place in shown))
    return table


def _cost_titles(plan: Plan, price: float | None) -> list[str]:
    return [*([">GPU hours"] if plan.gpus else []), *([">US$"] if price is not None else [])]


def _costs(plan: Plan, price: float | None) -> list[str]:
    hours = [fixed(plan.gpu_hours, 2)] if plan.gpus else []
    return [*hours, *([] if price is None else [fixed(plan.gpu_hours * price, 2)])]


def scaling_table(plans: Mapping[int, tuple[str, Plan]], price: float | None) -> RenderableType:
    """The same sweep on more and more GPUs, each with its way to have activations."""
    return _sparing(partial(_scaling_table, plans, price), SPARED)


def _scaling_table(plans: Mapping[int, tuple[str, Plan]], price: float | None, spared: Sequence[str]) -> Table:
    ways = [way for way, _ in plans.values()]
    names = list(dict.fromkeys(stage.name for _, plan in plans.values() for stage in plan.stages))
    _, fewest = plans[min(plans)]
    way_title = ["activations"] if len(set(ways)) > 1 else []
    stages = (f">{name}" for name in names)
    titles = [">GPUs", *way_title, *stages, ">in all", *_cost_titles(fewest, price), ">of ideal", "longest"]
    rows: list[list[str]] = []
    for count, (way, plan) in plans.items():
        times = [sum(stage.seconds for stage in plan.stages if stage.name == name) for name in names]
        rows.append(
            [
                str(count),
                *([way] if way_title else []),
                *(duration(seconds) if seconds else "" for seconds in times),
                duration(plan.seconds),
                *_costs(plan, price),
                percent(fewest.gpu_hours / plan.gpu_hours),
                plan.bottleneck.name,
            ]
        )
    return _without(spared, titles, rows)


def inputs(plan: Plan) -> str:
    """What a plan reckons with, in sentences."""
    rates, work = plan.rates, plan.work
    about = "" if work.exact else "about "
    source = f"measured {rates.measured[:10]}" if rates.measured else "reckoned from its data sheet, not measured"
    if rates.instead_of:
        source += f" ({rates.instead_of} is of another version of miDiscover; `midiscover calibrate` measures it anew)"
    many = f"{saes(plan)} in {plan.packs} pack{'s' if plan.packs > 1 else ''}"
    return (
        f"{many}, {about}{work.train:,} training and {work.held_out:,} held-out tokens; rates of {rates.device}, "
        f"{source}: language model {rates.model_flops / 1e12:,.3g} TFLOP/s in {rates.model_dtype}, SAEs' steps in "
        f"{rates.train_dtype}, store {rates.write / 1e6:,.0f} MB/s written and {rates.read / 1e6:,.0f} read by a "
        "worker."
    )


def saes(plan: Plan) -> str:
    """How many SAEs it has, in words."""
    return f"{plan.saes} SAE{'s' if plan.saes > 1 else ''}"


def rates_table(rates: Rates) -> RenderableType:
    """Measured rates."""
    d_in, d_sae, tokens, l0 = SHAPE
    table = empty("what", ">rate", "")
    table.add_row("language model, to the hook", fixed(rates.model_flops / 1e9, 1), f"GFLOP/s in {rates.model_dtype}")
    table.add_row("language model, spliced, with cross-entropy", fixed(rates.logits_flops / 1e9, 1), "GFLOP/s")
    table.add_row("loading its weights", fixed(rates.load_bytes / 1e6, 0), "MB/s")
    table.add_row("making a corpus", fixed(rates.tokenise, 0), "tokens/s")
    for kind, cost in rates.steps.items():
        seconds = cost.seconds(rows=2 * d_in, d_sae=d_sae, tokens=tokens, l0=l0)
        shape = f"{rates.train_dtype}, {tokens:,} x {d_in} -> {d_sae:,}, L0 {l0}"
        table.add_row(f"step of {kind}", fixed(1000 * seconds, 1), f"ms ({shape})")
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
