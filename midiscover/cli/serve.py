"""`midiscover serve` and `midiscover keys`: a deployment on this machine, and who may use one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from midiscover import tables
from midiscover.launch import Parser, run_module
from midiscover.serving import parse_serve
from midiscover.store.storage import open_store
from midiscover.tracking import Tracker
from midiscover.tracking.keys import SCOPES


def _serve(argv: Sequence[str]) -> None:
    args = parse_serve(argv, prog="midiscover serve")
    # What is wrong with store or database is said before Ray is loaded.
    Tracker.for_store(open_store(args.config.store, create=False)).close()
    run_module("serve.app", argv)


def _keys(argv: Sequence[str]) -> None:
    parser = Parser(prog="midiscover keys", description="Keys to the HTTP interface of deployments.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=Parser)
    create = actions.add_parser("create", help="make a key; it is shown once")
    listing = actions.add_parser("list", help="who has keys, and what they may do")
    revoke = actions.add_parser("revoke", help="refuse a key from now on")
    create.add_argument("name", metavar="NAME", help="whose key it is, or what for")
    create.add_argument(
        "--scope", action="append", choices=SCOPES, help="read (default), steer, admin: each includes what is before it"
    )
    revoke.add_argument("key", metavar="KEY", help="a key's name, or the beginning of its id")
    for action in (create, listing, revoke):
        action.add_argument("--store", metavar="URI", help="folder or s3://bucket/prefix; else $MIDISCOVER_STORE")
        action.add_argument("--json", action="store_true", help="as JSON")
    known = parser.parse_args(list(argv))
    with Tracker.for_store(open_store(known.store, create=False)) as tracker:
        if known.action == "create":
            key = tracker.create_key(known.name, known.scope or ["read"])
            print(json.dumps({"key": key}) if known.json else key)
            return
        found = [tracker.revoke_key(known.key)] if known.action == "revoke" else tracker.list_keys()
    rows = [
        {
            "id": key.id,
            "name": key.name,
            "scopes": list(key.scopes),
            "created": key.created_at.isoformat(timespec="seconds"),
            "by": key.created_by,
            "revoked": key.revoked_at.isoformat(timespec="seconds") if key.revoked_at else None,
        }
        for key in found
    ]
    if known.json:
        print(json.dumps(rows, indent=1))
    else:
        tables.show(tables.keys_table(rows))


VERBS: dict[str, Callable[[Sequence[str]], None]] = {"serve": _serve, "keys": _keys}
