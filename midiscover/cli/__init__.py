"""The `midiscover` command. Reading, listing and checking happen here; stages become their job in jobs/.

Loads neither torch nor ray, so that help, listings and wrong input answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType

import midiscover
from midiscover import tables
from midiscover.config import ModelConfig
from midiscover.configio import build_config, find_config, load_config, to_yaml
from midiscover.errors import ConfigError, MiDiscoverError
from midiscover.launch import Parser, parse_job, parse_overrides, prepare, run_job
from midiscover.models import STORED, HookInfo, HookTable, hook_table, push_model, resolve_model
from midiscover.resolve import Resolved, make_packs, resolve
from midiscover.saeconfig import SAE_KINDS
from midiscover.store import layout
from midiscover.store.storage import open_store, store_uri
from midiscover.tracking import Tracker, reindex

HELP = """\
usage: midiscover VERB ...

Train sparse autoencoders on language-model activations, on a laptop or a cluster.

  inspect MODEL      hook points of a model: d_in, bytes and FLOPs per token, the recommended ones
  config CONFIG      the settings a config resolves to, its ids and paths; runs nothing
  harvest CONFIG     corpus and activation blocks only
  sweep CONFIG       what is missing of corpus and harvest, then the grid of SAEs, measured, with a report
  train              one SAE by flags, without a YAML file
  model push MODEL   put a local model into the store, where nodes fetch it as store:NAME
  runs list | show ID | compare SWEEP | annotate ID | reindex

CONFIG is a YAML file or the name of one that ships: demo, quick, research, high, kinds,
phi2_layers_by_l1.
`midiscover VERB --help` tells a verb's arguments. Exit code 2: wrong input, 1: a stage failed, 130: interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(HELP, end="")
            return 0 if arguments else 2
        if arguments[0] == "--version":
            print(midiscover.__version__)
            return 0
        verb, rest = arguments[0], arguments[1:]
        if verb not in VERBS:
            raise ConfigError(f"'{verb}' is no verb of midiscover; known are {', '.join(VERBS)}.")
        VERBS[verb](rest)
    except MiDiscoverError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (head, less) has gone: nothing is wrong, and there is nobody to tell.
        sys.stderr.close()
    return 0


def _job(stage: str, argv: Sequence[str]) -> None:
    """Check everything that can be checked without torch, then become the job."""
    prepare(parse_job(stage, argv, prog=f"midiscover {stage}")).tracker.close()
    run_job(stage, argv)


def _harvest(argv: Sequence[str]) -> None:
    _job("harvest", argv)


def _sweep(argv: Sequence[str]) -> None:
    _job("sweep", argv)


TRAIN_FLAGS: dict[str, tuple[str, type, str]] = {
    "--model": ("model.id", str, "hub id, folder, GGUF file, store:NAME, or 'embedded' (default)"),
    "--hook": ("harvest.hooks", str, "module path whose output is read; see `midiscover inspect`"),
    "--kind": ("sae.kind", str, f"architecture: {', '.join(SAE_KINDS)} (default: standard, or topk with --k)"),
    "--l1": ("sae.l1_coefficient", float, "L1 coefficient"),
    "--target-l0": ("sae.target_l0", float, "features per token to end at, in place of a coefficient"),
    "--k": ("sae.k", int, "features per token of the TopK kinds"),
    "--expansion-factor": ("sae.expansion_factor", float, "d_sae as a multiple of d_in (8)"),
    "--corpus": ("corpus.source", str, "builtin, a file, a folder, s3:// or a hub data set"),
    "--max-samples": ("corpus.max_samples", int, "read at most this many documents"),
    "--max-tokens": ("corpus.max_tokens", int, "stop after this many tokens"),
    "--epochs": ("train.epochs", int, "passes over the training rows"),
    "--batch-size": ("train.batch_size", int, "tokens per step"),
    "--lr": ("train.lr", float, "peak learning rate"),
    "--seed": ("train.seed", int, "seeds the weights and the order of the rows"),
}


