"""Every chart of miDiscover, once: Altair charts from plain tables, and their PNG and SVG.

The same chart is drawn in the report (by Vega in the browser), in frontier.png and in a notebook. Equal tables give
equal JSON, byte for byte. Knows neither torch nor pandas, and draws nothing that needs a network.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import altair as alt
import vl_convert

from midiscover.frontier import frontier_of_hooks
from midiscover.palette import HOOKS, THEME, hook_colours, ramp
from midiscover.scales import log_ticks, padded, rounded, thinned, wants_log
from midiscover.summary import Row, fixed, hook_names, in_order, is_missing, natural_key, percent

Chart = alt.LayerChart | alt.FacetChart | alt.HConcatChart
Measure = Literal["loss", "mse", "l0", "fvu"]
MEASURES: dict[Measure, str] = {
    "loss": "Loss (per token, normalised inputs)",
    "mse": "Squared error (per token, normalised inputs)",
    "l0": "L0 (features per token)",
    "fvu": "FVU (fraction of variance unexplained)",
}
"""The measures of a training curve, and their axis titles."""

PLOT_WIDTH, PLOT_HEIGHT = 640, 380
"""Pixels of the plotting area, so that a chart with its axes fits into 800."""
NOTE_RISE = 15
"""Pixels from a point of the frontier up to its name."""
CURVE_POINTS = 6_000
"""Points of all training curves together; longer ones are thinned, which cannot be seen at 200 pixels a panel."""
SHAPES = ("circle", "triangle-up", "square", "diamond", "cross", "triangle-down")

_TOOLTIP = {
    "sae": "SAE",
    "path": "hook",
    "setting": "setting",
    "width": "features",
    "l0_text": "L0",
    "fvu_text": "FVU",
    "ce_text": "CE recovered",
    "dead_text": "dead",
}


def frontier_chart(rows: Sequence[Row]) -> Chart:
    """FVU against L0: a line per hook, architecture and width; what another SAE of its hook beats is hollow.

    Rows without an L0 above 0 or without FVU have no place on it and are left out.
    """
    rows = [row for row in in_order(rows) if not is_missing(row.get("fvu")) and (row.get("l0") or 0) > 0]
    names = hook_names([str(row["hook"]) for row in rows])
    marks = frontier_of_hooks(rows)
    notes = _notes(rows)
    values = [_frontier_point(row, names.short, mark, note) for row, mark, note in zip(rows, marks, notes, strict=True)]
    (low, high), (bottom, top) = _frontier_range(rows)
    hooks = list(names.short.values())
    colours = alt.Scale(domain=hooks, range=hook_colours(len(hooks)))
    pick = alt.selection_point(name="pick", fields=["hook"], bind="legend")
    base = alt.Chart(alt.Data(values=values)).encode(
        x=alt.X(
            "l0:Q",
            title="L0 (features per token, log scale)",
            scale=alt.Scale(type="log", domain=[low, high], nice=False),
            axis=alt.Axis(values=log_ticks(low, high), format="~r"),
        ),
        y=alt.Y("fvu:Q", title=MEASURES["fvu"], scale=alt.Scale(domain=[bottom, top]), axis=alt.Axis(tickCount=8)),
        opacity=alt.when(pick).then(alt.value(1)).otherwise(alt.value(0.12)),
    )
    legend = alt.Legend(columns=_legend_columns(hooks)) if len(hooks) > 1 else None
    colour = alt.Color("hook:N", title=None, scale=colours, legend=legend)
    lines = base.mark_line(strokeWidth=1.5).encode(color=colour, detail="line:N", order=alt.Order("l0:Q"))
    points = base.mark_point(size=75, strokeWidth=2).encode(
        color=colour,
        fill=alt.Fill("hook:N", title=None, scale=colours, legend=legend),
        fillOpacity=alt.condition("datum.frontier", alt.value(1), alt.value(0)),
        shape=_shape(sorted({value["kind"] for value in values})),
        tooltip=[alt.Tooltip(f"{key}:N", title=title) for key, title in _TOOLTIP.items()],
    )
    texts = base.transform_filter("datum.note").mark_text(dy=-NOTE_RISE, fontSize=11).encode(text="note:N")
    layers = [
        lines.properties(name="lines"),
        points.properties(name="points").add_params(pick),
        texts.properties(name="notes"),
    ]
    chart = alt.layer(*layers).properties(width=PLOT_WIDTH, height=PLOT_HEIGHT)
    beaten = [] if all(marks) else ["Hollow: another SAE of the same hook is at least as good in L0 and FVU"]
    return _finish(chart, "Reconstruction against sparsity", [_of(names.pattern), *beaten])


def curve_chart(curves: Sequence[Row], measure: Measure = "loss") -> Chart:
    """A training curve of every SAE, a panel per hook, coloured by the sparsity setting."""
    names = hook_names(_in_layer_order(curves))
    labels = _labels(curves)
    numbers: dict[Any, int] = {}
    values = [
        {
            "hook": names.short[str(row["hook"])],
            # A number: ids of 50 characters would be a third of the report.
            "sae": numbers.setdefault(row["sae_id"], len(numbers)),
            "label": str(row["label"]),
            "tokens": row["tokens"],
            **{key: rounded(row.get(key)) for key in MEASURES},
        }
        for row in thinned(curves, CURVE_POINTS)
    ]
    known = [value[measure] for value in values if value[measure] is not None]
    panels = len(names.short)
    columns = 2 if panels == 4 else max(1, min(panels, 3))
    y = alt.Y(
        f"{measure}:Q",
        title=MEASURES[measure],
        scale=alt.Scale(type="log", nice=False, domain=padded(known, 1.08))
        if wants_log(known)
        else alt.Scale(zero=True),
        axis=alt.Axis(values=log_ticks(*padded(known, 1.08)), format="~r") if wants_log(known) else alt.Axis(),
    )
    lines = (
        alt.Chart(alt.Data(values=values))
        .mark_line(strokeWidth=1.5)
        .encode(
            x=alt.X("tokens:Q", title="Training tokens", scale=alt.Scale(nice=False), axis=_thousands(4)),
            y=y,
            color=_setting_colour(labels),
            detail="sae:N",
        )
        .properties(width=_panel(columns, gap=20), height=210)
    )
    facet = alt.Facet("hook:N", sort=list(names.short.values()), header=_header(names.short))
    # A shared axis is drawn below the last row only, under nothing where that row is not full.
    chart = lines.facet(facet=facet, columns=columns, spacing=20).resolve_axis(
        x="independent" if panels > columns else "shared"
    )
    return _finish(chart, "Training curves", [_of(names.pattern)])


def density_chart(densities: Sequence[Row]) -> Chart:
    """How often features fire: a histogram of log10 firing rates per hook (down) and sparsity setting (across).

    Features that never fire have no logarithm; `share_chart` shows them.
    """
    names = hook_names(_in_layer_order(densities))
    labels = _labels(densities)
    values = [
        {
            "hook": names.short[str(row["hook"])],
            "sae": row["sae_id"],
            "label": str(row["label"]),
            "low": rounded(row["log10_low"]),
            "high": rounded(row["log10_high"]),
            "count": row["count"],
        }
        for row in densities
        if row["count"]
    ]
    several = len({row["sae_id"] for row in densities}) > len({(row["hook"], row["label"]) for row in densities})
    width = max(_panel(len(labels), gap=12), 64)
    edges = [edge for value in values for edge in (value["low"], value["high"])] or [-6.0, 0.0]
    bars = (
        alt.Chart(alt.Data(values=values))
        # SAEs that share a panel (widths, seeds) lie over one another; stacked, they would read as one.
        .mark_bar(opacity=0.45 if several else 1, binSpacing=0.5, color=HOOKS[0])
        .encode(
            x=alt.X(
                "low:Q",
                bin="binned",
                title="log10 firing rate" if width > 110 else "log10 rate",
                scale=alt.Scale(domain=[math.floor(min(edges)), math.ceil(max(edges))]),
                axis=alt.Axis(tickMinStep=1, tickCount=5, format="d", grid=False),
            ),
            x2="high:Q",
            y=alt.Y("count:Q", title="Features", stack=None, axis=_thousands(3)),
            tooltip=[alt.Tooltip("sae:N", title="SAE"), alt.Tooltip("count:Q", title="features", format=",")],
        )
        .properties(width=width, height=90)
    )
    chart = bars.facet(
        row=alt.Row("hook:N", sort=list(names.short.values()), header=_header(names.short)),
        column=alt.Column("label:N", sort=labels, header=alt.Header(title=None)),
        spacing=12,
    )
    subtitle = [_of(names.pattern), "Firing rate: share of the held-out tokens on which a feature fires"]
    return _finish(chart, "How often features fire", subtitle)


def share_chart(rows: Sequence[Row]) -> Chart:
    """Dead and inactive features of every SAE as two rows of bars side by side."""
    rows = in_order(rows)
    names = hook_names([str(row["hook"]) for row in rows])
    hooks = list(names.short.values())
    labels = sorted({_label(row) for row in rows}, key=natural_key)
    bars = _bar_names(rows)
    values = [
        {
            "hook": names.short[str(row["hook"])],
            "bar": bar,
            "label": _label(row),
            "sae": row.get("sae_id"),
            "dead": rounded(row.get("dead_share")),
            "inactive": rounded(row.get("inactive_share")),
        }
        for row, bar in zip(rows, bars, strict=True)
    ]
    base = alt.Chart(alt.Data(values=values)).mark_bar()
    height = len(hooks) * (11 * len(set(bars)) + 10)
    axis = alt.Axis(ticks=False, labelPadding=8, labels=len(hooks) > 1)

    def panel(key: str, title: str, *, first: bool) -> alt.Chart:
        return base.encode(
            x=alt.X(f"{key}:Q", title=title, axis=alt.Axis(format="~%", tickCount=5), scale=alt.Scale(zero=True)),
            y=alt.Y("hook:N", title=None, sort=hooks, axis=axis if first else None),
            yOffset=alt.YOffset("bar:N", sort=list(dict.fromkeys(bars))),
            color=_setting_colour(labels),
            tooltip=[alt.Tooltip("sae:N", title="SAE"), alt.Tooltip(f"{key}:Q", title=key, format=".1%")],
        ).properties(width=_panel(2, gap=24), height=height)

    dead = panel("dead", "Dead features (never fire)", first=True)
    inactive = panel("inactive", "Inactive features (fire on at most 0.1% of tokens)", first=False)
    return _finish(alt.hconcat(dead, inactive, spacing=24), "Dead and inactive features", [_of(names.pattern)])


def png(chart: Chart, scale: float = 2) -> bytes:
    """The chart as PNG, `scale` pixels per CSS pixel."""
    return vl_convert.vegalite_to_png(_json(chart), vl_version=_VEGA_LITE, scale=scale)


def svg(chart: Chart) -> str:
    """The chart as SVG."""
    return vl_convert.vegalite_to_svg(_json(chart), vl_version=_VEGA_LITE)


def save_png(chart: Chart, path: str | Path, scale: float = 2) -> None:
    """Write the chart as PNG, `scale` pixels per CSS pixel."""
    Path(path).write_bytes(png(chart, scale))


def save_svg(chart: Chart, path: str | Path) -> None:
    """Write the chart as SVG."""
    Path(path).write_text(svg(chart), encoding="utf-8")


def javascript() -> str:
    """Vega, Vega-Lite and vega-embed in the versions of these charts, as one script that sets `vegaEmbed`."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=_VEGA_LITE)


