"""Reconstruction against sparsity, and against reconstruction of foreign text: a point per SAE."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from midiscover.figures.drawing import (
    PLOT_HEIGHT,
    PLOT_WIDTH,
    TRAINED,
    Chart,
    Colouring,
    colouring,
    control,
    control_shape,
    finish,
    label,
    legend_columns,
    of,
    panel,
    panel_columns,
    several,
    wrapped,
)
from midiscover.frontier import frontier_of_hooks, is_control
from midiscover.palette import HOOKS
from midiscover.scales import log_ticks, padded, rounded
from midiscover.summary import Row, fixed, hook_names, in_order, is_missing, natural_key, percent

NOTE_RISE = 15
"""Pixels from a point of the frontier up to its name."""
FVU_TITLE = "FVU (fraction of variance unexplained)"
CONTROL_L0, CONTROL_FVU = 2.0, 1.25
"""Controls are drawn up to so many times the largest L0 and FVU of what was trained; what lies beyond stands at the
edge, as an untrained SAE may fire half of its features and would leave no room for the frontier."""
DASHES = ([1, 0], [5, 3], [2, 2], [8, 3, 2, 3])
PANEL_HEIGHT = {1: PLOT_HEIGHT, 2: 250, 3: 210}

_TOOLTIP = {
    "sae": "SAE",
    "path": "hook",
    "kind": "kind",
    "setting": "setting",
    "width_text": "features",
    "variant": "other settings",
    "control": "control",
    "seed": "seed",
    "l0_text": "L0",
    "fvu_text": "FVU",
    "foreign_text": "FVU foreign",
    "ce_text": "CE recovered",
    "dead_text": "dead",
}


def frontier_chart(rows: Sequence[Row]) -> Chart:
    """FVU against L0: a line per hook and family, as `summary.families` names them, through the means of its seeds.

    Coloured by architecture, in a panel per hook, where there are several; else by hook, else by width, else by other
    settings. What another SAE of its hook beats is hollow; controls have shapes of their own and no line. Rows without
    an L0 above 0 or without FVU have no place on it and are left out.
    """
    rows = [row for row in in_order(rows) if not is_missing(row.get("fvu")) and (row.get("l0") or 0) > 0]
    names = hook_names([str(row["hook"]) for row in rows])
    colours = colouring(rows, names)
    panels = len(names.short) if colours.by == "kind" else 1
    trained = [row for row in rows if not is_control(row)]
    marks = frontier_of_hooks(rows)
    notes = [""] * len(rows) if panels > 1 else _notes(rows)
    values = [_point(row, names.short, colours) for row in rows]
    for value, mark, note in zip(values, marks, notes, strict=True):
        value |= {"frontier": mark, "note": note}
    dashed = next(
        (
            key
            for key, by in (("width_text", "width"), ("variant", "variant"))
            if colours.by != by and len({v[key] for v in values if v["control"] == TRAINED}) > 1
        ),
        None,
    )
    layers = _frontier_layers(values, colours, _range(rows), dashed=dashed)
    if panels > 1:
        size = {"width": panel(panel_columns(panels), gap=20), "height": PANEL_HEIGHT[panel_columns(panels)]}
        chart = wrapped(alt.layer(*layers, data=alt.Data(values=values)).properties(**size), names.short, gap=20)
    else:
        chart = alt.layer(*layers, data=alt.Data(values=values)).properties(width=PLOT_WIDTH, height=PLOT_HEIGHT)
    told = [
        "Hollow: another SAE of the same hook is at least as good in L0 and FVU" if sum(marks) < len(trained) else "",
        "Lines: means over seeds" if several(trained, "seed") else "",
        "Other shapes: controls, at the edge where they lie beyond it" if len(trained) < len(rows) else "",
    ]
    return finish(chart, "Reconstruction against sparsity", [of(names.pattern), *told])


def foreign_chart(rows: Sequence[Row]) -> Chart:
    """FVU on a second corpus against FVU on held-out text of the first; on the diagonal both are equal."""
    rows = [row for row in in_order(rows) if not is_missing(row.get("fvu")) and not is_missing(row.get("fvu_foreign"))]
    names = hook_names([str(row["hook"]) for row in rows])
    colours = colouring(rows, names)
    values = [_point(row, names.short, colours) for row in rows]
    trained = [row for row in rows if not is_control(row)]
    worst, highest = (max((max(r["fvu"], r["fvu_foreign"]) for r in of_rows), default=1) for of_rows in (trained, rows))
    edge = rounded(1.05 * (min(highest, CONTROL_FVU * worst) if trained else highest))
    scale = alt.Scale(domain=[0, edge], clamp=True, nice=False)
    ticks = alt.Axis(tickCount=6)
    base = alt.Chart().encode(
        x=alt.X("fvu:Q", title="FVU on held-out text of the training corpus", scale=scale, axis=ticks),
        y=alt.Y("foreign:Q", title="FVU on foreign text", scale=scale, axis=ticks),
    )
    diagonal = (
        alt.Chart()
        .transform_aggregate(n="count()")
        .mark_rule(strokeDash=[4, 4], color=HOOKS[-1])
        .encode(
            x=alt.datum(0, scale=scale, axis=ticks),
            y=alt.datum(0, scale=scale, axis=ticks),
            x2=alt.datum(edge),
            y2=alt.datum(edge),
        )
    )
    points = base.mark_point(size=60, strokeWidth=2, opacity=0.85).encode(
        color=alt.Color("colour:N", title=None, scale=colours.scale(), legend=colours.legend()),
        shape=control_shape(value["control"] for value in values),
        tooltip=_tooltip(),
    )
    chart = alt.layer(diagonal, points, data=alt.Data(values=values)).properties(width=PLOT_WIDTH, height=PLOT_HEIGHT)
    beyond = "Other shapes: controls, at the edge where they lie beyond it" if len(trained) < len(rows) else ""
    return finish(chart, "Reconstruction of foreign text", [of(names.pattern), beyond])


def _frontier_layers(
    values: Sequence[Mapping[str, Any]],
    colours: Colouring,
    area: tuple[tuple[float, float], tuple[float, float]],
    *,
    dashed: str | None,
) -> list[alt.Chart]:
    """Lines through means, points, and the names of settings. dashed: the field that the lines' dashes tell apart."""
    (low, high), (bottom, top) = area
    pick = alt.selection_point(name="pick", fields=["colour"], bind="legend")
    base = alt.Chart().encode(
        x=alt.X(
            "l0:Q",
            title="L0 (features per token, log scale)",
            scale=alt.Scale(type="log", domain=[low, high], nice=False, clamp=True),
            axis=alt.Axis(values=log_ticks(low, high), format="~r"),
        ),
        y=alt.Y(
            "fvu:Q", title=FVU_TITLE, scale=alt.Scale(domain=[bottom, top], clamp=True), axis=alt.Axis(tickCount=8)
        ),
        opacity=alt.when(pick).then(alt.value(1)).otherwise(alt.value(0.12)),
    )
    colour = alt.Color("colour:N", title=None, scale=colours.scale(), legend=colours.legend())
    lines = (
        base.transform_filter(f"datum.control === '{TRAINED}'")
        .transform_aggregate(
            l0="mean(l0)", fvu="mean(fvu)", groupby=["line", "setting", "colour", "width_text", "variant"]
        )
        .mark_line(strokeWidth=1.5)
        .encode(color=colour, detail="line:N", order=alt.Order("l0:Q"))
    )
    if dashed:
        domain = sorted({value[dashed] for value in values}, key=lambda name: natural_key(name.replace(",", "")))
        dashes = [DASHES[i % len(DASHES)] for i in range(len(domain))]
        columns = legend_columns(domain)
        legend = alt.Legend(orient="top", symbolType="stroke", symbolStrokeColor=HOOKS[-1], columns=columns)
        title = "features" if dashed == "width_text" else None
        dash = alt.StrokeDash(f"{dashed}:N", title=title, scale=alt.Scale(domain=domain, range=dashes), legend=legend)
        lines = lines.encode(strokeDash=dash)
    points = base.mark_point(size=75, strokeWidth=2).encode(
        color=colour,
        fill=alt.Fill("colour:N", title=None, scale=colours.scale(), legend=colours.legend()),
        fillOpacity=alt.condition("datum.frontier", alt.value(1), alt.value(0)),
        shape=control_shape(value["control"] for value in values),
        tooltip=_tooltip(),
    )
    texts = base.transform_filter("datum.note").mark_text(dy=-NOTE_RISE, fontSize=11).encode(text="note:N")
    return [
        lines.properties(name="lines"),
        points.properties(name="points").add_params(pick),
        *([texts.properties(name="notes")] if any(value["note"] for value in values) else []),
    ]


