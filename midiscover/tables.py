"""What the command line prints: tables of plain rows, with rich.

On a terminal they fit its width, with colour; anywhere else they are plain text without escape codes. Every verdict is
a word or a mark as well as a colour. What is in a table (columns, order, pass marks) is decided in `summary`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal, TextIO

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from midiscover.frontier import frontier_of_hooks, frontier_of_kinds, is_control
from midiscover.summary import (
    CONTROLS_NEED,
    INDICATORS_CANNOT_TELL,
    Indicator,
    Row,
    ce_error_notes,
    columns,
    families,
    fixed,
    hook_names,
    in_order,
    is_missing,
    measure_columns,
    percent,
    quality,
    strength,
)

PLAIN_WIDTH = 120
"""Columns where the output is no terminal and $COLUMNS is not set."""
UNBROKEN = ("id", "SAE", "created", "indicator", "")
"""Columns of text that must stay in one line, to be read or copied."""
FRONTIER_MARK = "*"
FRONTIER_NOTE = f"{FRONTIER_MARK} on the L0-FVU frontier of its hook: no other SAE there beats it"
KIND_MARK = "+"
KIND_NOTE = f"{KIND_MARK} not on it, but on the frontier of its own architecture"
CONTROL_NOTE = f"Dim: controls, which are on no frontier. {CONTROLS_NEED}"
SPARED = ("seconds", "inactive", "dead", "FVU foreign", "CE recovered")
"""Columns that a narrow terminal does without, in this order."""
SPARED_IDS = (("KL recovered", "dead", "inactive"), ("FVU foreign",), ("seed",), ("CE recovered",))
"""The same beside whole ids."""
STATUS_STYLES = {"done": "green", "succeeded": "green", "failed": "red", "running": "cyan"}
MAPS = {
    "fvu": ("FVU", lambda value: fixed(value, 3)),
    "l0": ("L0", lambda value: fixed(value, 1)),
    "ce_recovered": ("CE recovered", percent),
    "dead_share": ("dead", percent),
}
"""Measures that have a map in `comparison`: the title, and how a cell is written."""
AXES = {
    "seed": "another seed",
    "sparsity": "the next sparsity setting",
    "control": "an unlearned control",
    "kind": "another architecture",
    "width": "the next width",
}
"""What two compared SAEs differ in, by the axis names of `neighbours`."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """As with any print; rich would end the process with 1."""
        raise BrokenPipeError


def show(renderable: RenderableType, file: TextIO | None = None) -> None:
    """Print to `file` (standard output): coloured on a terminal, else plain text."""
    out: TextIO = file or sys.stdout
    if out.isatty():
        console = _Console(file=out, highlight=False)
    else:
        width = None if "COLUMNS" in os.environ else PLAIN_WIDTH
        console = _Console(file=out, highlight=False, force_terminal=False, color_system=None, width=width)
    console.print(renderable)


def sweep_table(rows: Sequence[Row]) -> RenderableType:
    """One line per SAE: hook, l1 or k, L0, FVU, CE recovered, dead, inactive, seconds; the frontier is marked.

    Architecture, width, control and seed have columns where they differ; controls are dim. Where not everything fits,
    what the hook paths share stands above the table once, and then measures are left out, the last ones first.
    """
    rows = in_order(rows)
    names = hook_names([str(row.get("hook")) for row in rows])
    table = Fitted(
        lambda: _sweep_table(rows, {}, None, 0),
        *(partial(_sweep_table, rows, names.short, f"hooks {names.pattern}", less) for less in range(len(SPARED) + 1)),
    )
    return Group(table, *_notes(rows))


def comparison(rows: Sequence[Row], stability: Sequence[Row] = ()) -> RenderableType:
    """What `runs compare` shows: the frontiers, a map per measure where there are several hooks, and common features.

    rows: those of `Tracker.compare`; stability: those of `Tracker.stability`.
    """
    parts: list[RenderableType] = [compare_table(rows)]
    if len({row["hook"] for row in rows if not is_control(row)}) > 1:
        for metric in MAPS:
            if not all(is_missing(row.get(metric)) for row in rows):
                parts += ["", layer_map(rows, metric)]
    if stability:
        parts += ["", stability_table(stability)]
    return Group(*parts)


def compare_table(rows: Sequence[Row]) -> RenderableType:
    """The L0-FVU frontier of each hook by SAE id, from few to many active features; what is beaten is dim."""
    hooks = {row["hook"]: place for place, row in enumerate(in_order(rows))}
    rows = sorted(rows, key=lambda row: (hooks[row["hook"]], is_control(row), row.get("l0") or 0.0))
    least = len(SPARED_IDS)
    table = Fitted(
        *(partial(_compare_table, rows, less) for less in range(least + 1)),
        partial(_compare_table, rows, least, folds=True),
    )
    return Group(table, *_notes(rows))


def layer_map(rows: Sequence[Row], metric: str) -> RenderableType:
    """One measure by hook (down) and sparsity setting (across), means over seeds; controls are left out.

    metric: a key of MAPS. Lines are grouped by family, as `summary.families` names them; each has a table of its own
    where the settings of all do not fit beside one another.
    """
    rows = [row for row in in_order(rows) if not is_control(row)]
    apart: dict[str, list[Row]] = {}
    for row, family in zip(rows, families(rows, kinds=True), strict=True):
        apart.setdefault(family, []).append(row)
    names = hook_names([str(row.get("hook")) for row in rows])
    title = f"{MAPS[metric][0]}, {names.pattern}"
    return Fitted(
        lambda: _layer_map(apart, metric, names.short, title),
        lambda: Group(*(_layer_map({name: rows}, metric, names.short, title) for name, rows in apart.items())),
    )


def stability_table(pairs: Sequence[Row]) -> RenderableType:
    """Share of matched features and mean best cosine by what two SAEs differ in: mean, least and most of each hook."""
    names = hook_names([str(pair["hook"]) for pair in in_order(pairs)])
    table = empty(
        "differ in", "hook", ">pairs", ">matched", ">least", ">most", ">best cosine", title="Features in common"
    )
    for axis, title in AXES.items():
        by_hook = {hook: [p for p in pairs if (p["axis"], p["hook"]) == (axis, hook)] for hook in names.short}
        known = {hook: [p for p in found if not is_missing(p["matched"])] for hook, found in by_hook.items()}
        for place, (hook, found) in enumerate((hook, found) for hook, found in known.items() if found):
            matched = [pair["matched"] for pair in found]
            shares = [percent(value) for value in (sum(matched) / len(matched), min(matched), max(matched))]
            cosine = fixed(sum(pair["cosine"] for pair in found) / len(found), 3)
            table.add_row("" if place else title, Text(names.short[hook]), str(len(found)), *shares, cosine)
    note = "matched: share of live features whose direction has a cosine of at least 0.7 with one of the other SAE's"
    return Group(table, Text(note, style="dim"))


def quality_box(rows: Sequence[Row], minutes: float | None = None) -> RenderableType:
    """The original project's indicators with pass or fail, beside the measures that say what they cannot."""
    judged = quality(rows, minutes)
    table = empty("indicator", ">goal", ">best SAE", "", ">SAEs that pass", ">whole sweep", title="Quality box")
    for line in judged.indicators:
        table.add_row(*_quality_cells(line))
    table.add_section()
    for line in judged.measures:
        table.add_row(*_quality_cells(line))
    best = f"Best SAE: {judged.best_id} (passes most indicators, then lowest reconstruction loss)."
    lines = [best] if judged.best_id else []
    return Group(table, *(Text(line, style="dim") for line in [*lines, INDICATORS_CANNOT_TELL]))


