"""The `midiscover` command. Reading, listing and checking happen here; stages become their job in jobs/.

A file of this folder holds the verbs of one matter, and its `VERBS` names them.

Loads neither torch nor ray, so that help, listings and wrong input answer at once.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import midiscover
from midiscover.cli import (
    concepts,
    explain,
    features,
    figures,
    models,
    plan,
    publish,
    runs,
    serve,
    steer,
    store,
    verify,
)
from midiscover.configio import build_config, set_path, to_yaml
from midiscover.errors import ConfigError, MiDiscoverError
from midiscover.launch import Parser, parse_job, parse_overrides, prepare, run_job
from midiscover.saeconfig import SAE_KINDS
from midiscover.submission import STAGES, parse_submit, run_on_cluster, split_cluster, submitted_config

HELP = """\
usage: midiscover VERB ...

Train sparse autoencoders on language-model activations, on a laptop or a cluster.

  inspect MODEL      hook points of a model: d_in, bytes and FLOPs per token, the recommended ones
  config CONFIG      the settings a config resolves to, its ids and paths; runs nothing
  plan CONFIG        what a sweep will take, here or on N GPUs: time, FLOPs, bytes, the bottleneck; runs nothing
  calibrate [CONFIG] how fast this machine is, measured in about a minute, for plan
  harvest CONFIG     corpus and activation blocks only
  pipeline CONFIG    sweep, features and publish, one after another
  sweep CONFIG       what is missing of corpus and harvest, then the grid of SAEs, measured, with a report
  train              one SAE by flags, without a YAML file
  features TARGET    statistics, contexts, logit lens and neighbours of each feature
  feature list SAE | show SAE INDEX
  explain SAE --llm NAME   features in words by a language model, and how well these tell where they fire
  concepts TARGET    features that stand for emotions, numbers, questions, ... or your own texts
  interpret SAE TEXT which features fire on a text, token by token
  steer SAE TEXT     how a text goes on while features are added, clamped or ablated
  figure TARGET CHART --out FILE   one chart as png, svg, pdf, html or csv
  export SAE --to saelens|neuronpedia|bundle
  publish TARGET     the exports that `publish` in a config lists, each of them verified
  verify SAE|DIR     named checks of an SAE or an export, and an archive of what passed
  import SRC --from saelens|seed   an SAE of others: folded, measured, then like one of ours
  promote TARGET | --list   mark what a deployment serves, within limits; or take it out again
  serve              host the SAEs of a store over HTTP, with a first API key
  keys create NAME | list | revoke KEY   who may use a deployment, and for what
  model push MODEL | list   put a local model into the store, where nodes fetch it as store:NAME; those there
  store du | gc      what a store holds; remove what nobody needs
  doctor [CONFIG]    what a run needs of this machine, or of a cluster's: store, database, GPUs, model, text
  jobs list | logs ID [-f] | stop ID   jobs on a cluster
  runs list | show ID | compare SWEEP… | annotate ID | reindex

With --cluster URL (or MIDISCOVER_CLUSTER) run on a cluster: harvest, sweep, features, publish, pipeline, doctor,
calibrate.
TARGET is a CONFIG, or a sweep or an SAE by the beginning of its id.
CONFIG is a YAML file or the name of one that ships: demo, quick, research, high, kinds,
phi2_layers_by_l1.
`midiscover VERB --help` tells a verb's arguments. Exit code 2: wrong input, 1: a stage failed, 130: interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    if sys.stdout is None:  # closed by whoever calls: what is told is told to nobody
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  for as long as the process lives
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        print(end="", flush=True)  # what can't be written is told now, not in the interpreter's last breath
    except MiDiscoverError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (head, less) has gone: nothing is wrong, and there is nobody to tell.
        _drop_output()
        return 0
    except OSError as error:
        if not _drop_output():
            raise
        print(f"error: the output can't be written: {error.strerror}.", file=sys.stderr)
        return 1
    return code


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(midiscover.__version__)
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        raise ConfigError(f"'{verb}' is no verb of midiscover; known are {', '.join(VERBS)}.")
    if verb in STAGES and not {"-h", "--help"} & set(rest):
        cluster, rest = split_cluster(rest)
        if cluster is not None:
            # What is wrong is said before Ray is loaded and the cluster asked.
            submitted_config(parse_submit(["run", verb, *rest, "--cluster", cluster], prog="midiscover"))
            run_on_cluster("run", [verb, *rest], cluster)
    VERBS[verb](rest)
    return 0


def _drop_output() -> bool:
    """Whether standard output takes nothing any more; what it still holds, which the interpreter's end would write once
    more, is then dropped."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _job(stage: str, argv: Sequence[str], *, publishes: bool = False) -> None:
    """Check everything that can be checked without torch, then become the job."""
    prepare(parse_job(stage, argv, prog=f"midiscover {stage}"), publishes=publishes).close()
    run_job(stage, argv)


def _harvest(argv: Sequence[str]) -> None:
    _job("harvest", argv)


def _jobs(argv: Sequence[str]) -> None:
    if argv[:1] == ["run"]:  # which a stage's own verb does
        raise ConfigError(
            "`midiscover jobs` lists, follows and stops jobs; submit one by `midiscover sweep … --cluster`."
        )
    parse_submit(argv, prog="midiscover jobs", submits=False)
    run_on_cluster(argv[0], argv[1:])


def _pipeline(argv: Sequence[str]) -> None:
    _job("pipeline", argv, publishes=True)


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
            set_path(tree, path, value)
    for path, value in parse_overrides(rest).items():
        set_path(tree, path, value)
    text = to_yaml(build_config(tree))
    # A file, so that the job reads it as it reads every config; it stays for as long as the machine keeps such files.
    folder = Path(tempfile.mkdtemp(prefix="midiscover-"))
    path = folder / f"{known.name}.yaml"
    path.write_text(text)
    options = (["--store", known.store] if known.store else []) + (["--force"] if known.force else [])
    _job("sweep", [str(path), *options])


def _attribute(flag: str) -> str:
    return flag[2:].replace("-", "_")


VERBS: dict[str, Callable[[Sequence[str]], None]] = {
    "harvest": _harvest,
    "jobs": _jobs,
    "pipeline": _pipeline,
    "sweep": _sweep,
    "train": _train,
    **concepts.VERBS,
    **explain.VERBS,
    **features.VERBS,
    **figures.VERBS,
    **models.VERBS,
    **plan.VERBS,
    **publish.VERBS,
    **runs.VERBS,
    **serve.VERBS,
    **steer.VERBS,
    **store.VERBS,
    **verify.VERBS,
}


def entry() -> None:
    """The console script."""
    sys.exit(main())