_VEGA_LITE = ".".join(alt.SCHEMA_VERSION.lstrip("v").split(".")[:2])


def _json(chart: Chart) -> str:
    return json.dumps(chart.to_dict(), sort_keys=True)


def _finish(chart: Chart, title: str, subtitle: list[str]) -> Chart:
    lines = [line for line in subtitle if line]
    heading = alt.TitleParams(title, subtitle=lines) if lines else alt.TitleParams(title)
    return chart.properties(title=heading).configure(**THEME)


def _of(pattern: str) -> str:
    return f"SAEs of {pattern}" if pattern else ""


def _frontier_point(row: Row, short: Mapping[str, str], on_frontier: bool, note: str) -> dict[str, Any]:
    return {
        "hook": short[str(row["hook"])],
        "path": row["hook"],
        "kind": str(row.get("kind")),
        "line": f"{row['hook']} {row.get('kind')} {row.get('d_sae')}",
        "l0": rounded(row["l0"]),
        "fvu": rounded(row["fvu"]),
        "frontier": on_frontier,
        "note": note,
        "sae": row.get("sae_id"),
        "setting": _label(row),
        "width": fixed(row.get("d_sae"), 0),
        "l0_text": fixed(row["l0"], 1),
        "fvu_text": fixed(row["fvu"], 3),
        "ce_text": percent(row.get("ce_recovered")),
        "dead_text": percent(row.get("dead_share")),
    }


