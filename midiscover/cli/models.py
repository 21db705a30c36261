"""`midiscover inspect`, `config` and `model`: what a model has, what a config means, models in a store."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from midiscover import runview, tables
from midiscover.config import ModelConfig
from midiscover.configio import find_config, load_config, to_yaml
from midiscover.errors import MiDiscoverError, StoreFailedError
from midiscover.launch import Parser, parse_doctor, parse_job
from midiscover.models import STORED, HookInfo, HookTable, hook_table, push_model, resolve_model
from midiscover.resolve import Resolved, make_packs, resolve
from midiscover.store import layout
from midiscover.store.storage import Storage, open_store, store_uri
from midiscover.storedmodels import read_stored, stored_names
from midiscover.summary import fixed


def _inspect(argv: Sequence[str]) -> None:
    parser = Parser(prog="midiscover inspect", description="List a model's hook points; loads no weights.")
    parser.add_argument("model", metavar="MODEL", help="hub id, folder, GGUF file, store:NAME, or 'embedded'")
    parser.add_argument("--store", metavar="URI", help="where store:NAME is; else $MIDISCOVER_STORE")
    parser.add_argument("--revision", help="hub branch, tag or commit")
    parser.add_argument("--all", action="store_true", help="every module, not one layer's of each kind")
    parser.add_argument("--json", action="store_true", help="as JSON")
    known = parser.parse_args(list(argv))
    identity = resolve_model(ModelConfig(id=known.model, revision=known.revision), known.store)
    table = hook_table(identity)
    if known.json:
        print(json.dumps(dataclasses.asdict(table), indent=1))
        return
    tables.show(_about_model(table))
    hooks = [_hook_row(hook) for hook in table.hooks.values() if known.all or _shown(hook, table)]
    tables.show(tables.hooks_table(hooks))
    if not known.all:
        print(
            f"Layers 0 to {table.n_layers - 1} are alike; --all lists all {len(table.hooks)} hooks. "
            "'path:in' reads an input."
        )


def _about_model(table: HookTable) -> str:
    giga = table.flops_per_token / 1e9
    return (
        f"{table.model}: {table.n_layers} layers, d_model {table.d_model:,}, vocabulary {table.vocab_size:,}, "
        f"{table.parameters / 1e6:,.0f} M parameters, {giga:.2f} GFLOP per token"
    )


def _hook_row(hook: HookInfo) -> dict[str, Any]:
    return dataclasses.asdict(hook) | {"bytes_per_token": hook.bytes_per_token}


def _shown(hook: HookInfo, table: HookTable) -> bool:
    """Outputs of the middle layer, and the recommended hooks of the others."""
    return hook.recommended or (hook.layer == table.n_layers // 2 and not hook.path.endswith(":in"))


def _config(argv: Sequence[str]) -> None:
    args = parse_job("config", argv, prog="midiscover config")
    resolved = resolve(load_config(find_config(args.config), args.overrides), args.store)
    ascii_only = not (sys.stdout.encoding or "").lower().startswith("utf")
    print(to_yaml(resolved.config, ascii_only=ascii_only), end="")
    print("\n# what it resolves to")
    print(to_yaml(_ids(resolved, args.store), ascii_only=ascii_only), end="")


def _ids(resolved: Resolved, store: str | None) -> dict[str, Any]:
    packs = make_packs(resolved.saes, resolved.config.resources.pack_size, {sae.id for sae in resolved.saes})
    return {
        "store": store_uri(store),
        "model": {"name": resolved.model.name, "digest": resolved.model.digest},
        "text": {"name": resolved.source.name, "digest": resolved.source.digest},
        "corpus": layout.corpus_folder(resolved.corpus_id),
        "activations": [layout.harvest_folder(part.harvest_id) for part in resolved.parts()],
        "sweep": layout.sweep_folder(resolved.sweep_id),
        "packs": len(packs),
        "saes": [layout.sae_folder(sae.id) for sae in resolved.saes],
    }


def _model(argv: Sequence[str]) -> None:
    parser = Parser(prog="midiscover model", description="Models in a store, for nodes that share no disk.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=Parser)
    push = actions.add_parser("push", help="put a local model into the store; afterwards model.id is store:NAME")
    push.add_argument("model", metavar="MODEL", help="folder, GGUF file, or 'embedded'")
    push.add_argument("--name", help="its name in the store; else what the model calls itself")
    listing = actions.add_parser("list", help="the models of the store")
    for action in (push, listing):
        action.add_argument("--store", metavar="URI", help="folder or s3://bucket/prefix; else $MIDISCOVER_STORE")
    listing.add_argument("--json", action="store_true", help="as JSON")
    known = parser.parse_args(list(argv))
    if known.action == "list":
        _list_models(open_store(known.store, create=False), as_json=known.json)
        return
    stored, is_new = push_model(ModelConfig(id=known.model), known.store, known.name)
    print(
        f"{stored.name}: {stored.size / 1e6:,.1f} MB {'put' if is_new else 'stand already'} in {stored.store}",
        file=sys.stderr,
    )
    print(f"{STORED}{stored.key}")


def _list_models(storage: Storage, *, as_json: bool) -> None:
    models = []
    for name in stored_names(storage):
        try:
            models.append(read_stored(name, storage))
        except StoreFailedError:
            raise
        except MiDiscoverError:
            why = "its manifest is damaged, of another version or not ours"
            print(f"midiscover: models/{name} in {storage.uri} is left out: {why}.", file=sys.stderr)
    if as_json:
        rows = [{"id": f"{STORED}{m.key}", "name": m.name, "digest": m.digest, "bytes": m.size} for m in models]
        print(json.dumps(rows, indent=1))
        return
    rows = [
        {"id": f"{STORED}{model.key}", "what it is": model.name, "MB": fixed(model.size / 1e6, 1)} for model in models
    ]
    if rows:
        tables.show(runview.listing("models", rows))
    else:
        print(f"No models in {storage.uri} yet; `midiscover model push` puts one there.")


def _doctor(argv: Sequence[str]) -> None:
    args = parse_doctor(argv, prog="midiscover doctor")
    config = load_config(find_config(args.config), args.overrides) if args.config else None
    from midiscover.doctor import examine, report

    code = report(examine(args.store, config), as_json=args.json)
    if code:
        raise SystemExit(code)


VERBS: dict[str, Callable[[Sequence[str]], None]] = {
    "inspect": _inspect,
    "config": _config,
    "model": _model,
    "doctor": _doctor,
}
