"""`midiscover store du|gc`: what a store holds, and what of it can go."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from itertools import groupby

from midiscover import tables, upkeep
from midiscover.errors import ConfigError
from midiscover.launch import Parser
from midiscover.store.local import LocalStorage
from midiscover.store.storage import open_store

HOURS = upkeep.GRACE_SECONDS / 3600


def _store(argv: Sequence[str]) -> None:
    parser = Parser(prog="midiscover store", description="Look at what a store holds, and remove what nobody needs.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=Parser)
    used = actions.add_parser("du", help="what takes how much, largest first")
    clean = actions.add_parser(
        "gc",
        help="remove garbage, and activations that their sweeps let go",
        epilog="Sweeps let activations go by resources.keep_activations. Whatever needs them later harvests again.",
    )
    clean.add_argument("--dry-run", action="store_true", help="only say what would go")
    clean.add_argument("--grace", type=float, default=HOURS, metavar="HOURS", help=f"what goes is as old ({HOURS:g})")
    clean.add_argument("--activations", action="store_true", help="those of all finished sweeps, whatever they say")
    for action in (used, clean):
        action.add_argument("--store", metavar="URI", help="folder or s3://bucket/prefix; else $MIDISCOVER_STORE")
        action.add_argument("--json", action="store_true", help="as JSON")
    known = parser.parse_args(list(argv))
    if known.action == "du":
        _du(known.store, as_json=known.json)
        return
    if not known.grace >= 0:
        raise ConfigError(f"--grace is {known.grace:g}; it must be a number of hours, 0 or above.")
    _gc(known.store, known.grace * 3600, dry=known.dry_run, asked=known.activations, as_json=known.json)


def _du(store: str | None, *, as_json: bool) -> None:
    storage = open_store(store, create=False)
    rows = upkeep.holdings(upkeep.survey(storage))
    if as_json:
        print(json.dumps([row._asdict() for row in rows], indent=1))
        return
    tables.show(tables.holdings_table([row._asdict() for row in rows], time.time()))
    print(f"{sum(row.bytes for row in rows) / 1e6:,.1f} MB in {storage.uri}")


def _gc(store: str | None, grace: float, *, dry: bool, asked: bool, as_json: bool) -> None:
    storage = open_store(store, create=False)
    found = upkeep.survey(storage)
    waste = [*upkeep.garbage(found, grace=grace), *upkeep.spent_activations(found, asked=asked, grace=grace)]
    waste = list({one.key: one for one in waste}.values())
    if not as_json:
        _tell(found, waste)
    size = sum(one.bytes for one in waste) + sum(entry.bytes for entry in found.leftovers)
    if not dry:
        size = upkeep.remove(found, waste) + (storage.sweep() if isinstance(storage, LocalStorage) else 0)
    if not as_json:
        print(f"{size / 1e6:,.1f} MB {'would go' if dry else 'removed'} of {storage.uri}")
        return
    told = {
        "unreadable": list(found.unreadable),
        "waste": [one._asdict() for one in sorted(waste)],
        "half_written": [entry._asdict() for entry in found.leftovers],
        "dry_run": dry,
        "bytes": size,
    }
    print(json.dumps(told, indent=1))


def _tell(found: upkeep.Survey, waste: Sequence[upkeep.Waste]) -> None:
    for key in found.unreadable:
        print(f"{key} can't be read, so all activations stay: put it right or remove it.")
    for (folder, why), group in groupby(sorted(waste), lambda one: ("/".join(one.key.split("/")[:3]), one.why)):
        ours = list(group)
        print(f"{folder}: {len(ours)} objects, {sum(one.bytes for one in ours) / 1e6:,.1f} MB: {why}")
    if found.leftovers:
        halves = sum(entry.bytes for entry in found.leftovers)
        print(f"{len(found.leftovers)} half-written files, {halves / 1e6:,.1f} MB: their writers were killed")


VERBS: dict[str, Callable[[Sequence[str]], None]] = {"store": _store}
