"""What all charts have in common: sizes, colours by what differs, legends, titles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import altair as alt

from midiscover.palette import HOOKS, THEME, categories, ramp
from midiscover.summary import HookNames, Row, fixed, natural_key

Chart = alt.LayerChart | alt.FacetChart | alt.HConcatChart | alt.VConcatChart | alt.ConcatChart

PLOT_WIDTH, PLOT_HEIGHT = 640, 380
"""Pixels of the plotting area, so that a chart with its axes fits into 800."""
CONTROL_SHAPES = {
    "none": "circle",
    "untrained": "cross",
    "frozen_decoder": "triangle-up",
    "random_model": "diamond",
    "neurons": "square",
}
CONTROL_DASHES = {
    "none": [1, 0],
    "untrained": [2, 2],
    "frozen_decoder": [6, 2],
    "random_model": [6, 2, 2, 2],
    "neurons": [1, 3],
}
TRAINED = "trained"
"""How charts call what is no control."""
NAME_LINES = "split(datum.label, ', ')"
"""Expression for labels that have a line for each part of a name, such as `summary.families` gives."""


class Colouring(NamedTuple):
    """What the colours of a chart tell apart: architectures where there are several, else hooks, else widths, else
    other settings."""

    by: str
    """`kind`, `hook`, `width` or `variant`."""
    names: list[str]
    """In the order of the legend."""

    def of(self, row: Row, short: Mapping[str, str]) -> str:
        """The name of a row's colour; `short` as in `HookNames`."""
        return _colour_name(self.by, row, short)

    def scale(self) -> alt.Scale:
        """Each name's colour."""
        return alt.Scale(domain=self.names, range=categories(len(self.names)))

    def legend(self) -> alt.Legend | None:
        """None where there is nothing to tell apart."""
        return alt.Legend(columns=legend_columns(self.names)) if len(self.names) > 1 else None


def colouring(rows: Sequence[Row], names: HookNames) -> Colouring:
    """The colours for rows of these hooks."""
    for by in ("kind", "hook", "width", "variant"):
        found = sorted({_colour_name(by, row, names.short) for row in rows}, key=natural_key)
        if len(found) > 1:
            return Colouring(by, found)
    return Colouring("hook", list(names.short.values()))


def _colour_name(by: str, row: Row, short: Mapping[str, str]) -> str:
    if by == "hook":
        return short[str(row["hook"])]
    return f"{fixed(row.get('d_sae'), 0)} features" if by == "width" else str(row.get(by) or "-")


def label(row: Row) -> str:
    """What sets a row's sparsity."""
    return row.get("sparsity_label") or "-"


def control(row: Row) -> str:
    """A row's control, `trained` where it is none."""
    name = row.get("control") or "none"
    return TRAINED if name == "none" else str(name)


def control_shape(names: Iterable[str]) -> alt.Shape:
    """A shape per control; the legend only where there is one."""
    domain, shapes = _of_controls(names, CONTROL_SHAPES)
    grey = HOOKS[-1]
    # Above the plot: beside the colours' legend its entries would read as more of them.
    legend = (
        alt.Legend(orient="top", columns=3, symbolFillColor=grey, symbolStrokeColor=grey) if len(domain) > 1 else None
    )
    return alt.Shape("control:N", title=None, scale=alt.Scale(domain=domain, range=shapes), legend=legend)


def control_dash(names: Iterable[str]) -> alt.StrokeDash:
    """A dash per control, whole lines for what was trained; the legend only where there is a control."""
    domain, dashes = _of_controls(names, CONTROL_DASHES)
    stroke = alt.Legend(orient="top", columns=3, symbolType="stroke", symbolStrokeColor=HOOKS[-1])
    legend = stroke if len(domain) > 1 else None
    return alt.StrokeDash("control:N", title=None, scale=alt.Scale(domain=domain, range=dashes), legend=legend)


def _of_controls(names: Iterable[str], looks: Mapping[str, Any]) -> tuple[list[str], list[Any]]:
    found = {TRAINED, *names}
    known = {TRAINED if name == "none" else name: look for name, look in looks.items()}
    domain = [name for name in known if name in found]
    return domain, [known[name] for name in domain]


def several(rows: Iterable[Row], key: str) -> bool:
    """Whether rows differ in a setting."""
    return len({row.get(key) for row in rows}) > 1


def setting_colour(labels: Sequence[str]) -> alt.Color:
    """Colours of sparsity settings, along the ramp."""
    scale = alt.Scale(domain=list(labels), range=ramp(len(labels)))
    return alt.Color("label:N", title=None, scale=scale, legend=alt.Legend(columns=legend_columns(labels)))


def thousands(count: int) -> alt.Axis:
    """About `count` ticks, written 0, 100k, 2M; Vega's own format writes the 0 as 0k."""
    return alt.Axis(tickCount=count, labelExpr="datum.value === 0 ? '0' : format(datum.value, '~s')")


def header(short: Mapping[str, str]) -> alt.Header:
    """The names of the panels; one hook stands in the subtitle already."""
    return alt.Header(title=None, labels=len(short) > 1)


def heading(**settings: Any) -> alt.Header:
    """Names above panels, each part of a name on a line of its own."""
    return alt.Header(
        title=None,
        labelOrient="top",
        labelAnchor="start",
        labelPadding=4,
        labelExpr=NAME_LINES,
        **settings,
    )


def legend_columns(labels: Sequence[str]) -> int:
    """As many columns as fit beside one another below the plot."""
    longest = max(map(len, labels), default=1)
    return max(1, min(len(labels), PLOT_WIDTH // (7 * longest + 40)))


def in_layer_order(rows: Iterable[Row]) -> list[str]:
    """The hooks of these rows, sorted."""
    return sorted({str(row["hook"]) for row in rows}, key=natural_key)


def labels_of(rows: Iterable[Row]) -> list[str]:
    """The `label` entries of these rows, sorted."""
    return sorted({str(row["label"]) for row in rows}, key=natural_key)


def panel_columns(panels: int) -> int:
    """How many panels stand side by side."""
    return 2 if panels == 4 else max(1, min(panels, 3))


def panel(columns: int, *, gap: int) -> int:
    """Width in pixels of one of several panels side by side."""
    return (PLOT_WIDTH + 20 - gap * (columns - 1)) // max(columns, 1)


def wrapped(chart: Any, short: Mapping[str, str], *, gap: int) -> alt.FacetChart:
    """A panel per hook, in rows of `panel_columns`; the chart has a field `hook` with the short names."""
    columns = panel_columns(len(short))
    facet = alt.Facet("hook:N", sort=list(short.values()), header=header(short))
    # A shared axis is drawn below the last row only, under nothing where that row is not full.
    return chart.facet(facet=facet, columns=columns, spacing=gap).resolve_axis(
        x="independent" if len(short) > columns else "shared"
    )


def of(pattern: str) -> str:
    """The first line below a chart's title."""
    return f"SAEs of {pattern}" if pattern else ""


def finish(chart: Any, title: str, subtitle: Sequence[str]) -> Any:
    """The chart with its title and the theme."""
    lines = [line for line in subtitle if line]
    heading = alt.TitleParams(title, subtitle=lines) if lines else alt.TitleParams(title)
    return chart.properties(title=heading).configure(**THEME)
