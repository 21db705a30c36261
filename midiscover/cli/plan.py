"""`midiscover plan` and `calibrate`: what a sweep will take, and the rates that this is reckoned with."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from midiscover import plantables, tables
from midiscover.cli.figures import require_folder
from midiscover.configio import find_config, load_config
from midiscover.cores import cores, memory
from midiscover.errors import ConfigError, NotFoundError
from midiscover.launch import Parser, parse_calibrate, parse_overrides, prepare, run_job
from midiscover.plan import Plan
from midiscover.rates import SHEETS, Rates, known_rates, read_rates
from midiscover.resolve import Resolved, resolve
from midiscover.store.storage import Storage, folder_of, open_store, store_uri
from midiscover.ways import chosen_way, plan_ways
from midiscover.work import work_of

PICTURES = (".png", ".svg", ".pdf", ".html")
MOST_GPUS = 100_000


def plan_parser() -> Parser:
    """The arguments of `midiscover plan`."""
    parser = Parser(
        prog="midiscover plan",
        description=(
            "What a sweep will take, stage by stage: time, FLOPs, bytes, memory, and what bounds it. Runs nothing."
        ),
        epilog=(
            "The rates of this machine are those that `midiscover calibrate` measured. GPUs that were not measured are "
            f"reckoned from their data sheets: {', '.join(SHEETS)}. Any setting is a flag by its path."
        ),
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of one that ships")
    count = parser.add_mutually_exclusive_group()
    count.add_argument("--gpus", type=_counts, metavar="N[,N...]", help="on so many GPUs; several: beside each other")
    count.add_argument(
        "--simulate", dest="gpus", action="store_const", const=(8, 64, 512), help="the same as --gpus 8,64,512"
    )
    parser.add_argument("--gpu", metavar="NAME", help="which; a name of calibrated rates, or of a data sheet")
    parser.add_argument("--price", type=float, metavar="US$", help="of a GPU for an hour")
    parser.add_argument("--bandwidth", type=float, metavar="GB/S", help="of the store in all; else of each worker only")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the stages over time as png, svg, pdf or html")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument("--store", metavar="URI", help="where the rates are; else $MIDISCOVER_STORE")
    return parser


def _counts(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isascii() and part.strip().isdigit() and 0 < int(part) <= MOST_GPUS for part in parts):
        raise argparse.ArgumentTypeError(f"'{text}' must be numbers from 1 to {MOST_GPUS:,}, as 1,8,64")
    return tuple(dict.fromkeys(map(int, parts)))


def _plan(argv: Sequence[str]) -> None:
    known, rest = plan_parser().parse_known_args(list(argv))
    _check(known)
    resolved = resolve(load_config(find_config(known.config), parse_overrides(rest)), known.store)
    storage = _store(known.store, on_gpus=bool(known.gpus))
    rates, work = _rates(resolved, storage, known.gpu, bool(known.gpus)), work_of(resolved, storage)
    bandwidth = None if known.bandwidth is None else 1e9 * known.bandwidth
    ways: dict[int, dict[str, Plan]] = {}
    refused: dict[int, ConfigError] = {}
    # What RAM the nodes of cards have, which may be others than this one, nobody knows here.
    ram = math.inf if known.gpus else memory()
    for count in known.gpus or (0,):
        try:
            ways[count] = plan_ways(resolved, work, rates, gpus=count, cores=cores(), bandwidth=bandwidth, memory=ram)
        except ConfigError as error:
            refused[count] = error
    if not ways:
        raise next(iter(refused.values()))
    for count, error in refused.items():
        print(f"midiscover: no plan on {_gpus(count)}: {error}", file=sys.stderr)
    chosen = {count: chosen_way(resolved, plans, ram) for count, plans in ways.items()}
    first = next(iter(ways))
    if known.out is not None:
        _draw(resolved, ways[first][chosen[first]], known.out)
    if known.json:
        print(json.dumps([_tree(plans, chosen[count], known.price) for count, plans in ways.items()], indent=1))
    else:
        _print(resolved, ways, chosen, known.price)


def _check(known: argparse.Namespace) -> None:
    if known.gpu is not None and not known.gpus:
        raise ConfigError("--gpu says which GPU; say how many with --gpus.")
    if known.price is not None and not known.gpus:
        raise ConfigError("--price is that of a GPU; say how many with --gpus.")
    for name in ("price", "bandwidth"):
        value = getattr(known, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{name} is {value:g}; it must be a number above 0.")
    if known.out is not None and known.out.suffix.lower() not in PICTURES:
        raise ConfigError(f"--out {known.out} ends in none of {', '.join(PICTURES)}, the kinds of pictures there are.")
    if known.out is not None:
        require_folder(known.out)


def _store(uri: str | None, *, on_gpus: bool) -> Storage | None:
    """The store, where there is one: a plan on GPUs needs none."""
    address = store_uri(uri)
    if (uri is None or on_gpus) and "://" not in address and not folder_of(address).exists():
        return None
    return open_store(uri, create=False)


def _rates(resolved: Resolved, storage: Storage | None, gpu: str | None, on_gpus: bool) -> Rates:
    if not on_gpus:
        if storage is None:
            raise NotFoundError(
                f"There is no store at {store_uri()}, so no rates of this machine; `midiscover calibrate` measures "
                "them in about a minute."
            )
        return read_rates(storage, "cpu")
    return known_rates(storage, gpu or "h200", *resolved.dtypes)


def _tree(plans: Mapping[str, Plan], chosen: str, price: float | None) -> dict[str, object]:
    """For JSON: named tuples by their names; of each way to have activations what it takes in all."""
    plan = plans[chosen]
    return asdict(plan) | {
        "activations": chosen,
        "seconds": plan.seconds,
        **_costs(plan, price),
        "rates": plan.rates.tree(),
        "work": plan.work._asdict(),
        "stages": [stage._asdict() for stage in plan.stages],
        "spans": [span._asdict() for span in plan.spans],
        "ways": {way: plantables.totals(one)._asdict() | _costs(one, price) for way, one in plans.items()},
    }


def _costs(plan: Plan, price: float | None) -> dict[str, float | None]:
    """None where nothing is known of it."""
    money = None if price is None else price * plan.gpu_hours
    return {"gpu_hours": plan.gpu_hours if plan.gpus else None, "money": money}


def _print(
    resolved: Resolved, ways: Mapping[int, Mapping[str, Plan]], chosen: Mapping[int, str], price: float | None
) -> None:
    plans = {count: (chosen[count], plans[chosen[count]]) for count, plans in ways.items()}
    first, (way, plan) = next(iter(plans.items()))
    print(f"{resolved.sweep_id}: {plantables.inputs(plan)}\n")
    tables.show(plantables.plan_table(plan))
    if len(plans) > 1 or price is not None:
        counts = _gpus(first) if len(plans) == 1 else f"{', '.join(map(str, plans))} GPUs"
        print(f"\nOn {counts}:")
        tables.show(plantables.scaling_table(plans, price))
    longest = plan.bottleneck
    print(f"\nLongest: {longest.name} ({longest.bound}).")
    if len(ways[first]) > 1:
        where = f" on {_gpus(first)}" if len(plans) > 1 else ""
        print(f"Activations stored or streamed{where}, by {plantables.SETTING}:")
        tables.show(plantables.ways_table(ways[first], way, price))


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' if count > 1 else ''}"


def _draw(resolved: Resolved, plan: Plan, out: Path) -> None:
    from midiscover import figures

    where = f"{plan.gpus} x {plan.rates.device}" if plan.gpus else plan.rates.device
    title = f"{resolved.config.name}: {plantables.duration(plan.seconds)} on {where}"
    about = "" if plan.work.exact else "about "
    subtitle = f"{plantables.saes(plan)}, {about}{plan.work.train:,} training tokens; a plan, by rates; pale: starting"
    figures.save(figures.schedule_chart([span._asdict() for span in plan.spans], title, subtitle), out)


def _calibrate(argv: Sequence[str]) -> None:
    prepare(parse_calibrate(argv, prog="midiscover calibrate")).close()
    run_job("calibrate", argv)


VERBS: dict[str, Callable[[Sequence[str]], None]] = {"plan": _plan, "calibrate": _calibrate}
