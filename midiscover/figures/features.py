"""How often features fire: per SAE, by layer, and the shares that hardly do or never."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from midiscover.figures.drawing import (
    NAME_LINES,
    TRAINED,
    Chart,
    colouring,
    control,
    control_dash,
    finish,
    header,
    heading,
    in_layer_order,
    label,
    labels_of,
    of,
    panel,
    panel_columns,
    setting_colour,
    several,
    thousands,
)
from midiscover.palette import HOOKS
from midiscover.scales import rounded
from midiscover.summary import Row, families, hook_names, in_order, is_missing, natural_key

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
"""Of the firing rates in `layer_density_chart`: a line from the first to the last, a bar for the middle half."""
MANY_BARS = 24
"""Bars per hook above which they are drawn thinner."""
LINE = 14
"""Pixels of a line of a label."""

_RATE = "Firing rate: share of the held-out tokens on which a feature fires"


def density_chart(densities: Sequence[Row]) -> Chart:
    """How often features fire: a histogram of log10 firing rates per hook (down) and sparsity setting (across).

    SAEs that share a panel (architectures, widths, seeds, controls) are outlines over one another. Features that never
    fire have no logarithm; `share_chart` shows them.
    """
    names = hook_names(in_layer_order(densities))
    labels = labels_of(densities)
    shared = len({row["sae_id"] for row in densities}) > len({(row["hook"], row["label"]) for row in densities})
    colours = colouring(densities, names) if several(densities, "kind") else None
    values = [
        {
            "hook": names.short[str(row["hook"])],
            "sae": row["sae_id"],
            "label": str(row["label"]),
            "kind": str(row.get("kind")),
            "control": control(row),
            "low": rounded(row["log10_low"]),
            "high": rounded(row["log10_high"]),
            "count": row["count"],
        }
        for row in densities
        if row["count"] or shared
    ]
    width = max(panel(len(labels), gap=12), 64)
    edges = [edge for value in values if value["count"] for edge in (value["low"], value["high"])] or [-6.0, 0.0]
    x = alt.X(
        "low:Q",
        bin="binned",
        title="log10 firing rate" if width > 110 else "log10 rate",
        scale=alt.Scale(domain=[math.floor(min(edges)), math.ceil(max(edges))]),
        axis=alt.Axis(tickMinStep=1, tickCount=5, format="d", grid=False),
    )
    tooltip = [alt.Tooltip("sae:N", title="SAE"), alt.Tooltip("count:Q", title="features", format=",")]
    y = alt.Y("count:Q", title="Features", stack=None, axis=thousands(3))
    base = alt.Chart(alt.Data(values=values)).encode(x=x, y=y, tooltip=tooltip)
    if shared:
        marks = base.mark_line(interpolate="step-after", strokeWidth=1.2, clip=True).encode(
            detail="sae:N",
            color=alt.Color("kind:N", title=None, scale=colours.scale(), legend=colours.legend())
            if colours
            else alt.value(HOOKS[0]),
            strokeDash=control_dash(value["control"] for value in values),
        )
    else:
        marks = base.mark_bar(binSpacing=0.5, color=HOOKS[0]).encode(x2="high:Q")
    chart = marks.properties(width=width, height=90).facet(
        row=alt.Row("hook:N", sort=list(names.short.values()), header=header(names.short)),
        column=alt.Column("label:N", sort=labels, header=alt.Header(title=None)),
        spacing=12,
    )
    return finish(chart, "How often features fire", [of(names.pattern), _RATE])


def layer_density_chart(densities: Sequence[Row]) -> Chart:
    """Firing rates by layer: for each setting the median, middle half and middle 80 % of the features that fire.

    A panel per family, as `summary.families` names them, seeds together, controls left out.
    """
    densities = [row for row in densities if control(row) == TRAINED]
    names = hook_names(in_layer_order(densities))
    labels = labels_of(densities)
    pooled: dict[tuple[str, str, str], dict[tuple[float, float], int]] = {}
    for row, family in zip(densities, families(densities, kinds=True), strict=True):
        bins = pooled.setdefault((family, names.short[str(row["hook"])], str(row["label"])), {})
        edges = (row["log10_low"], row["log10_high"])
        bins[edges] = bins.get(edges, 0) + row["count"]
    values: list[dict[str, Any]] = [
        {"panel": place, "hook": hook, "label": name}
        | {f"q{100 * share:.0f}": rounded(quantile(bins, share)) for share in QUANTILES}
        for (place, hook, name), bins in pooled.items()
        if sum(bins.values())
    ]
    panels = sorted({value["panel"] for value in values})
    columns = panel_columns(max(1, len(panels)))
    colour = setting_colour(labels)
    base = alt.Chart().encode(
        x=alt.X("hook:N", sort=list(names.short.values()), title=None, axis=alt.Axis(labelAngle=0, grid=False)),
        xOffset=alt.XOffset("label:N", sort=labels),
        color=colour,
        tooltip=[alt.Tooltip("label:N"), *(alt.Tooltip(f"q{100 * q:.0f}:Q", format=".2f") for q in QUANTILES)],
    )
    rate = alt.Y("q10:Q", title="log10 firing rate", scale=alt.Scale(zero=False))
    layers = [
        base.mark_rule(strokeWidth=1).encode(y=rate, y2="q90:Q"),
        base.mark_bar(size=7, opacity=0.75).encode(y=alt.Y("q25:Q"), y2="q75:Q"),
        base.mark_tick(thickness=2, size=7).encode(y="q50:Q", color=alt.value("white")),
    ]
    size = {"width": panel(columns, gap=20), "height": 190}
    chart = alt.layer(*layers, data=alt.Data(values=values)).properties(**size)
    facet = alt.Facet("panel:N", sort=panels, header=heading(labels=len(panels) > 1))
    chart = (
        chart.facet(facet=facet, columns=columns, spacing=20)
        .resolve_axis(x="independent" if len(panels) > columns else "shared")
        .resolve_scale(xOffset="independent")
    )
    subtitle = [
        of(names.pattern),
        _RATE,
        "White line: median; bar: middle half; line: middle 80% of the features that fire",
    ]
    return finish(chart, "Firing rates by layer", subtitle)


def quantile(bins: dict[tuple[float, float], int], share: float) -> float:
    """The value below which `share` of a histogram lies, as if each bin's content were spread evenly over it.

    bins: (low, high) -> count, at least one of them above 0.
    """
    left = share * sum(bins.values())
    filled = [(low, high, count) for (low, high), count in sorted(bins.items()) if count]
    for low, high, count in filled:
        if left <= count:
            return low + (high - low) * left / count
        left -= count
    return filled[-1][1]


def share_chart(rows: Sequence[Row]) -> Chart:
    """Dead and inactive features as two rows of bars side by side; SAEs that differ by seed alone as their mean.

    A group of bars per hook and `variant`.
    """
    rows = in_order(rows)
    names = hook_names([str(row["hook"]) for row in rows])
    labels = sorted({label(row) for row in rows}, key=natural_key)
    kinds = several(rows, "kind")
    colours = colouring(rows, names)
    values = _bars(rows)
    bars = list(dict.fromkeys(value["bar"] for value in values))
    for value in values:
        hook = names.short[value["hook"]] if len(names.short) > 1 or not value["variant"] else ""
        value["hook"] = ", ".join(part for part in (hook, value.pop("variant")) if part)
    hooks = list(dict.fromkeys(value["hook"] for value in values))
    base = alt.Chart(alt.Data(values=values)).mark_bar()
    lines = max((hook.count(", ") + 1 for hook in hooks), default=1)
    bar = 11 if len(bars) <= MANY_BARS // max(1, len(names.short)) else 7
    height = len(hooks) * (max(bar * len(bars), LINE * lines) + 10)
    # A label of several lines has its first one at the middle.
    offset = -LINE * (lines - 1) / 2
    axis = alt.Axis(
        ticks=False, labelPadding=8, labels=len(hooks) > 1, labelExpr=NAME_LINES, labelOffset=offset, labelOverlap=False
    )
    by_kind = alt.Color("kind:N", title=None, scale=colours.scale(), legend=colours.legend())

    def side(key: str, title: str, *, first: bool) -> alt.Chart:
        return base.encode(
            x=alt.X(f"{key}:Q", title=title, axis=alt.Axis(format="~%", tickCount=5), scale=alt.Scale(zero=True)),
            y=alt.Y("hook:N", title=None, sort=hooks, axis=axis if first else None),
            yOffset=alt.YOffset("bar:N", sort=bars),
            color=by_kind if kinds else setting_colour(labels),
            opacity=alt.condition("datum.control === 'trained'", alt.value(1), alt.value(0.45)),
            tooltip=[
                alt.Tooltip("hook:N"),
                alt.Tooltip("bar:N", title="SAE"),
                alt.Tooltip(f"{key}:Q", title=key, format=".1%"),
            ],
        ).properties(width=panel(2, gap=24), height=height)

    dead = side("dead", "Dead features (never fire)", first=True)
    inactive = side("inactive", "Inactive features (fire on at most 0.1% of tokens)", first=False)
    told = [
        "Means over seeds" if several(rows, "seed") else "",
        "Pale: controls" if any(value["control"] != TRAINED for value in values) else "",
    ]
    return finish(alt.hconcat(dead, inactive, spacing=24), "Dead and inactive features", [of(names.pattern), *told])


def _bars(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A bar per hook, variant, family, sparsity setting and control, named by what varies of the last three."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row, family in zip(rows, families([{**row, "variant": None} for row in rows]), strict=True):
        held = "" if control(row) == TRAINED else control(row)
        bar = ", ".join(part for part in (family, label(row), held) if part)
        groups.setdefault((str(row["hook"]), str(row.get("variant") or ""), bar), []).append(row)
    return [
        {
            "hook": hook,
            "variant": variant,
            "bar": bar,
            "label": label(members[0]),
            "kind": str(members[0].get("kind")),
            "control": control(members[0]),
            "dead": _mean([row.get("dead_share") for row in members]),
            "inactive": _mean([row.get("inactive_share") for row in members]),
        }
        for (hook, variant, bar), members in groups.items()
    ]


def _mean(values: Sequence[Any]) -> float | None:
    known = [value for value in values if not is_missing(value)]
    return rounded(sum(known) / len(known)) if known else None
