"""`midiscover verify`, `import` and `promote`: is an SAE what it says, taking in those of others, what is served."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from midiscover import runview, tables
from midiscover.errors import ConfigError
from midiscover.launch import Parser, parse_import, run_job
from midiscover.promoted import promoted
from midiscover.store.storage import Storage, open_store
from midiscover.summary import fixed
from midiscover.targets import find_sae, find_target

if TYPE_CHECKING:
    from rich.console import RenderableType

    from midiscover.publish.checks import Subject
    from midiscover.publish.promote import Decision, Limits
    from midiscover.publish.verify import Report

STYLES = {"pass": "green", "fail": "bold red", "skipped": "dim"}


def _verify(argv: Sequence[str]) -> None:
    parser = Parser(
        prog="midiscover verify",
        description="Check an SAE, or an export of one: files, weights, record, metrics, features, what others load.",
        epilog="Exit code 1 where a check fails. MIDISCOVER_SAELENS_PYTHON names a Python that has SAELens.",
    )
    parser.add_argument("what", metavar="SAE|DIR", help="an SAE by the beginning of its id, a folder or s3:// address")
    parser.add_argument("--visualize", action="store_true", help="draw firing rates and norms as PNG")
    parser.add_argument("--package", action="store_true", help="pack what passed, with the report, as <name>.zip")
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="where those are put (here)")
    parser.add_argument("--store", metavar="URI", help="folder or s3://bucket/prefix; else $MIDISCOVER_STORE")
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    known = parser.parse_args(list(argv))
    subject = _subject(known.what, known.store)
    if known.visualize or known.package:
        _refuse_own_folder(subject, known.out)
    from midiscover.publish.verify import package, pictures, report_files, verify

    report = verify(subject)
    if known.json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        tables.show(_report_table(report))
    drawn = pictures(subject) if known.visualize else []
    written = []
    if known.visualize or known.package:
        try:
            known.out.mkdir(parents=True, exist_ok=True)
            for name, data in (*report_files(report), *drawn):
                path = known.out / f"{report.name}.{name}"
                path.write_bytes(data)
                written.append(path)
            if known.package:
                written.append(package(subject, report, known.out, drawn))
        except OSError as error:
            raise ConfigError(f"Nothing can be written to --out '{known.out}': {error.strerror}.") from error
    if not known.json:
        for path in written:
            print(path)
        print(report.summary)
    if report.count("fail"):
        raise SystemExit(1)


def _subject(what: str, store: str | None) -> Subject:
    if what.startswith("s3://") or Path(what).is_dir():
        from midiscover.publish.verify import subject_of_folder

        return subject_of_folder(what)
    storage = open_store(store, create=False)
    sae = find_sae(storage, what)
    from midiscover.publish.verify import subject_of_sae  # torch, after what is wrong has been said

    return subject_of_sae(storage, sae)


def _refuse_own_folder(subject: Subject, out: Path) -> None:
    """ConfigError where `out` lies in the folder that is checked: what is written there would be no part of it."""
    folder = Path(subject.files.uri, subject.prefix).resolve()
    if subject.files.is_local and out.resolve().is_relative_to(folder):
        raise ConfigError(f"--out '{out}' lies in {folder}, which is checked; give a folder outside of it.")


def _report_table(report: Report) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    title = f"{report.name}  ({report.place})"
    table = Table(title=title, box=None, padding=(0, 1), title_justify="left", expand=True)
    for heading, share in (("group", None), ("", None), ("check", 3), ("found", 2)):
        table.add_column(heading, overflow="fold", no_wrap=share is None, ratio=share)
    before = None
    for (group, status, detail), alike in groupby(report.outcomes, key=lambda found: (found.group, *found[3:])):
        skipped = list(alike) if status == "skipped" else []
        # What has nothing to look at is one line, however many checks it has.
        lines = [f"{len(skipped)} checks"] if len(skipped) > 1 else [found.asserts for found in skipped or alike]
        for line in lines:
            shown, before = group if group != before else "", group
            style = STYLES[status]
            table.add_row(shown, Text(status, style=style), Text(line), Text(detail, style=style))
    return table


def _import(argv: Sequence[str]) -> None:
    parse_import(argv, prog="midiscover import")
    run_job("imports", argv)


_BETWEEN = re.compile(r"([0-9.eE+-]+)\.\.([0-9.eE+-]+)")


def _promote(argv: Sequence[str]) -> None:
    parser = Parser(
        prog="midiscover promote",
        description="Mark which SAEs a deployment serves: of each hook the one with the lowest FVU within the limits.",
        epilog="Limits are on held-out text. Exit code 1, with the reasons, where no SAE keeps them.",
    )
    parser.add_argument("target", nargs="?", metavar="SWEEP|SAE|CONFIG", help="by the beginning of its id, or a config")
    parser.add_argument("--max-fvu", type=float, metavar="X", help="highest share of variance left unexplained")
    parser.add_argument("--l0", metavar="MIN..MAX", help="features a token, for example 20..100")
    parser.add_argument("--max-dead", type=float, metavar="Y", help="highest share of features that never fire")
    parser.add_argument("--min-ce", type=float, metavar="Z", help="lowest share of cross-entropy recovered")
    parser.add_argument("--withdraw", action="store_true", help="take an SAE, or all of a sweep, out of it again")
    parser.add_argument("--list", action="store_true", help="show what is promoted")
    parser.add_argument("--store", metavar="URI", help="folder or s3://bucket/prefix; else $MIDISCOVER_STORE")
    parser.add_argument("--json", action="store_true", help="the list as JSON")
    known = parser.parse_args(list(argv))
    limits = (known.max_fvu, known.l0, known.max_dead)
    limited = known.min_ce is not None or any(limit is not None for limit in limits)
    if known.list:
        if known.target is not None or known.withdraw or limited:
            raise ConfigError("--list shows all that is promoted; give it nothing but --store and --json.")
        _show_promoted(open_store(known.store, create=False), as_json=known.json)
        return
    if known.json:
        raise ConfigError("--json goes with --list.")
    if known.target is None:
        raise ConfigError("SWEEP|SAE|CONFIG is missing; `midiscover promote --list` shows what is promoted.")
    if known.withdraw and limited:
        raise ConfigError("--withdraw takes SAEs out, whatever they measure; give it no limits.")
    if not known.withdraw and None in limits:
        raise ConfigError("Promotion needs --max-fvu, --l0 MIN..MAX and --max-dead, for example 0.25, 20..100 and 0.1.")
    storage = open_store(known.store, create=False)
    from midiscover.publish import promote

    if known.withdraw:
        gone = promote.withdraw(storage, known.target)
        print("\n".join(f"withdrawn: {sae}" for sae in gone))
        return
    _say(promote.promote(storage, find_target(storage, known.target), _limits(known)))


def _limits(known: argparse.Namespace) -> Limits:
    """ConfigError for a limit that no SAE could keep, or that is no range."""
    from midiscover.publish.promote import Limits

    for name in ("max_fvu", "max_dead", "min_ce"):
        value = getattr(known, name)
        # FVU can be above 1 and cross-entropy recovered below 0, so there is one end to each.
        if value is not None and not (value >= 0 if name != "min_ce" else value <= 1):
            flag, right = f"--{name.replace('_', '-')}", "0 or above" if name != "min_ce" else "at most 1"
            raise ConfigError(f"{flag} is {value:g}; it must be {right}.")
    between = _BETWEEN.fullmatch(known.l0)
    try:
        low, high = (float(end) for end in between.groups()) if between else (None, None)
    except ValueError:
        low = high = None
    if low is None or high is None or low > high:
        raise ConfigError(f"--l0 {known.l0} is no range; give MIN..MAX, for example 20..100.")
    return Limits(max_fvu=known.max_fvu, min_l0=low, max_l0=high, max_dead=known.max_dead, min_ce=known.min_ce)


def _show_promoted(storage: Storage, *, as_json: bool) -> None:
    entries = promoted(storage, lambda told: print(f"midiscover: {told}", file=sys.stderr))
    if as_json:
        print(json.dumps(entries, indent=1))
        return
    if not entries:
        print(f"Nothing is promoted in {storage.uri} yet.")
        return
    rows = []
    for entry in entries:
        given = entry.get("metrics")  # the file may have been written by hand
        found = given.items() if isinstance(given, dict) else ()
        measured = {name: value for name, value in found if isinstance(value, (int, float))}
        numbers = {"L0": fixed(measured.get("l0"), 1), "FVU": fixed(measured.get("fvu"), 3)}
        when = str(entry.get("promoted") or "-")[:16].replace("T", " ")
        rows.append({"id": entry["id"], "hook": entry.get("hook"), **numbers, "promoted": when, "by": entry.get("by")})
    tables.show(runview.listing("promoted", rows))


def _say(decision: Decision) -> None:
    for sae, reason in decision.refused.items():
        print(f"refused: {sae}: {reason}")
    for entry in decision.promoted:
        metrics = entry["metrics"]
        print(f"promoted: {entry['id']}: FVU {metrics['fvu']:.4g}, L0 {metrics['l0']:.4g}")
    if not decision.promoted:
        raise SystemExit(1)


VERBS: dict[str, Callable[[Sequence[str]], None]] = {"verify": _verify, "import": _import, "promote": _promote}
