"""Distributions over the features of an SAE: norms of its weights, firing rates, and how many features are dead."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from midiscover.figures.drawing import PLOT_WIDTH, Chart, finish, legend_columns, thousands
from midiscover.palette import INK_SOFT, categories
from midiscover.scales import rounded
from midiscover.summary import Row, fixed, is_missing, percent

BINS = 48
HEIGHT = 240
RATES = (
    ("never", 0.0),
    ("up to 0.001%", 1e-5),
    ("to 0.01%", 1e-4),
    ("to 0.1%", 1e-3),
    ("to 1%", 1e-2),
    ("to 10%", 0.1),
    ("above 10%", math.inf),
)
"""Classes of firing rates in `dead_chart`: name and highest rate."""
BAR = 20
"""Pixels of a bar's height in `dead_chart`."""


def histogram_chart(
    rows: Sequence[Row], title: str, x_title: str, *, subtitle: Sequence[str] = (), y_title: str = "Features"
) -> Chart:
    """How values are distributed, in BINS bins from the smallest to the largest, an outline per group.

    rows: `value` and, where there are several, `group` of each. Values that are missing are left out; values that are
    all the same are one bar.
    """
    groups = list(dict.fromkeys(str(row.get("group", "")) for row in rows))
    known = {
        group: [float(row["value"]) for row in rows if str(row.get("group", "")) == group and _is_known(row)]
        for group in groups
    }
    edges = bin_edges([value for values in known.values() for value in values])
    # To a thousandth of a bin: with the five digits of other values the narrowest bins would have no width.
    digits = 3 - math.floor(math.log10(edges[1] - edges[0]))
    drawn = [round(edge, digits) for edge in edges]
    values = [
        {"group": group, "low": low, "high": high, "count": count}
        for group, found in known.items()
        for low, high, count in zip(drawn, drawn[1:], counted(found, edges), strict=False)
    ]
    x = alt.X(
        "low:Q",
        title=x_title,
        scale=alt.Scale(domain=[drawn[0], drawn[-1]], nice=False),
        axis=alt.Axis(grid=False, tickCount=8),
    )
    tooltip = [alt.Tooltip(f"{key}:N") for key in ("group", "low", "high")] + [alt.Tooltip("count:Q", format=",")]
    y = alt.Y("count:Q", title=y_title, stack=None, axis=thousands(5))
    base = alt.Chart(alt.InlineData(values=values, name="histogram")).encode(x=x, y=y, tooltip=tooltip)
    scale = alt.Scale(domain=groups, range=categories(len(groups)))
    legend = alt.Legend(columns=legend_columns(groups)) if len(groups) > 1 else None
    colour = alt.Color("group:N", title=None, scale=scale, legend=legend)
    if len(groups) > 1:
        marks = base.mark_line(interpolate="step-after", strokeWidth=1.5).encode(color=colour)
    else:
        marks = base.mark_bar(binSpacing=0.5).encode(x2="high:Q", y2=alt.datum(0), color=colour)
    left_out = len(rows) - sum(map(len, known.values()))
    told = [*subtitle, f"{left_out:,} values that are no numbers are left out" if left_out else ""]
    return finish(alt.layer(marks).properties(width=PLOT_WIDTH, height=HEIGHT), title, told)


def dead_chart(
    rows: Sequence[Row], title: str = "How many features fire how often", subtitle: Sequence[str] = ()
) -> Chart:
    """Features by how often they fire, from never to more than every tenth token, with counts and shares.

    rows: `value`, the firing rate of a feature between 0 and 1, and, where there are several SAEs, their `group`.
    """
    groups = list(dict.fromkeys(str(row.get("group", "")) for row in rows))
    names = [name for name, _ in RATES]
    values = []
    for group in groups:
        found = [float(row["value"]) for row in rows if str(row.get("group", "")) == group and _is_known(row)]
        classes = [rate_class(rate) for rate in found]
        for name in names:
            count = classes.count(name)
            share = count / len(found) if found else 0.0
            text = f"{fixed(count, 0)} ({percent(share)})"
            values.append({"group": group, "rate": name, "count": count, "share": rounded(share), "count_text": text})
    highest = max((value["share"] for value in values), default=0.0) or 1.0
    bars = alt.Chart().encode(
        # The numbers stand right of the bars.
        x=alt.X(
            "share:Q",
            title="Share of the features",
            scale=alt.Scale(domain=[0, rounded(1.22 * highest)], nice=False),
            axis=alt.Axis(format="~%", tickCount=5),
        ),
        y=alt.Y("rate:N", sort=names, title="Fires on a share of tokens", axis=alt.Axis(ticks=False, domain=False)),
        tooltip=[
            *(alt.Tooltip(f"{key}:N") for key in ("group", "rate")),
            alt.Tooltip("count_text:N", title="features"),
        ],
    )
    scale = alt.Scale(domain=groups, range=categories(len(groups)))
    legend = alt.Legend(columns=legend_columns(groups)) if len(groups) > 1 else None
    bars = bars.encode(yOffset=alt.YOffset("group:N", sort=groups)) if len(groups) > 1 else bars
    drawn = bars.mark_bar().encode(color=alt.Color("group:N", title=None, scale=scale, legend=legend))
    numbers = bars.mark_text(align="left", dx=4, fontSize=10, color=INK_SOFT).encode(text="count_text:N")
    height = len(RATES) * (BAR if len(groups) < 2 else 14 * len(groups) + 8)
    chart = alt.layer(drawn, numbers, data=alt.InlineData(values=values, name="rates"))
    return finish(chart.properties(width=PLOT_WIDTH - 60, height=height), title, subtitle)


def rate_class(rate: float) -> str:
    """The name in RATES of a firing rate."""
    return next(name for name, highest in RATES if rate <= highest)


def bin_edges(values: Sequence[float], bins: int = BINS) -> list[float]:
    """Edges of equal bins from the smallest value to the largest; one bin about values that are all the same.

    Values that differ by rounding alone (a relative 1e-4, such as norms of 1) count as the same.
    """
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high - low <= 1e-4 * max(abs(low), abs(high)):
        room = 0.05 * max(abs(low), abs(high)) or 0.5
        # An odd number of bins, so that the values lie in the middle of one.
        edges = 21
        return [low - room + 2 * room * i / edges for i in range(edges + 1)]
    return [low + (high - low) * i / bins for i in range(bins + 1)]


def counted(values: Sequence[float], edges: Sequence[float]) -> list[int]:
    """How many values lie in each bin; the last one holds its upper edge."""
    counts = [0] * (len(edges) - 1)
    width = (edges[-1] - edges[0]) / len(counts)
    for value in values:
        counts[min(max(int((value - edges[0]) / width), 0), len(counts) - 1)] += 1
    return counts


def _is_known(row: Row) -> bool:
    value: Any = row.get("value")
    return not is_missing(value)
