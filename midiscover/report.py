"""report.html of a sweep: one file that opens offline, with its charts, tables, settings and definitions.

Everything is inlined, Vega once for all charts, and the page's own Content-Security-Policy forbids any request. What
is drawn is decided in `figures`, what is counted in `summary`; the page itself is `templates/report.html.j2`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from altair.utils.schemapi import debug_mode
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from midiscover import figures
from midiscover.frontier import frontier_of_hooks, frontier_of_kinds, is_control
from midiscover.summary import (
    CONTROLS_NEED,
    INDICATORS_CANNOT_TELL,
    METRICS,
    Column,
    Row,
    ce_error_notes,
    columns,
    fixed,
    has_foreign,
    hook_names,
    in_order,
    is_missing,
    quality,
    strength,
)

DASH = "\N{EN DASH}"
"""What stands for a value that was left out."""


def write_report(
    rows: Sequence[Row],
    curves: Sequence[Row],
    densities: Sequence[Row],
    sweep: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    failures: Mapping[str, str] | None = None,
    *,
    minutes: float | None = None,
    stability: Sequence[Row] = (),
    retired: Mapping[str, str] | None = None,
) -> bytes:
    """The page as UTF-8 bytes.

    Args:
        rows: one per SAE; measures that were left out are None.
        curves: training curves, one row per SAE and reported step.
        densities: histograms of log10 firing rates, one row per SAE and bin.
        sweep: sweep.json, with the note and tags of now.
        records: record.json of every finished SAE.
        failures: SAE id -> why it has no record.
        minutes: wall time of all runs of the sweep, where it is known.
        stability: pairs of SAEs as `stability.pair_row` has them; none draws nothing.
        retired: SAE id -> why its training was ended early.
    """
    rows, failures, retired = in_order(rows), failures or {}, retired or {}
    with debug_mode(False):  # Altair holds each part of a chart against its schema, which takes seconds
        charts = _charts(rows, curves, densities, stability)
    page = _environment().get_template("report.html.j2")
    html = page.render(
        sweep=sweep,
        facts=_facts(rows, curves, sweep, records, {"retired": len(retired), "failed": len(failures)}, minutes),
        headings=columns(rows),
        table=_lines(rows),
        hooks=hook_names([str(row.get("hook")) for row in rows]),
        quality=quality(rows, minutes),
        cannot_tell=INDICATORS_CANNOT_TELL,
        charts=charts,
        controls=CONTROLS_NEED if any(map(is_control, rows)) else None,
        notes=ce_error_notes(rows),
        several_kinds=len({row.get("kind") for row in rows}) > 1,
        failures=failures,
        retired=retired,
        settings=_yaml(sweep.get("config") or {}),
        lineage=_yaml({key: sweep.get(key) for key in ("corpus", "harvest", "evaluation_id", "lineage")}),
        records=[(record["id"], _measured_otherwise(record, sweep), _record_json(record)) for record in records],
        metrics=METRICS,
        example=next((row["sae_id"] for row in rows), None),
        vega=Markup(figures.embedded_javascript()),
    )
    return html.encode()


def frontier_png(rows: Sequence[Row], path: str | Path) -> None:
    """Write frontier.png: the report's first chart, at two pixels per CSS pixel."""
    figures.save_png(figures.frontier_chart(rows), path)


@dataclass(frozen=True, slots=True)
class _Cell:
    text: str
    key: Any
    """What the column is sorted by; None sorts last."""


@dataclass(frozen=True, slots=True)
class _Charts:
    specs: Mapping[str, Any]
    """Name -> Vega-Lite specification without its data and its title."""
    datasets: Mapping[str, Any]
    """Name of a data set -> its rows; charts of the same table share one."""
    captions: Mapping[str, Sequence[str]]


def _charts(rows: Sequence[Row], curves: Sequence[Row], densities: Sequence[Row], stability: Sequence[Row]) -> _Charts:
    drawn: dict[str, figures.Chart] = {}
    layers = len({row["hook"] for row in rows if not is_control(row)}) > 1
    if rows:
        drawn["frontier"] = figures.frontier_chart(rows)
        drawn["shares"] = figures.share_chart(rows)
    if layers:
        drawn["map"] = figures.map_chart(rows)
    if has_foreign(rows):
        drawn["foreign"] = figures.foreign_chart(rows)
    if any(not is_missing(pair["matched"]) for pair in stability):
        drawn["stability"] = figures.stability_chart(stability)
    if curves:
        drawn |= {
            f"curves-{measure}": figures.curve_chart(curves, measure, numbered=True) for measure in figures.MEASURES
        }
    if densities:
        drawn["density"] = figures.density_chart(densities)
        if layers:
            drawn["layer-density"] = figures.layer_density_chart(densities)
    specs, datasets, captions = {}, {}, {}
    for name, chart in drawn.items():
        spec = chart.to_dict()
        values = spec["data"]["values"]
        known = next((key for key, other in datasets.items() if other == values), name)
        spec["data"] = {"name": known}
        datasets[known] = values
        captions[name] = spec.pop("title").get("subtitle", [])
        specs[name] = spec
    return _Charts(specs, datasets, captions)


