"""What workers do over the time of a plan."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt

from midiscover.figures.drawing import PLOT_WIDTH, Chart, finish
from midiscover.palette import categories
from midiscover.summary import Row

MOST_LANES = 40
"""Workers that are drawn, of each stage the first and the one that ends last; more would be hairlines."""
STARTING = ["load", "start", "driver", "ray"]
"""What is no work yet."""


def schedule_chart(spans: Sequence[Row], title: str, subtitle: str) -> Chart:
    """A bar for everything a worker does: `stage, what, lane, begin, end`, in seconds."""
    lanes = list(dict.fromkeys(str(span["lane"]) for span in spans))
    stages = list(dict.fromkeys(str(span["stage"]) for span in spans))
    shown = _thinned(spans, lanes, stages)
    end = max(float(span["end"]) for span in spans)
    unit, divisor = ("Hours", 3600.0) if end >= 7200 else ("Minutes", 60.0) if end > 600 else ("Seconds", 1.0)
    values = [
        {
            **{name: str(span[name]) for name in ("stage", "what", "lane")},
            "begin": span["begin"] / divisor,
            "end": span["end"] / divisor,
        }
        for span in spans
        if span["lane"] in shown
    ]
    bars = (
        alt.Chart(alt.Data(values=values))
        .mark_bar(height={"band": 0.8}, stroke="white", strokeWidth=0.5)
        .encode(
            x=alt.X("begin:Q", title=f"{unit} since the command", scale=alt.Scale(nice=False, zero=True)),
            x2="end:Q",
            y=alt.Y("lane:N", title=None, sort=shown),
            color=alt.Color(
                "stage:N", title=None, scale=alt.Scale(domain=stages, range=categories(len(stages))), legend=None
            ),
            opacity=alt.condition(
                alt.FieldOneOfPredicate(field="what", oneOf=STARTING), alt.value(0.45), alt.value(1.0)
            ),
            tooltip=[alt.Tooltip(f"{name}:N") for name in ("stage", "what", "begin", "end")],
        )
        .properties(width=PLOT_WIDTH, height={"step": 22})
    )
    left = len(lanes) - len(shown)
    words = f"{left:,} more workers are not drawn; of each stage the first are, and the one that ends last"
    return finish(alt.layer(bars), title, [subtitle, *([words] if left else [])])


def _thinned(spans: Sequence[Row], lanes: Sequence[str], stages: Sequence[str]) -> list[str]:
    if len(lanes) <= MOST_LANES:
        return list(lanes)
    each = max(1, MOST_LANES // len(stages))
    ends: dict[str, float] = {}
    for span in spans:
        ends[span["lane"]] = max(ends.get(span["lane"], 0.0), span["end"])
    shown: list[str] = []
    for stage in stages:
        own = [lane for lane in lanes if lane.startswith(f"{stage} ")]
        last = max(own, key=ends.__getitem__)
        first = own[:each]
        shown += first if last in first else [*own[: each - 1], last]
    return shown
