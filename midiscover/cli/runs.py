"""`midiscover runs`: what the tracker knows."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import RenderableType

from midiscover import runview, tables
from midiscover.errors import ConfigError
from midiscover.frontier import frontier_of_hooks, frontier_of_kinds
from midiscover.launch import Parser
from midiscover.store.storage import open_store
from midiscover.tracking import Tracker, reindex


def _runs(argv: Sequence[str]) -> None:
    parser = Parser(prog="midiscover runs", description="Look up, compare and annotate what the tracker knows.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=Parser)
    listing = actions.add_parser("list", help="all sweeps, newest first")
    show = actions.add_parser("show", help="one sweep or SAE")
    compare = actions.add_parser("compare", help="the SAEs of sweeps and their L0-FVU frontier")
    annotate = actions.add_parser("annotate", help="set the note and tags of a sweep or SAE")
    rebuild = actions.add_parser("reindex", help="rebuild the tracker from the store")
    show.add_argument("id", metavar="ID", help="a sweep or SAE, or a unique beginning of its id")
    annotate.add_argument("id", metavar="ID", help="a sweep or SAE, or a unique beginning of its id")
    annotate.add_argument("--note", help="a sentence; an empty one takes it away")
    annotate.add_argument("--tag", action="append", default=[], help="add a tag; may stand several times")
    annotate.add_argument("--untag", action="append", default=[], help="remove a tag")
    compare.add_argument("sweeps", nargs="+", metavar="SWEEP", help="sweeps, by a unique beginning of their ids")
    for action in (listing, show, compare, annotate, rebuild):
        action.add_argument("--store", metavar="URI", help="folder or s3://bucket/prefix; else $MIDISCOVER_STORE")
        action.add_argument("--json", action="store_true", help="as JSON")
    known = parser.parse_args(list(argv))
    storage = open_store(known.store, create=False)
    with Tracker.for_store(storage) as tracker:
        result, show_result = _run_action(known, tracker, storage)
    if known.json:
        print(json.dumps(result, indent=1, default=str))
    else:
        tables.show(show_result(result))


def _run_action(
    known: argparse.Namespace, tracker: Tracker, storage: Any
) -> tuple[Any, Callable[[Any], RenderableType]]:
    match known.action:
        case "list":
            return tracker.list_runs(), tables.runs_table
        case "show":
            return tracker.show(known.id), runview.details
        case "compare":
            return _compared(tracker, known.sweeps), lambda both: tables.comparison(both["saes"], both["stability"])
        case "annotate":
            after = tracker.annotate(known.id, known.note, add_tags=known.tag, remove_tags=known.untag)
            return after._asdict(), runview.details
        case _:
            return reindex(storage, tracker)._asdict(), runview.details


def _compared(tracker: Tracker, names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The SAEs of sweeps side by side, and pairs within each sweep; what several have stands once.

    Of several the frontier is that of all, and the `variant` of an SAE begins with the sweeps that it is in.

    ConfigError for sweeps whose numbers mean different things.
    """
    if len(names) == 1:
        return {"saes": tracker.compare(names[0]), "stability": tracker.stability(names[0])}
    sweeps = {sweep["id"]: sweep for sweep in map(tracker.show, names)}
    for key, what in (("harvest_id", "on other activations"), ("evaluation_id", "in another way")):
        if len({sweep[key] for sweep in sweeps.values()}) > 1:
            raise ConfigError(f"Of {' and '.join(sweeps)} one is measured {what}; their numbers do not compare.")
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name in sweeps:
        for row in tracker.compare(name):
            found.setdefault(row["sae_id"], {})[name] = row
    rows = [next(iter(within.values())) | {"variant": _variant(within)} for within in found.values()]
    for row, of_hook, of_kind in zip(rows, frontier_of_hooks(rows), frontier_of_kinds(rows), strict=True):
        row |= {"frontier": of_hook, "best_of_kind": of_kind}
    pairs: dict[tuple[str, frozenset[str]], dict[str, Any]] = {}
    for name in sweeps:
        for pair in tracker.stability(name):
            pairs.setdefault((pair["axis"], frozenset((pair["a"], pair["b"]))), pair)
    return {"saes": rows, "stability": list(pairs.values())}


def _variant(within: Mapping[str, Mapping[str, Any]]) -> str:
    """`demo and wide, lr 0.001`, of one SAE's row in each sweep that has it; a sweep names what differs within it."""
    settings = dict.fromkeys(text for row in within.values() for text in (row.get("variant") or "").split(", "))
    return ", ".join(filter(None, (" and ".join(within), *settings)))


VERBS: dict[str, Callable[[Sequence[str]], None]] = {"runs": _runs}