def _facts(
    rows: Sequence[Row],
    curves: Sequence[Row],
    sweep: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    ended: Mapping[str, int],
    minutes: float | None,
) -> dict[str, str]:
    """The few lines below the title; what is not known is left out. ended: how many SAEs ended otherwise, by word."""
    lineage = dict(records[0].get("lineage") or {}) if records else dict(sweep.get("lineage") or {})
    config = sweep.get("config") or {}
    model, corpus = lineage.get("model") or {}, lineage.get("corpus") or {}
    revision = model.get("revision") or model.get("digest")
    trained = max((row["tokens"] for row in curves), default=None)
    held_out = next((row["tokens"] for row in rows if not is_missing(row.get("tokens"))), None)
    planned = len(sweep.get("sae_ids") or rows)
    facts = {
        "Model": _joined(model.get("name") or (config.get("model") or {}).get("id"), revision and str(revision)[:12]),
        "Corpus": _joined(corpus.get("source") or (config.get("corpus") or {}).get("source"), sweep.get("corpus")),
        "Tokens": _joined(
            None if trained is None else f"{fixed(trained, 0)} trained on, all epochs together",
            None if held_out is None else f"{fixed(held_out, 0)} held out",
        ),
        "SAEs": _joined(
            f"{len(records) or len(rows)} of {planned}", *(f"{count} {word}" for word, count in ended.items() if count)
        ),
        "Run": _joined(_time(sweep.get("created")), None if is_missing(minutes) else f"{fixed(minutes, 1)} minutes"),
        "Owner": str(sweep.get("owner") or ""),
        "Tags": ", ".join(sweep.get("tags") or []),
        "Note": str(sweep.get("note") or ""),
    }
    return {name: text for name, text in facts.items() if text}


def _time(created: Any) -> str:
    """An ISO 8601 time for people, to the minute."""
    return datetime.fromisoformat(created).strftime("%Y-%m-%d %H:%M %Z").strip() if created else ""


def _joined(*parts: Any) -> str:
    return ", ".join(str(part) for part in parts if part)


def _lines(rows: Sequence[Row]) -> list[dict[str, Any]]:
    shown = columns(rows)
    marks = zip(rows, frontier_of_hooks(rows), frontier_of_kinds(rows), strict=True)
    return [
        {
            "id": row.get("sae_id"),
            # How it sorts, and what it reads.
            "frontier": (0, "yes") if of_hook else (1, "of its kind") if of_kind else (2, DASH),
            "control": is_control(row),
            "cells": [_Cell(_dashed(column.text(row)), _sort_key(row, column)) for column in shown],
        }
        for row, of_hook, of_kind in marks
    ]


def _sort_key(row: Row, column: Column) -> Any:
    value = row.get(column.key)
    if column.key == "hook":
        # Text would put layer 10 before layer 9.
        return f"{row.get('layer') if row.get('layer') is not None else 1e9:012.3f} {value}"
    if column.key == "sparsity_label":
        # By the setting's name, then its value: as text, k 128 would stand before k 16.
        name, number = strength(row)
        return f"{name} {number:020.6f}"
    return None if is_missing(value) else value


def _dashed(text: str) -> str:
    return DASH if text == "-" else text


def _measured_otherwise(record: Mapping[str, Any], sweep: Mapping[str, Any]) -> str:
    """What to say of a record whose metrics are not those of the tables, as another sweep made it; else nothing."""
    first, own = record.get("evaluation_id"), sweep.get("evaluation_id")
    return "" if first in (None, own) else f"its metrics are of evaluation {first}; above stand those of {own}"


def _record_json(record: Mapping[str, Any]) -> str:
    """The record without its histogram, which is drawn above."""
    metrics = {key: value for key, value in (record.get("metrics") or {}).items() if key != "density"}
    return json.dumps({**record, "metrics": metrics}, indent=2, ensure_ascii=False)


def _yaml(data: Mapping[str, Any]) -> str:
    # Through JSON, so that tuples become lists and nothing needs a Python tag.
    return yaml.safe_dump(json.loads(json.dumps(data)), sort_keys=False, allow_unicode=True, width=100)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("midiscover", "templates"),
        autoescape=select_autoescape(enabled_extensions=("j2",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["dashed"] = _dashed
    return environment
