"""Charts of a whole grid: layers by sparsity settings, and the features that neighbours on the grid have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import altair as alt

from midiscover.figures.drawing import PLOT_WIDTH, Chart, colouring, finish, heading, label, of, several
from midiscover.frontier import is_control
from midiscover.palette import GRID, HEAT, INK_SOFT, on_heat
from midiscover.scales import rounded
from midiscover.summary import Row, families, fixed, hook_names, in_order, is_missing

MAP_GAP = 16
CELL = 24
"""Pixels of a cell's height, of a map with few hooks."""
MAP_HEIGHT = 480
"""Pixels of one map at most."""
TEXT_ROOM = 30
"""Pixels that a cell needs for its number."""


class Mapped(NamedTuple):
    """A measure that has a map."""

    title: str
    show: Callable[[Any], str]
    ticks: str
    """Format of the numbers in the legend."""
    log: bool = False


MAPPED = {
    "fvu": Mapped("FVU", lambda value: fixed(value, 2), "~g"),
    "l0": Mapped("L0", lambda value: fixed(value, 0), ",.3~r", log=True),
    "ce_recovered": Mapped("CE recovered", lambda value: _whole_percent(value), "~%"),
    "dead_share": Mapped("dead", lambda value: _whole_percent(value), "~%"),
}
"""The measures of `map_chart`, by key."""

MATCHED_TITLE = "Matched features (share of live features)"
AXIS_NAMES = {
    "seed": "Another seed",
    "sparsity": "The next sparsity setting",
    "control": "A control that learned no directions",
    "kind": "Another architecture",
    "width": "The next width",
}
"""What the SAEs of a pair differ in, by the axis names of `stability`."""


