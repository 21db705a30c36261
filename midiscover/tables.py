"""What the command line prints: tables of plain rows, with rich.

On a terminal they fit its width, with colour; anywhere else they are plain text without escape codes. Every verdict is
a word or a mark as well as a colour. What is in a table (columns, order, pass marks) is decided in `summary`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TextIO

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from midiscover.frontier import frontier_of_hooks
from midiscover.summary import (
    INDICATORS_CANNOT_TELL,
    Indicator,
    Row,
    columns,
    fixed,
    hook_names,
    in_order,
    percent,
    quality,
)

PLAIN_WIDTH = 120
"""Columns where the output is no terminal and $COLUMNS is not set."""
UNBROKEN = ("id", "SAE", "created", "indicator", "")
"""Columns of text that must stay in one line, to be read or copied."""
FRONTIER_MARK = "*"
FRONTIER_NOTE = f"{FRONTIER_MARK} on the L0-FVU frontier of its hook: no other SAE there beats it"
STATUS_STYLES = {"done": "green", "failed": "red", "running": "cyan"}


def show(renderable: RenderableType, file: TextIO | None = None) -> None:
    """Print to `file` (standard output): coloured on a terminal, else plain text."""
    out: TextIO = file or sys.stdout
    if out.isatty():
        console = Console(file=out, highlight=False)
    else:
        width = None if "COLUMNS" in os.environ else PLAIN_WIDTH
        console = Console(file=out, highlight=False, force_terminal=False, color_system=None, width=width)
    console.print(renderable)


def sweep_table(rows: Sequence[Row]) -> RenderableType:
    """One line per SAE: hook, l1 or k, L0, FVU, CE recovered, dead, inactive, seconds; the frontier is marked.

    Where the full hook paths do not fit, what they share stands above the table once.
    """
    rows = in_order(rows)
    names = hook_names([str(row.get("hook")) for row in rows])
    table = _Fitted(
        lambda: _sweep_table(rows, {}, None),
        lambda: _sweep_table(rows, names.short, f"hooks {names.pattern}"),
    )
    return Group(table, Text(FRONTIER_NOTE, style="dim"))


def compare_table(rows: Sequence[Row]) -> RenderableType:
    """The L0-FVU frontier of each hook by SAE id, from few to many active features; what is beaten is dim."""
    rows = sorted(in_order(rows), key=lambda row: (str(row.get("hook")), row.get("l0") or 0.0))
    table = _Fitted(lambda: _compare_table(rows, wide=True), lambda: _compare_table(rows, wide=False))
    return Group(table, Text(FRONTIER_NOTE, style="dim"))


def quality_box(rows: Sequence[Row], minutes: float | None = None) -> RenderableType:
    """The original project's indicators with pass or fail, beside the measures that say what they cannot."""
    judged = quality(rows, minutes)
    table = _table("indicator", ">goal", ">best SAE", "", ">SAEs that pass", ">whole sweep", title="Quality box")
    for line in judged.indicators:
        table.add_row(*_quality_cells(line))
    table.add_section()
    for line in judged.measures:
        table.add_row(*_quality_cells(line))
    best = f"Best SAE: {judged.best_id} (passes most indicators, then lowest reconstruction loss)."
    lines = [best] if judged.best_id else []
    return Group(table, *(Text(line, style="dim") for line in [*lines, INDICATORS_CANNOT_TELL]))


def runs_table(runs: Iterable[Row]) -> RenderableType:
    """Sweeps: `id, name, created_at, done, saes, failed, status, owner` of each."""
    table = _table("id", "name", "created", ">SAEs", "status", "owner")
    for run in runs:
        failed = f", {run['failed']} failed" if run.get("failed") else ""
        created = str(run.get("created_at") or "-")[:16].replace("T", " ")
        saes = f"{run.get('done', 0)}/{run.get('saes', 0)}{failed}"
        name, status, owner = (_text(run.get(key)) for key in ("name", "status", "owner"))
        status.style = STATUS_STYLES.get(status.plain, "")
        table.add_row(run["id"], name, created, saes, status, owner)
    return table if table.row_count else Text("No runs yet.")