def runs_table(runs: Iterable[Row]) -> RenderableType:
    """Sweeps: `id, name, created_at, done, saes, failed, retired, status, owner` of each."""
    table = empty("id", "name", "created", ">SAEs", "status", "owner")
    for run in runs:
        gone = "".join(f", {run[name]} {name}" for name in ("failed", "retired") if run.get(name))
        created = str(run.get("created_at") or "-")[:16].replace("T", " ")
        saes = f"{run.get('done', 0)}/{run.get('saes', 0)}{gone}"
        name, status, owner = (text(run.get(key)) for key in ("name", "status", "owner"))
        status.style = STATUS_STYLES.get(status.plain, "")
        table.add_row(run["id"], name, created, saes, status, owner)
    return table if table.row_count else Text("No runs yet.")


def findings_table(findings: Iterable[Row]) -> RenderableType:
    """What a doctor found: `machine, what, status, told` of each; a machine is named where it changes."""
    table = empty("machine", "", "looked at", "found", vertical="top")
    before = None
    for found in findings:
        status = Text(found["status"], style={"ok": "green", "fails": "bold red"}.get(found["status"], "dim"))
        shown = found["machine"] if found["machine"] != before else ""
        before = found["machine"]
        table.add_row(Text(shown), status, found["what"], Text(found["told"]))
    return table