def map_chart(rows: Sequence[Row]) -> Chart:
    """Heat maps of FVU, L0, CE recovered and dead share: hooks down, sparsity settings across; means over seeds.

    One row of maps per family, as `summary.families` names them. Controls are left out.
    """
    rows = [row for row in in_order(rows) if not is_control(row)]
    names = hook_names([str(row["hook"]) for row in rows])
    groups = families(rows)
    settings = list(dict.fromkeys(label(row) for row in rows))
    values = _cells(rows, groups, names.short)
    wide = max((len({v["setting"] for v in values if v["group"] == g}) for g in set(groups)), default=1)
    width = (PLOT_WIDTH + 40 - MAP_GAP * (len(MAPPED) - 1)) // len(MAPPED)
    cell, longest = width / wide, max(map(len, settings), default=0)
    height = min(CELL * len(names.short), MAP_HEIGHT // max(1, len(set(groups))))
    order = list(dict.fromkeys(groups))
    maps, data = [], alt.Data(values=values)
    for key, measure in MAPPED.items():
        first = key == next(iter(MAPPED))
        parts = _map(
            key,
            measure,
            values,
            settings,
            list(names.short.values()),
            first=first,
            text=cell >= TEXT_ROOM,
            flat=cell >= 7 * longest,
        )
        layered = alt.layer(*parts, data=data).properties(width=width, height=height)
        # The measure stands in each map's header: a title of the facet would stand over the axis of the first.
        header = heading(labelLimit=width)
        row = alt.Row(f"{key}_head:N", sort=[_head(group, measure) for group in order], header=header)
        maps.append(layered.facet(row=row, spacing=10).resolve_scale(x="independent"))
    chart = alt.concat(*maps, columns=len(maps), spacing=MAP_GAP).resolve_scale(color="independent")
    means = "Means over seeds" if several(rows, "seed") else ""
    return finish(chart, "Layers by sparsity", [of(names.pattern), "Darker: a higher value", means])


def stability_chart(pairs: Sequence[Row]) -> Chart:
    """Share of matched features of each pair of neighbours on the grid, by what the two differ in; a tick is the mean.

    pairs: plain rows as `stability.pair_row` makes them; those without a live feature on both sides are left out.
    """
    pairs = [pair for pair in pairs if not is_missing(pair.get("matched"))]
    names = hook_names([str(pair["hook"]) for pair in sorted(pairs, key=lambda p: (p.get("layer") or 0, p["hook"]))])
    hooks = list(names.short.values())
    colours = colouring(pairs, names)
    values = [
        {
            "axis": AXIS_NAMES[pair["axis"]],
            "hook": names.short[str(pair["hook"])],
            "colour": colours.of(pair, names.short),
            "matched": rounded(pair["matched"]),
            "cosine": rounded(pair["cosine"]),
            "pair": f"{pair['a_value']} and {pair['b_value']}",
            "setting": pair["setting"],
        }
        for pair in pairs
    ]
    base = alt.Chart().encode(
        y=alt.Y("hook:N", sort=hooks, title=None, axis=alt.Axis(labels=len(hooks) > 1, ticks=False))
    )
    x = alt.X(
        "matched:Q",
        title=MATCHED_TITLE,
        scale=alt.Scale(domain=[0, 1]),
        axis=alt.Axis(format="~%", tickCount=5),
    )
    colour = alt.Color("colour:N", title=None, scale=colours.scale(), legend=colours.legend())
    offset = alt.YOffset("colour:N", sort=colours.names) if colours.by != "hook" else alt.YOffset()
    points = base.mark_point(size=45, strokeWidth=1.8, opacity=0.85).encode(
        x=x,
        color=colour,
        tooltip=[
            alt.Tooltip("pair:N"),
            alt.Tooltip("setting:N"),
            alt.Tooltip("matched:Q", format=".1%"),
            alt.Tooltip("cosine:Q", title="mean best cosine", format=".3f"),
        ],
    )
    means = base.mark_tick(thickness=2, size=12).encode(x=alt.X("mean(matched):Q", title=MATCHED_TITLE), color=colour)
    if colours.by != "hook" and len(colours.names) > 1:
        points, means = points.encode(yOffset=offset), means.encode(yOffset=offset)
    lines = len(hooks) * (len(colours.names) if colours.by != "hook" else 1)
    size = {"width": PLOT_WIDTH, "height": max(24, lines * 9 + 6 * len(hooks))}
    chart = (
        alt.layer(points, means, data=alt.Data(values=values))
        .properties(**size)
        .facet(
            row=alt.Row(
                "axis:N",
                sort=list(AXIS_NAMES.values()),
                header=heading(),
            ),
            spacing=14,
        )
    )
    return finish(chart, "Features in common", [of(names.pattern), "A point is a pair of SAEs, a tick their mean"])


def _map(
    key: str,
    measure: Mapped,
    values: Sequence[Mapping[str, Any]],
    settings: Sequence[str],
    hooks: Sequence[str],
    *,
    first: bool,
    text: bool,
    flat: bool,
) -> list[alt.Chart]:
    known = [value[key] for value in values if value[key] is not None] or [0.0]
    log = measure.log and min(known) > 0
    kind = "log" if log else "linear"
    scale = alt.Scale(type=kind, range=list(HEAT), domain=_domain(known), nice=False, interpolate="rgb")
    legend = None if text else alt.Legend(title=None, orient="bottom", gradientLength=100, format=measure.ticks)
    names = alt.Axis(labelAngle=0 if flat else -45, ticks=False, domain=False)
    base = alt.Chart().encode(
        x=alt.X("setting:N", sort=list(settings), title=None, axis=names),
        y=alt.Y("hook:N", sort=list(hooks), title=None, axis=alt.Axis(ticks=False, domain=False) if first else None),
        tooltip=[
            *(alt.Tooltip(f"{name}:N") for name in ("path", "group", "setting")),
            alt.Tooltip(f"{key}_text:N", title=measure.title),
        ],
    )
    cells = base.transform_filter(f"isValid(datum.{key})").mark_rect(stroke=GRID, strokeWidth=0.5)
    parts = [cells.encode(color=alt.Color(f"{key}:Q", scale=scale, legend=legend))]
    if text:
        parts.append(base.mark_text(fontSize=10, color=alt.expr(f"datum.{key}_ink")).encode(text=f"{key}_text:N"))
    return parts


def _cells(rows: Sequence[Row], groups: Sequence[str], short: Mapping[str, str]) -> list[dict[str, Any]]:
    """A mapping per hook, group and setting, with the mean of each measure, its text, and the text's colour."""
    members: dict[tuple[str, str, str], list[Row]] = {}
    for row, group in zip(rows, groups, strict=True):
        members.setdefault((str(row["hook"]), group, label(row)), []).append(row)
    cells: list[dict[str, Any]] = [
        {"hook": short[hook], "path": hook, "group": group, "setting": setting}
        | {key: mean_of(found, key) for key in MAPPED}
        for (hook, group, setting), found in members.items()
    ]
    for key, measure in MAPPED.items():
        known = [cell[key] for cell in cells if cell[key] is not None]
        for cell in cells:
            value = cell[key]
            cell[f"{key}_head"] = _head(cell["group"], measure)
            cell[f"{key}_text"] = measure.show(value) if value is not None else "-"
            cell[f"{key}_ink"] = (
                INK_SOFT if value is None else on_heat(_position(value, _domain(known), log=measure.log))
            )
            cell[key] = rounded(value)
    return cells


def _head(group: str, measure: Mapped) -> str:
    return f"{measure.title}, {group}" if group else measure.title


def mean_of(rows: Sequence[Row], key: str) -> float | None:
    """Mean of a measure over the rows that have it; None where none has."""
    known = [row[key] for row in rows if not is_missing(row.get(key))]
    return sum(known) / len(known) if known else None


def _domain(known: Sequence[float]) -> list[float]:
    """The range of a map's colours; of values that are the same but for rounding, one that holds them in the middle."""
    low, high = rounded(min(known)), rounded(max(known))
    return [low, high] if high > low else [rounded(low * 0.9), rounded(high * 1.1) or 1.0]


def _position(value: float, domain: Sequence[float], *, log: bool) -> float:
    low, high = domain
    if log and low > 0:
        return math.log(value / low) / math.log(high / low)
    return (value - low) / (high - low)


def _whole_percent(share: Any) -> str:
    return "-" if is_missing(share) else f"{100 * share:.0f}%"