def hooks_table(hooks: Iterable[Row]) -> RenderableType:
    """Hook points: `path, d_in, flops_per_token, recommended` of each; bytes are those of one bfloat16 activation."""
    table = _table("hook", ">d_in", ">bytes per token", ">GFLOP per token", "recommended")
    for hook in hooks:
        size = hook.get("bytes_per_token") or 2 * hook["d_in"]
        gflop = fixed(hook["flops_per_token"] / 1e9, 3)
        recommended = Text("yes", style="green") if hook.get("recommended") else ""
        table.add_row(hook["path"], fixed(hook["d_in"], 0), fixed(size, 0), gflop, recommended)
    return table


def details(data: Mapping[str, Any]) -> RenderableType:
    """Everything about one sweep or SAE: names and values, nested mappings indented, lists of mappings as tables."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    tables: list[RenderableType] = []
    _fill(grid, tables, data, depth=0)
    return Group(grid, *tables)


class _Fitted:
    """The first of several tables, widest first, that fits; the last one where none does."""

    def __init__(self, *builders: Callable[[], Table]) -> None:
        self.builders = builders

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for build in self.builders[:-1]:
            table = build()
            unbounded = options.update(max_width=1000)
            if Measurement.get(console, unbounded, table).maximum <= options.max_width:
                yield table
                return
        yield self.builders[-1]()


def _sweep_table(rows: Sequence[Row], short: Mapping[str, str], title: str | None) -> Table:
    shown = columns(rows)
    table = _table(
        *(f"{'>' if column.numeric else ''}{column.title}" for column in shown),
        "",
        title=title,
    )
    for row, mark in zip(rows, frontier_of_hooks(rows), strict=True):
        cells = [column.text(row) for column in shown]
        cells[0] = short.get(cells[0], cells[0])
        table.add_row(*map(Text, cells), Text(FRONTIER_MARK if mark else "", style="bold cyan"))
    return table


def _compare_table(rows: Sequence[Row], *, wide: bool) -> Table:
    more = [">KL recovered", ">dead", ">inactive"] if wide else []
    table = _table("SAE", ">L0", ">FVU", ">CE recovered", *more, "")
    for row, mark in zip(rows, frontier_of_hooks(rows), strict=True):
        extra = [percent(row.get(key)) for key in ("kl_recovered", "dead_share", "inactive_share")] if wide else []
        numbers = [fixed(row.get("l0"), 1), fixed(row.get("fvu"), 3), percent(row.get("ce_recovered")), *extra]
        cells = [Text(cell) for cell in [str(row["sae_id"]), *numbers]]
        table.add_row(*cells, Text(FRONTIER_MARK if mark else "", style="bold cyan"), style="" if mark else "dim")
    return table


def _table(*headings: str, title: str | None = None) -> Table:
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
            table.add_column(heading, overflow="fold", vertical="bottom", no_wrap=heading in UNBROKEN)
    return table


def _quality_cells(line: Indicator) -> tuple[RenderableType, ...]:
    verdict = {True: Text("pass", style="green"), False: Text("fail", style="red"), None: Text("")}[line.passed]
    return line.name, line.goal, line.best, verdict, line.passing, line.span


def _text(value: Any) -> Text:
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


def _fill(grid: Table, tables: list[RenderableType], data: Mapping[str, Any], depth: int) -> None:
    indent = "  " * depth
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            grid.add_row(_text(f"{indent}{key}"), "")
            _fill(grid, tables, value, depth + 1)
        elif isinstance(value, (list, tuple)) and value and all(isinstance(item, Mapping) for item in value):
            tables.append(_listing(key, value))
        else:
            grid.add_row(_text(f"{indent}{key}"), _text(None if isinstance(value, Mapping) else value))


def _listing(title: str, items: Sequence[Mapping[str, Any]]) -> Table:
    keys = list(dict.fromkeys(key for item in items for key in item))
    numeric = {key for key in keys if all(isinstance(item.get(key), (int, float, type(None))) for item in items)}
    table = _table(*(f">{key}" if key in numeric else key for key in keys), title=title)
    for item in items:
        table.add_row(*(_text(item.get(key)) for key in keys))
    return table