def _notes(rows: Sequence[Row]) -> list[str]:
    """What stands above each point: a setting's name at its highest point only, and only where no other name stands."""
    notes = [""] * len(rows)
    (low, high), (bottom, top) = _frontier_range(rows)
    places = [
        (
            PLOT_WIDTH * math.log(row["l0"] / low) / math.log(high / low),
            PLOT_HEIGHT * (row["fvu"] - bottom) / (top - bottom),
        )
        for row in rows
    ]
    taken = list(places)
    named: set[str] = set()
    for index in sorted(range(len(rows)), key=lambda i: -rows[i]["fvu"]):
        label = _label(rows[index])
        x, y = places[index][0], places[index][1] + NOTE_RISE
        if label not in named and not any(abs(x - a) < 30 and abs(y - b) < NOTE_RISE - 1 for a, b in taken):
            taken.append((x, y))
            notes[index] = label
        named.add(label)
    return notes


def _frontier_range(rows: Sequence[Row]) -> tuple[tuple[float, float], tuple[float, float]]:
    """The range of L0 and that of FVU, with room at the edges; FVU from 0 where the values come near it."""
    sparsities, losses = [row["l0"] for row in rows], [row["fvu"] for row in rows] or [0.0, 1.0]
    wide = len(rows) > 1 and max(sparsities) > 2 * min(sparsities)
    room = 0.1 * (max(losses) - min(losses)) or 0.1 * max(losses) or 0.1
    bottom = 0.0 if min(losses) < 0.4 * max(losses) else max(0.0, min(losses) - room)
    return padded(sparsities, 1.25 if wide else 2.5), (rounded(bottom), rounded(max(losses) + room))