def _tooltip() -> list[alt.Tooltip]:
    return [alt.Tooltip(f"{key}:N", title=title) for key, title in _TOOLTIP.items()]


def _point(row: Row, short: Mapping[str, str], colours: Colouring) -> dict[str, Any]:
    return {
        "hook": short[str(row["hook"])],
        "path": row["hook"],
        "kind": str(row.get("kind")),
        "colour": colours.of(row, short),
        "control": control(row),
        "line": " ".join(str(row.get(key)) for key in ("hook", "output_hook", "kind", "d_sae", "variant")),
        "l0": rounded(row["l0"]),
        "fvu": rounded(row["fvu"]),
        "foreign": rounded(row.get("fvu_foreign")),
        "ce_recovered": rounded(row.get("ce_recovered")),
        "dead_share": rounded(row.get("dead_share")),
        "sae": row.get("sae_id"),
        "setting": label(row),
        "seed": row.get("seed"),
        "d_sae": row.get("d_sae"),
        "variant": row.get("variant") or "-",
        "width_text": fixed(row.get("d_sae"), 0),
        "l0_text": fixed(row["l0"], 1),
        "fvu_text": fixed(row["fvu"], 3),
        "foreign_text": fixed(row.get("fvu_foreign"), 3),
        "ce_text": percent(row.get("ce_recovered")),
        "dead_text": percent(row.get("dead_share")),
    }