def jobs_table(jobs: Iterable[Row], now: float) -> RenderableType:
    """Jobs of a cluster: `id, stage, name, owner, status, started, ended` of each; times in milliseconds."""
    table = empty("id", "owner", "status", ">minutes", "started")
    for job in jobs:
        began, status = job["started"], text(job["status"])
        status.style = STATUS_STYLES.get(status.plain, "")
        minutes = fixed(((job["ended"] or now) - began) / 60_000, 1) if began else "-"
        started = datetime.fromtimestamp(began / 1000, UTC).isoformat(" ", "minutes")[:16] if began else "-"
        table.add_row(job["id"], text(job["owner"]), status, minutes, started)
    return table if table.row_count else Text("No jobs yet.")


def keys_table(keys: Iterable[Row]) -> RenderableType:
    """Keys of deployments: `id, name, scopes, created, by, revoked` of each."""
    table = empty("id", "name", "may", "made", "by", "revoked")
    for key in keys:
        times = (key["created"][:10], key["by"] or "-", (key["revoked"] or "-")[:10])
        table.add_row(key["id"], text(key["name"]), ", ".join(key["scopes"]), *map(text, times))
    return table if table.row_count else Text("No keys yet.")


def hooks_table(hooks: Iterable[Row]) -> RenderableType:
    """Hook points: `path, d_in, flops_per_token, recommended` of each; bytes are those of one bfloat16 activation."""
    table = empty("hook", ">d_in", ">bytes per token", ">GFLOP per token", "recommended")
    for hook in hooks:
        size = hook.get("bytes_per_token") or 2 * hook["d_in"]
        gflop = fixed(hook["flops_per_token"] / 1e9, 3)
        recommended = Text("yes", style="green") if hook.get("recommended") else ""
        table.add_row(hook["path"], fixed(hook["d_in"], 0), fixed(size, 0), gflop, recommended)
    return table


def holdings_table(rows: Iterable[Row], now: float) -> RenderableType:
    """A store's parts: `what, kind, bytes, objects, modified, used_by` of each; times in seconds since 1970."""
    table = empty("what", "kind", ">MB", ">objects", ">days old", ">SAEs made of it")
    for row in rows:
        size, age = fixed(row["bytes"] / 1e6, 1), fixed((now - row["modified"]) / 86400, 1)
        table.add_row(row["what"], row["kind"], size, fixed(row["objects"], 0), age, str(row["used_by"] or ""))
    return table if table.row_count else Text("The store is empty.")


def features_made(manifests: Iterable[Row]) -> RenderableType:
    """Feature records: `sae, alive, d_sae, tokens, seconds` of each manifest."""
    table = empty("SAE", ">features alive", ">of", ">tokens read", ">seconds to write")
    for made in manifests:
        counts = (f"{made[name]:,}" for name in ("alive", "d_sae", "tokens"))
        table.add_row(made["sae"], *counts, fixed(made["seconds"], 1))
    return table


class Fitted:
    """The first of several tables, widest first, that fits; the last one where none does."""

    def __init__(self, *builders: Callable[[], RenderableType]) -> None:
        self.builders = builders

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for build in self.builders[:-1]:
            table = build()
            unbounded = options.update(max_width=1000)
            if Measurement.get(console, unbounded, table).maximum <= options.max_width:
                yield table
                return
        yield self.builders[-1]()