def _bar_names(rows: Sequence[Row]) -> list[str]:
    """A name for each SAE's bar within its hook: the sparsity setting, and width, architecture, seed if they vary."""
    varying = [key for key in ("d_sae", "kind", "seed") if len({row.get(key) for row in rows}) > 1]
    return [" ".join([_label(row), *(f"{key} {row.get(key)}" for key in varying)]) for row in rows]


def _label(row: Row) -> str:
    return row.get("sparsity_label") or "-"


def _setting_colour(labels: Sequence[str]) -> alt.Color:
    scale = alt.Scale(domain=list(labels), range=ramp(len(labels)))
    return alt.Color("label:N", title=None, scale=scale, legend=alt.Legend(columns=_legend_columns(labels)))


def _thousands(count: int) -> alt.Axis:
    """About `count` ticks, written 0, 100k, 2M; Vega's own format writes the 0 as 0k."""
    return alt.Axis(tickCount=count, labelExpr="datum.value === 0 ? '0' : format(datum.value, '~s')")


def _header(short: Mapping[str, str]) -> alt.Header:
    """The names of the panels; one hook stands in the subtitle already."""
    return alt.Header(title=None, labels=len(short) > 1)


def _shape(kinds: list[str]) -> alt.Shape:
    """A shape per architecture; the legend only where there is something to tell apart."""
    grey = HOOKS[-1]
    legend = alt.Legend(orient="top-right", symbolFillColor=grey, symbolStrokeColor=grey) if len(kinds) > 1 else None
    scale = alt.Scale(domain=kinds, range=[SHAPES[i % len(SHAPES)] for i in range(len(kinds))])
    return alt.Shape("kind:N", title=None, scale=scale, legend=legend)


def _legend_columns(labels: Sequence[str]) -> int:
    """As many columns as fit beside one another below the plot."""
    longest = max(map(len, labels), default=1)
    return max(1, min(len(labels), PLOT_WIDTH // (7 * longest + 40)))


def _in_layer_order(rows: Iterable[Row]) -> list[str]:
    return sorted({str(row["hook"]) for row in rows}, key=natural_key)


def _labels(rows: Iterable[Row]) -> list[str]:
    return sorted({str(row["label"]) for row in rows}, key=natural_key)


def _panel(columns: int, *, gap: int) -> int:
    """Width in pixels of one of several panels side by side."""
    return (PLOT_WIDTH + 20 - gap * (columns - 1)) // max(columns, 1)
