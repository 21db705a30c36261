"""One sweep or SAE in the terminal, as `runs show` prints it: every name and value, and lists of what there are several
of; other lists of few things as well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from midiscover.summary import hook_names
from midiscover.tables import STATUS_STYLES, Fitted, empty, text

SPARED = ("d_sae", "seed", "control", "kind", "seconds", "sparsity", "hook")
"""Columns that the SAEs of a sweep do without where it is narrow, in this order; an id tells the last two as well."""
REASON_WIDTH = 20
"""Characters to which a reason is wrapped before a column is left out for it."""


def details(data: Mapping[str, Any]) -> RenderableType:
    """Everything about one sweep or SAE: names and values, nested mappings indented, lists of mappings as tables."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    tables: list[RenderableType] = []
    _fill(grid, tables, data, depth=0)
    return Group(grid, *tables)


def listing(title: str, items: Sequence[Mapping[str, Any]]) -> RenderableType:
    """A table; where it is too narrow for one, each item by itself, so that what is to be copied stays whole."""
    apart = [part for item in items for part in (details(item), "")]
    return Fitted(lambda: _table(title, items), lambda: Group(Text(title, style="bold"), *apart))


def _fill(grid: Table, tables: list[RenderableType], data: Mapping[str, Any], depth: int) -> None:
    indent = "  " * depth
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            grid.add_row(text(f"{indent}{key}"), "")
            _fill(grid, tables, value, depth + 1)
        elif isinstance(value, (list, tuple)) and value and all(isinstance(item, Mapping) for item in value):
            tables.append(_saes(value) if key == "saes" else listing(key, value))
        else:
            grid.add_row(text(f"{indent}{key}"), text(None if isinstance(value, Mapping) else value))


def _saes(saes: Sequence[Mapping[str, Any]]) -> RenderableType:
    """The SAEs of a sweep: status, and reasons where there are some, at any width; ids whole while a column can go."""
    names = hook_names([str(sae["hook"]) for sae in saes if "hook" in sae])
    short = [{**sae, "hook": names.short[str(sae["hook"])]} if "hook" in sae else sae for sae in saes]
    title = f"saes, hooks {names.pattern}" if len(names.short) > 1 else "saes"
    return Fitted(
        lambda: _saes_table("saes", saes, 0),
        lambda: _saes_table(title, short, 0),
        *(partial(_saes_table, title, short, less, wraps=True) for less in range(len(SPARED) + 1)),
        lambda: _saes_table("saes", saes, len(SPARED), folds=True),
    )


def _saes_table(
    title: str, saes: Sequence[Mapping[str, Any]], less: int, *, wraps: bool = False, folds: bool = False
) -> Table:
    """less: how many of SPARED are left out; wraps: reasons to REASON_WIDTH; folds: ids may break as well.

    title: may tell what the hooks have in common, where they stand.
    """
    gone = SPARED[:less] if any(sae.get("reason") for sae in saes) else (*SPARED[:less], "reason")
    table = _table(
        "saes" if "hook" in gone else title,
        [{key: value for key, value in sae.items() if key not in gone} for sae in saes],
    )
    for column in table.columns:
        if column.header == "reason" and wraps:
            column.max_width = REASON_WIDTH
        if column.header == "id" and folds:
            column.no_wrap = False
    return table


def _table(title: str, items: Sequence[Mapping[str, Any]]) -> Table:
    keys = list(dict.fromkeys(key for item in items for key in item))
    numeric = {key for key in keys if all(isinstance(item.get(key), (int, float, type(None))) for item in items)}
    table = empty(*(f">{key}" if key in numeric else key for key in keys), title=title)
    for item in items:
        cells = {key: text(item.get(key)) for key in keys}
        if "status" in cells:
            cells["status"].style = STATUS_STYLES.get(cells["status"].plain, "")
        table.add_row(*cells.values())
    return table
