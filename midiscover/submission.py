"""How a stage is submitted to a cluster: its command line. Loads neither torch nor ray."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from midiscover.config import RunConfig
from midiscover.configio import config_tree, find_config, load_config, names_config
from midiscover.errors import ConfigError
from midiscover.launch import Parser, parse_overrides, run_job
from midiscover.store.storage import store_uri

CLUSTER = "MIDISCOVER_CLUSTER"
"""Environment variable: where it is set, stages run on the cluster whose dashboard has this address."""
STAGES = ("harvest", "sweep", "features", "publish", "pipeline", "doctor", "calibrate")
"""What can run on a cluster."""
NEEDS_NOTHING = ("doctor", "calibrate")
"""Those that can do without a config."""
OF_CONFIG = ("harvest", "sweep", "pipeline", "calibrate")
"""Those that are about a config alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SubmitArgs:
    """What the client of a cluster is told on its command line."""

    action: str
    """`run`, `list`, `logs` or `stop`."""
    cluster: str
    """Address of the dashboard, without a slash at its end."""
    stage: str = ""
    target: str = ""
    """A config, or a sweep or SAE by its id."""
    is_config: bool = False
    store: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    """What the stage is told besides target and store."""
    detach: bool = False
    """Do not wait for the job."""
    job: str = ""
    follow: bool = False
    json: bool = False


def split_cluster(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The cluster that a stage's command line names, else the variable's, and the line without it; `none` is none."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--cluster", default=os.environ.get(CLUSTER))
    known, rest = parser.parse_known_args(list(argv))
    return (None if known.cluster in (None, "", "none") else known.cluster), rest


def _run_parsers(actions: Any) -> list[Parser]:
    """Those of `run STAGE`, one for each stage."""
    run = actions.add_parser("run", help="submit a stage and follow it")
    stages = run.add_subparsers(dest="stage", required=True, metavar="STAGE", parser_class=Parser)
    parsers: list[Parser] = [stages.add_parser(stage, allow_abbrev=False) for stage in STAGES]
    for stage, parser in zip(STAGES, parsers, strict=True):
        parser.add_argument("target", metavar="CONFIG|SWEEP|SAE", nargs="?", default="", help="what it is about")
        parser.add_argument("--store", metavar="URI", help="s3://bucket/prefix; else $MIDISCOVER_STORE")
        parser.add_argument("--force", action="store_true", help="make anew what is already committed")
        parser.add_argument("--tag", action="append", default=[], help="mark the sweep; may stand several times")
        parser.add_argument("--note", help="a sentence kept with the sweep")
        parser.add_argument("--detach", action="store_true", help="do not wait for its end; print the job's id")
        if stage == "doctor":
            parser.add_argument("--json", action="store_true", help="as JSON")
    return parsers


def parse_submit(argv: Sequence[str], *, prog: str | None = None, submits: bool = True) -> SubmitArgs:
    """Read the arguments of the client of a cluster. ConfigError for anything unknown, or where no cluster is named.

    submits: whether `run` is among the actions; at the command line a stage is submitted by its own verb.
    """
    parser = Parser(prog=prog or "python -m jobs.submit", description="Jobs on a Ray cluster.", allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=Parser)
    listing = actions.add_parser("list", help="jobs of the cluster, newest first")
    listing.add_argument("--json", action="store_true", help="as JSON")
    logs = actions.add_parser("logs", help="what a job has said")
    logs.add_argument("-f", "--follow", action="store_true", help="until it ends; the exit code is the job's")
    stop = actions.add_parser("stop", help="end a job; what it has committed is kept")
    for action in (logs, stop):
        action.add_argument("job", metavar="ID", help="a job, or a unique beginning of its id")
    for action in (listing, logs, stop, *(_run_parsers(actions) if submits else [])):
        action.add_argument("--cluster", metavar="URL", default=os.environ.get(CLUSTER), help=f"else ${CLUSTER}")
    known, rest = parser.parse_known_args(list(argv))
    if not known.cluster:
        raise ConfigError(f"No cluster is named: give --cluster URL or set {CLUSTER} to its dashboard's address.")
    given = {"action": known.action, "cluster": known.cluster.rstrip("/")}
    if known.action != "run":
        if rest:
            raise ConfigError(f"'{rest[0]}' is not expected here. Try `{parser.prog} {known.action} --help`.")
        return SubmitArgs(
            **given,
            job=getattr(known, "job", ""),
            follow=getattr(known, "follow", False),
            json=getattr(known, "json", False),
        )
    overrides = parse_overrides(rest)
    if not known.target and known.stage not in NEEDS_NOTHING:
        raise ConfigError(f"{known.stage} needs a config, or a sweep or an SAE that it is about.")
    is_config = bool(known.target) and (known.stage in OF_CONFIG or names_config(known.target))
    if not is_config:
        _refuse_folder(known.stage, overrides.get("publish.out"))
    flags = [*(["--force"] if known.force else []), *(word for tag in known.tag for word in ("--tag", tag))]
    flags += ["--note", known.note] if known.note else []
    flags += ["--json"] if getattr(known, "json", False) else []
    return SubmitArgs(
        **given,
        stage=known.stage,
        target=known.target,
        is_config=is_config,
        store=known.store,
        overrides=overrides if is_config else {},
        flags=tuple(flags if is_config else [*flags, *rest]),
        detach=known.detach,
    )


def submitted_config(args: SubmitArgs) -> RunConfig | None:
    """The config that a stage is submitted with; None where it is about an id. ConfigError where it can't run there."""
    store = store_uri(args.store)
    if not store.startswith("s3://"):
        raise ConfigError(f"The store {store} is a folder here, which the nodes don't see; give --store s3://….")
    config = load_config(find_config(args.target), args.overrides) if args.is_config else None
    if config is not None:
        _refuse_folder(args.stage, config.publish.out)
    return config


def _refuse_folder(stage: str, out: str | None) -> None:
    """ConfigError where exports would be written to a disk that is gone with its node, or with the job's upload."""
    if out and stage in ("publish", "pipeline") and not str(out).startswith("s3://"):
        raise ConfigError(
            f"publish.out is {out}, a folder of whichever node writes it; give s3://…, or leave it away for the "
            "store's own exports/."
        )


def decided_here(args: SubmitArgs) -> list[str]:
    """The settings of a submitted config that are `auto`, so that this machine decides for the cluster.

    The nodes can't: those that an autoscaler has at the time would, and ids follow from it.
    """
    tree = config_tree(find_config(args.target), args.overrides) if args.is_config else {}
    return [f"{name}.dtype" for name in ("model", "train") if (tree.get(name) or {}).get("dtype") == "auto"]


def run_on_cluster(action: str, argv: Sequence[str], cluster: str | None = None) -> NoReturn:
    """Become the client of a cluster."""
    run_job("submit", [action, *argv, *(["--cluster", cluster] if cluster else [])])