def _train(argv: Sequence[str]) -> None:
    parser = Parser(
        prog="midiscover train",
        description="Train one SAE, with corpus and harvest as needed.",
        epilog="Any setting of the YAML is a flag by its path as well, for example --train.lr_warmup 0.1.",
        allow_abbrev=False,
    )
    for flag, (_path, kind, text) in TRAIN_FLAGS.items():
        parser.add_argument(flag, type=kind, help=text, metavar=flag[2:].split("-")[-1].upper())
    parser.add_argument("--name", default="train", help="becomes part of the sweep's id (default: train)")
    parser.add_argument("--store", metavar="URI", help="folder or s3://bucket/prefix; else $MIDISCOVER_STORE")
    parser.add_argument("--force", action="store_true", help="make anew what is already committed")
    known, rest = parser.parse_known_args(list(argv))
    if known.hook is None:
        raise ConfigError("--hook is missing; name a module path, as `midiscover inspect MODEL` lists them.")
    given_sparsity = [flag for flag in ("--l1", "--target-l0", "--k") if getattr(known, _attribute(flag)) is not None]
    if len(given_sparsity) > 1:
        raise ConfigError(f"{' and '.join(given_sparsity)} exclude each other; give one of them.")
    tree: dict[str, Any] = {"name": known.name, "sae": {"kind": "topk"} if known.k is not None else {}}
    given = {path: getattr(known, _attribute(flag)) for flag, (path, _, _) in TRAIN_FLAGS.items()}
    for path, value in given.items():
        if value is not None:
            section, _, name = path.partition(".")
            tree.setdefault(section, {})[name] = value
    for path, value in parse_overrides(rest).items():
        section, _, name = path.partition(".")
        tree.setdefault(section, {})[name] = value
    text = to_yaml(build_config(tree))
    # A file, so that the job reads it as it reads every config; it stays for as long as the machine keeps such files.
    folder = Path(tempfile.mkdtemp(prefix="midiscover-"))
    path = folder / f"{known.name}.yaml"
    path.write_text(text)
    options = (["--store", known.store] if known.store else []) + (["--force"] if known.force else [])
    _job("sweep", [str(path), *options])


def _attribute(flag: str) -> str:
    return flag[2:].replace("-", "_")


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
    args = parse_job("sweep", argv, prog="midiscover config")
    resolved = resolve(load_config(find_config(args.config), args.overrides), args.store)
    print(to_yaml(resolved.config), end="")
    print("\n# what it resolves to")
    print(to_yaml(_ids(resolved, args.store)), end="")


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
    push.add_argument("--store", metavar="URI", help="folder or s3://bucket/prefix; else $MIDISCOVER_STORE")
    known = parser.parse_args(list(argv))
    stored, is_new = push_model(ModelConfig(id=known.model), known.store, known.name)
    size = sum(file.size for file in stored.files.values()) / 1e6
    print(f"{stored.name}: {size:,.1f} MB {'put' if is_new else 'stand already'} in {stored.store}", file=sys.stderr)
    print(f"{STORED}{stored.key}")


def _runs(argv: Sequence[str]) -> None:
    parser = Parser(prog="midiscover runs", description="Look up, compare and annotate what the tracker knows.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=Parser)
    listing = actions.add_parser("list", help="all sweeps, newest first")
    show = actions.add_parser("show", help="one sweep or SAE")
    compare = actions.add_parser("compare", help="the SAEs of a sweep and their L0-FVU frontier")
    annotate = actions.add_parser("annotate", help="set the note and tags of a sweep or SAE")
    rebuild = actions.add_parser("reindex", help="rebuild the tracker from the store")
    show.add_argument("id", metavar="ID", help="a sweep or SAE, or a unique beginning of its id")
    annotate.add_argument("id", metavar="ID", help="a sweep or SAE, or a unique beginning of its id")
    annotate.add_argument("--note", help="a sentence; an empty one takes it away")
    annotate.add_argument("--tag", action="append", default=[], help="add a tag; may stand several times")
    annotate.add_argument("--untag", action="append", default=[], help="remove a tag")
    compare.add_argument("sweep", metavar="SWEEP", help="a sweep, or a unique beginning of its id")
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
            return tracker.show(known.id), tables.details
        case "compare":
            found = {"saes": tracker.compare(known.sweep), "stability": tracker.stability(known.sweep)}
            return found, lambda both: tables.comparison(both["saes"], both["stability"])
        case "annotate":
            after = tracker.annotate(known.id, known.note, add_tags=known.tag, remove_tags=known.untag)
            return after._asdict(), tables.details
        case _:
            return reindex(storage, tracker)._asdict(), tables.details


VERBS: dict[str, Callable[[Sequence[str]], None]] = {
    "inspect": _inspect,
    "config": _config,
    "harvest": _harvest,
    "sweep": _sweep,
    "train": _train,
    "model": _model,
    "runs": _runs,
}


def entry() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