def _notes(rows: Sequence[Row]) -> list[str]:
    """What stands above each point: a setting's name at its highest point only, and only where no other name stands."""
    notes = [""] * len(rows)
    (low, high), (bottom, top) = _range(rows)
    places = [
        (
            PLOT_WIDTH * math.log(row["l0"] / low) / math.log(high / low),
            PLOT_HEIGHT * (row["fvu"] - bottom) / (top - bottom),
        )
        for row in rows
    ]
    taken = list(places)
    named: set[str] = set()
    trained = [index for index, row in enumerate(rows) if not is_control(row)]
    for index in sorted(trained, key=lambda i: -rows[i]["fvu"]):
        name = label(rows[index])
        x, y = places[index][0], places[index][1] + NOTE_RISE
        if name not in named and not any(abs(x - a) < 30 and abs(y - b) < NOTE_RISE - 1 for a, b in taken):
            taken.append((x, y))
            notes[index] = name
        named.add(name)
    return notes


def _range(rows: Sequence[Row]) -> tuple[tuple[float, float], tuple[float, float]]:
    """The range of L0 and that of FVU, with room at the edges; FVU from 0 where the values come near it."""
    trained = [row for row in rows if not is_control(row)] or list(rows)
    most = CONTROL_L0 * max((row["l0"] for row in trained), default=0.0)
    least = min((row["l0"] for row in trained), default=0.0) / CONTROL_L0
    worst = CONTROL_FVU * max((row["fvu"] for row in trained), default=0.0)
    sparsities = [min(max(row["l0"], least), most) for row in rows]
    losses = [min(row["fvu"], worst) for row in rows] or [0.0, 1.0]
    wide = len(rows) > 1 and max(sparsities) > 2 * min(sparsities)
    spread = max(losses) - min(losses)
    # Losses that differ by rounding alone have the room of a single one: the ends are rounded as well.
    room = 0.1 * spread if spread > 1e-3 * max(losses) else 0.1 * max(losses) or 0.1
    bottom = 0.0 if min(losses) < 0.4 * max(losses) else max(0.0, min(losses) - room)
    return padded(sparsities, 1.25 if wide else 2.5), (rounded(bottom), rounded(max(losses) + room))
