"""The command line of a job: how it is read, and how it is built. Loads neither torch nor ray.

`midiscover sweep CONFIG` and `python -m jobs.sweep CONFIG` read the same arguments by `parse_job`; the first then
becomes the second, in the same process.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Self

from midiscover.config import RunConfig
from midiscover.configio import find_config, load_config, parse_value
from midiscover.errors import ConfigError
from midiscover.publish.ahead import require_publishable
from midiscover.resolve import Resolved, resolve
from midiscover.saeconfig import SAE_KINDS
from midiscover.store.storage import Storage, open_store, store_uri
from midiscover.tracking import Tracker
from midiscover.tracking.engine import VARIABLE
from midiscover.tracking.rows import checked_tag, checked_text

WANDB_PROJECT = "MIDISCOVER_WANDB_PROJECT"
"""Environment variable: where it is set, a sweep's curves go to that project of Weights & Biases as well."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobArgs:
    """What a job is told on its command line."""

    config: str
    store: str | None = None
    force: bool = False
    tags: tuple[str, ...] = ()
    note: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A job that may start: settings, ids, store and tracker are there. Its end closes the tracker."""

    args: JobArgs
    resolved: Resolved
    storage: Storage
    tracker: Tracker

    def close(self) -> None:
        """Nothing more is told to the tracker."""
        self.tracker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetArgs:
    """What a job about finished SAEs is told on its command line."""

    target: str
    store: str | None = None
    force: bool = False
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportArgs:
    """What the import of an SAE is told on its command line."""

    source: str
    form: str
    """`saelens` or `seed`."""
    name: str | None = None
    config: str | None = None
    hook: str | None = None
    output_hook: str | None = None
    model: str | None = None
    store: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorArgs:
    """What the doctor is told on its command line."""

    config: str | None = None
    store: str | None = None
    json: bool = False
    overrides: dict[str, Any] = field(default_factory=dict)


_SETTING = re.compile(r"--(name|[\w-]+(\.[\w-]+)+)")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one sentence on stderr and exit code 2, and which knows where settings stand."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]  # all overloads
        """As argparse does, but the value of a setting, `--sae.k 32`, is never taken for a CONFIG that comes after."""
        given, words, settings = list(sys.argv[1:] if args is None else args), [], []
        while given:
            word = given.pop(0)
            if word == "--":
                words += [word, *given]
                break
            if not self._is_setting(word.partition("=")[0]):
                words.append(word)
                continue
            settings.append(word)
            if "=" not in word and given and not given[0].startswith("--"):
                settings.append(given.pop(0))
        known, rest = super().parse_known_args(words, namespace)
        return known, [*rest, *settings]

    def _is_setting(self, flag: str) -> bool:
        return _SETTING.fullmatch(flag) is not None and flag not in self._option_string_actions

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message[:1].upper()}{message[1:]}. Try `{self.prog} --help`.")


def job_parser(stage: str, *, prog: str | None = None) -> Parser:
    """The arguments that every job takes; settings go by their path (`--train.lr 1e-3`)."""
    parser = Parser(
        prog=prog or f"python -m jobs.{stage}",
        description=DESCRIPTIONS[stage],
        epilog="Any setting of the YAML is a flag by its path, for example --train.lr 1e-3.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "config", metavar="CONFIG", help="a YAML file, or the name of one that ships (demo, quick, ...)"
    )
    parser.add_argument("--store", metavar="URI", help="folder or s3://bucket/prefix; else $MIDISCOVER_STORE")
    if stage != "config":
        parser.add_argument("--force", action="store_true", help="make anew what is already committed")
    if stage in ("sweep", "pipeline"):
        parser.add_argument("--tag", action="append", default=[], help="mark the sweep; may stand several times")
        parser.add_argument("--note", help="a sentence kept with the sweep")
    return parser


DESCRIPTIONS = {
    "harvest": "Make the corpus and the activation blocks of a config; what is committed is not made again.",
    "sweep": "Make what is missing of corpus and activation blocks, then train, measure and report the grid of SAEs.",
    "features": "Write down each feature of finished SAEs: statistics, contexts, logit lens, neighbours.",
    "pipeline": "Run all stages of a config: sweep, features, and the exports that its section `publish` lists.",
    "publish": "Export SAEs of a sweep for other tools, as the settings in `publish` say.",
    "config": "Print the settings, ids and paths that a config resolves to; runs nothing.",
}
EXAMPLES = {"features": "features.max_tokens 50000", "publish": "publish.saes best"}


def parse_job(stage: str, argv: Sequence[str], *, prog: str | None = None) -> JobArgs:
    """Read a job's arguments. ConfigError for anything unknown, TrackingError for a note or tag that can't be kept."""
    known, rest = job_parser(stage, prog=prog).parse_known_args(list(argv))
    note = getattr(known, "note", None)
    return JobArgs(
        config=known.config,
        store=known.store,
        force=getattr(known, "force", False),
        tags=tuple(checked_tag(tag) for tag in getattr(known, "tag", ())),
        note=None if note is None else checked_text("The note", note),
        overrides=parse_overrides(rest),
    )


def parse_target(stage: str, argv: Sequence[str], *, prog: str | None = None) -> TargetArgs:
    """Read the arguments of a job about a config, a sweep or an SAE. ConfigError for anything unknown."""
    parser = Parser(
        prog=prog or f"python -m jobs.{stage}",
        description=DESCRIPTIONS[stage],
        epilog=f"Any setting is a flag by its path, for example --{EXAMPLES[stage]}.",
        allow_abbrev=False,
    )
    parser.add_argument("target", metavar="CONFIG|SWEEP|SAE", help="a config, or a sweep or SAE by its id's beginning")
    parser.add_argument("--store", metavar="URI", help="folder or s3://bucket/prefix; else $MIDISCOVER_STORE")
    parser.add_argument("--force", action="store_true", help="make anew what is already committed")
    known, rest = parser.parse_known_args(list(argv))
    return TargetArgs(target=known.target, store=known.store, force=known.force, overrides=parse_overrides(rest))


def parse_import(argv: Sequence[str], *, prog: str | None = None) -> ImportArgs:
    """Read the arguments of an import. ConfigError for anything unknown."""
    parser = Parser(
        prog=prog or "python -m jobs.imports",
        description="Take in an SAE of another maker: fold it, measure it on a text, and keep it like one of ours.",
        epilog="Without --config, the text is the built-in one. Settings are flags by their path, for example "
        "--corpus.max_tokens 50000.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SRC", help="a SAELens folder; of the seed project a folder or sae_model.pt")
    parser.add_argument("--from", required=True, dest="form", choices=("saelens", "seed"), help="saelens or seed")
    parser.add_argument("--name", help="becomes part of its id; else what the folder is called")
    parser.add_argument("--config", metavar="CONFIG", help="whose model and text it is measured on")
    parser.add_argument("--model", metavar="MODEL", help="hub id, folder, GGUF file, store:NAME, or 'embedded'")
    parser.add_argument("--hook", metavar="PATH", help="module path that it reads; else what the source says")
    parser.add_argument("--output-hook", metavar="PATH", help="of a transcoder: the module path that it predicts")
    parser.add_argument("--store", metavar="URI", help="folder or s3://bucket/prefix; else $MIDISCOVER_STORE")
    known, rest = parser.parse_known_args(list(argv))
    return ImportArgs(**vars(known), overrides=parse_overrides(rest))


def parse_calibrate(argv: Sequence[str], *, prog: str | None = None) -> JobArgs:
    """Read the arguments of a calibration. ConfigError for anything unknown."""
    parser = Parser(
        prog=prog or "python -m jobs.calibrate",
        description="Measure for about a minute how fast this machine is, for `midiscover plan`; kept in the store.",
        epilog="With --cluster URL, a device of a cluster. Any setting is a flag by its path, as --sae.d_sae 20480.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "config", metavar="CONFIG", nargs="?", default="quick", help="whose model, hook and SAE are taken"
    )
    parser.add_argument("--store", metavar="URI", help="folder or s3://bucket/prefix; else $MIDISCOVER_STORE")
    known, rest = parser.parse_known_args(list(argv))
    return JobArgs(config=known.config, store=known.store, overrides=parse_overrides(rest))


def parse_doctor(argv: Sequence[str], *, prog: str | None = None) -> DoctorArgs:
    """Read the arguments of the doctor. ConfigError for anything unknown."""
    parser = Parser(
        prog=prog or "python -m jobs.doctor",
        description="Look at what a run needs, one by one: versions, GPUs, store, database, model, text.",
        epilog="Exit code 1 where anything fails. With --cluster URL, on every node of a cluster.",
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="whose model and text are looked up as well")
    parser.add_argument("--store", metavar="URI", help="folder or s3://bucket/prefix; else $MIDISCOVER_STORE")
    parser.add_argument("--json", action="store_true", help="as JSON")
    known, rest = parser.parse_known_args(list(argv))
    return DoctorArgs(config=known.config, store=known.store, json=known.json, overrides=parse_overrides(rest))


def parse_overrides(arguments: Sequence[str], top: Sequence[str] = ("name",)) -> dict[str, Any]:
    """`--train.lr 1e-3 --grid.sae.k=[16,32]` as dotted paths and values; `top` may stand without a section."""
    overrides: dict[str, Any] = {}
    pairs = iter(arguments)
    for argument in pairs:
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not name:
            raise ConfigError(f"'{argument}' is not expected here; a setting is given as --section.name value.")
        if "." not in name and name not in top:
            raise ConfigError(_unknown_flag(name))
        if not equals:
            try:
                value = next(pairs)
            except StopIteration:
                raise ConfigError(f"--{name} needs a value after it.") from None
        section, _, axis = name.partition(".")
        if section == "grid":
            # The paths of a grid have dots of their own, so they are one key.
            overrides.setdefault("grid", {})[axis] = parse_value(value)
        else:
            overrides[name] = parse_value(value)
    return overrides


def prepare(args: JobArgs, *, publishes: bool = False) -> Prepared:
    """Read and check everything a job needs before any work: config, model, hooks, text, store, database.

    publishes: whether exports follow, so that what `publish` says is looked at as well.
    """
    config = load_config(find_config(args.config), args.overrides)
    wandb_project()
    # A bucket is asked before the model is looked up, a folder is made after: wrong input leaves nothing behind.
    bucket = open_store(args.store) if "://" in store_uri(args.store) else None
    if bucket is not None and not os.environ.get(VARIABLE):
        Tracker.for_store(bucket)  # refuses: a bucket holds no SQLite
    if os.environ.get(VARIABLE):
        Tracker.open(os.environ[VARIABLE]).close()  # asked before a folder is made
    resolved = resolve(config, args.store)
    if publishes:
        require_publishable(resolved)
    storage = bucket or open_store(args.store)
    return Prepared(args=args, resolved=resolved, storage=storage, tracker=Tracker.for_store(storage))


def wandb_project() -> str | None:
    """The project asked for, or None. ConfigError where wandb is not installed or has no account to write to."""
    project = os.environ.get(WANDB_PROJECT)
    if not project:
        return None
    try:
        import wandb
    except ImportError:
        raise ConfigError(
            f"{WANDB_PROJECT} is set and wandb is not installed; `pip install 'midiscover[wandb]'`, or unset it."
        ) from None
    if wandb_online():
        try:
            wandb.login()  # asks at a terminal; by its stored key else
        except wandb.Error as error:
            raise ConfigError(f"wandb: {error} WANDB_MODE=offline keeps the runs on this machine.") from None
    return project


def wandb_online() -> bool:
    """Whether wandb sends runs to its server; by its own variable."""
    return os.environ.get("WANDB_MODE", "online") == "online"


def run_job(stage: str, argv: Sequence[str]) -> NoReturn:
    """Become `python -m jobs.<stage>`: its signals, output and exit code are then ours."""
    run_module(f"jobs.{stage}", argv)


def run_module(module: str, argv: Sequence[str]) -> NoReturn:
    """Become `python -m <module>`."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *argv])


def _settings(cls: type, prefix: str = "") -> Iterator[str]:
    for item in dataclasses.fields(cls):
        if prefix == "" and item.name == "sae":
            for kind in SAE_KINDS.values():
                yield from _settings(kind, "sae.")
        elif isinstance(item.default_factory, type) and dataclasses.is_dataclass(item.default_factory):
            yield from _settings(item.default_factory, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}"


def _unknown_flag(name: str) -> str:
    paths = {path.rpartition(".")[2]: path for path in _settings(RunConfig)}
    near = difflib.get_close_matches(name.replace("-", "_"), list(paths), n=1, cutoff=0.6)
    if near == ["grid"]:
        return f"'--{name}' is not a flag; an axis of the grid is given by its path, such as --grid.sae.k '[16, 32]'."
    hint = f"did you mean --{paths[near[0]]}?" if near else "settings are given by their path, such as --train.lr 1e-3."
    return f"'--{name}' is not a flag; {hint}"