def _sweep_table(rows: Sequence[Row], short: Mapping[str, str], title: str | None, less: int) -> Table:
    """less: how many of SPARED are left out."""
    shown = [column for column in columns(rows) if column.title not in SPARED[:less]]
    table = empty(
        *(f"{'>' if column.numeric else ''}{column.title}" for column in shown),
        "",
        title=title,
    )
    for row, mark in zip(rows, _marks(rows), strict=True):
        cells = [column.text(row) for column in shown]
        cells[0] = short.get(cells[0], cells[0])
        table.add_row(*map(Text, cells), Text(mark, style="bold cyan"), style="dim" if is_control(row) else "")
    return table


def _compare_table(rows: Sequence[Row], less: int, *, folds: bool = False) -> Table:
    """less: how many of SPARED_IDS are left out; folds: ids may break, where even then they are too long."""
    spared = {title for titles in SPARED_IDS[:less] for title in titles}
    told = [column for column in columns(rows) if column.key in ("variant", "seed")]  # an id tells them by a hash only
    shown = [column for column in [*told, *measure_columns(rows)] if column.title not in {"seconds", *spared}]
    headings = (f"{'>' if column.numeric else ''}{column.title}" for column in shown)
    table = empty("SAE id" if folds else "SAE", *headings, "")
    for row, mark in zip(rows, _marks(rows), strict=True):
        cells = [str(row["sae_id"]), *(column.text(row) for column in shown)]
        table.add_row(*map(Text, cells), Text(mark, style="bold cyan"), style="" if mark else "dim")
    return table


def _layer_map(apart: Mapping[str, Sequence[Row]], metric: str, short: Mapping[str, str], title: str) -> Table:
    """apart: the rows of each family, in order."""
    labels = {strength(row): str(row.get("sparsity_label") or "-") for rows in apart.values() for row in rows}
    settings = sorted(labels)
    table = empty("SAEs", "hook", *(f">{labels[setting]}" for setting in settings), title=title)
    for family, rows in apart.items():
        for place, hook in enumerate(dict.fromkeys(str(row["hook"]) for row in rows)):
            cells = []
            for setting in settings:
                found = [row[metric] for row in rows if (row["hook"], strength(row)) == (hook, setting)]
                known = [value for value in found if not is_missing(value)]
                cells.append(MAPS[metric][1](sum(known) / len(known)) if known else "-" if found else "")
            table.add_row(Text("" if place else family), Text(short[hook]), *map(Text, cells))
    return table


def _marks(rows: Sequence[Row]) -> list[str]:
    """Which frontier each row is on; that of its architecture only where a hook has several."""
    marks = zip(frontier_of_hooks(rows), frontier_of_kinds(rows), strict=True)
    return [FRONTIER_MARK if of_hook else KIND_MARK if of_kind else "" for of_hook, of_kind in marks]


def _notes(rows: Sequence[Row]) -> list[Text]:
    """What the marks and the dim lines mean."""
    notes = [FRONTIER_NOTE, *ce_error_notes(rows)]
    if KIND_MARK in _marks(rows):
        notes.append(KIND_NOTE)
    if any(map(is_control, rows)):
        notes.append(CONTROL_NOTE)
    return [Text(note, style="dim") for note in notes]


def empty(*headings: str, title: str | None = None, vertical: Literal["top", "bottom"] = "bottom") -> Table:
    """An empty table; a heading that begins with '>' is of a column of numbers, written in two lines to save width."""
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
        title=title and Text(title, style="bold"),
        title_justify="left",
    )
    for heading in headings:
        if heading.startswith(">"):
            table.add_column(heading[1:].replace(" ", "\n", 1), justify="right", no_wrap=True, vertical="bottom")
        else:
            table.add_column(heading, overflow="fold", vertical=vertical, no_wrap=heading in UNBROKEN)
    return table


def _quality_cells(line: Indicator) -> tuple[RenderableType, ...]:
    verdict = {True: Text("pass", style="green"), False: Text("fail", style="red"), None: Text("")}[line.passed]
    return line.name, line.goal, line.best, verdict, line.passing, line.span


def text(value: Any) -> Text:
    """A cell whose brackets are text; rich would read a bare string as markup."""
    return Text(_plain(value))


def _plain(value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value)) or "-"
    return str(value)
