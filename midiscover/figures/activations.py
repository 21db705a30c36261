"""One feature: how strongly it fires, and which tokens it promotes and suppresses.

A feature is a plain row with the columns of `features.parquet` (`features.records`); one that never fired has empty
histograms, and one whose output is not as wide as the residual stream no tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from midiscover.figures.contexts import CHARACTER, FONT_SIZE, cells, cut
from midiscover.figures.drawing import Chart, finish, thousands
from midiscover.palette import FONT_MONO, HOOKS, INK, INK_SOFT
from midiscover.scales import LOG_RATIO, log_ticks, rounded
from midiscover.summary import Row, fixed, percent
from midiscover.tokens import shown

QUANTILES = ("25%", "50%", "75%", "90%", "95%", "99%")
"""Names of the entries of a row's `quantiles`."""
LOGITS = 10
"""Tokens of each side."""
TOKEN_COLUMNS = 16
"""Characters of a token's name at most."""
PANEL_HEIGHT = 160
HISTOGRAM_WIDTH = 640
NO_LOGITS = "No tokens: its output is not in the residual stream"
NEVER = "It never fired on what was read"


def activation_chart(feature_row: Row, *, log: bool | None = None, of: str = "", name: str = "") -> Chart:
    """Histogram of a feature's activations where it fires; its firing rate and quantiles stand in the subtitle.

    log: whether counts have a log axis; None where the tallest bar is more than LOG_RATIO times the lowest.
    of, name: the SAE, and what the feature is called, for the title.
    """
    title = f"Activations of {_called(feature_row, of, name)}"
    if not feature_row["count"]:
        return finish(blank(NEVER, 400), title, [])
    chart = activation_panel(feature_row, log=log, width=HISTOGRAM_WIDTH, height=240)
    return finish(chart, title, [fires_on(feature_row), quantiles(feature_row)])


def logit_chart(feature_row: Row, *, of: str = "", name: str = "") -> Chart:
    """The tokens that a feature promotes and suppresses most, with the logits that one unit of it adds.

    of, name: the SAE, and what the feature is called, for the title.
    """
    title = f"Logits of {_called(feature_row, of, name)}"
    if not feature_row["pos_tokens"]:
        return finish(blank(NO_LOGITS, 400), title, [])
    chart = alt.hconcat(*logit_panels(feature_row, bar=150), spacing=36)
    return finish(chart, title, ["Decoder direction times unembedding, per unit of activation"])


def _called(feature_row: Row, of: str, name: str) -> str:
    index = feature_row["index"]
    return f"{name or f'feature {index}'}{f' of {of}' if of else ''}"


def fires_on(row: Row) -> str:
    """Firing rate, mean and maximum in words."""
    if not row["count"]:
        return NEVER
    rate = percent(row["firing_rate"], 3)
    return f"Fires on {rate} of tokens ({fixed(row['count'], 0)}), mean {row['mean']:.2f}, max {row['max']:.2f}"


def quantiles(row: Row) -> str:
    """The quantiles of the activations, in words; empty for a feature that never fired."""
    if not row["count"]:
        return ""
    pairs = zip(QUANTILES, row["quantiles"], strict=True)
    return "Quantiles where it fires: " + ", ".join(f"{name} {value:.2f}" for name, value in pairs)


def activation_panel(
    row: Row, *, log: bool | None, width: int, height: int = PANEL_HEIGHT, name: str = ""
) -> alt.LayerChart | alt.FacetChart:
    """The histogram of a feature that fires, without title and theme, to stand among others.

    name: goes before the name of its table.
    """
    heights, centres = row["hist_heights"], row["hist_values"]
    # Equal bins from 0 on, so the first is as wide as twice its centre.
    half = centres[0]
    values = [
        {"low": rounded(centre - half), "high": rounded(centre + half), "count": count}
        for centre, count in zip(centres, heights, strict=True)
        if count
    ]
    counts = [value["count"] for value in values]
    log = max(counts) > LOG_RATIO * min(counts) if log is None else log
    # On a log axis a bar begins below 1, so that a single token has one that is seen.
    base = 0.5 if log else 0
    x = alt.X(
        "low:Q",
        title="Activation",
        scale=alt.Scale(domain=[0, rounded(centres[-1] + half)], nice=False),
        axis=alt.Axis(grid=False, tickCount=6),
    )
    y = alt.Y(
        "count:Q",
        title="Tokens (log scale)" if log else "Tokens",
        scale=alt.Scale(type="log", domain=[base, 1.3 * max(counts)], nice=False) if log else alt.Scale(),
        axis=alt.Axis(values=_count_ticks(max(counts)), format="~s") if log else thousands(4),
    )
    bars = (
        alt.Chart()
        .mark_bar(color=HOOKS[0], binSpacing=0.5 if width > 4 * len(heights) else 0)
        .encode(x=x, x2="high:Q", y=y, y2=alt.datum(base))
        .encode(tooltip=[alt.Tooltip("low:Q"), alt.Tooltip("high:Q"), alt.Tooltip("count:Q", format=",")])
    )
    table = alt.InlineData(values=values, name=f"{name}activations")
    return alt.layer(bars, data=table).properties(width=width, height=height)


def _count_ticks(highest: int) -> list[float]:
    """Of a log axis: 1, 2, 5, 10, ... where there is room for all of them, else the powers of ten."""
    ticks = log_ticks(1, 1.3 * highest)
    return ticks if len(ticks) <= 8 else [tick for tick in ticks if math.log10(tick).is_integer()]


def panel_width(tokens: Sequence[str], bar: int) -> int:
    """Pixels of a panel of logits with these tokens."""
    return round(_room(tokens) + bar)


def _room(tokens: Sequence[str]) -> float:
    return max(cells(token_label(token)) for token in tokens) * CHARACTER + 8


def logit_panels(row: Row, *, bar: int, name: str = "") -> list[alt.LayerChart | alt.FacetChart]:
    """Two panels of bars, promoted and suppressed tokens; none where the row has no tokens. bar: pixels at most."""
    sides = (("pos", "Promotes", HOOKS[0]), ("neg", "Suppresses", HOOKS[1]))
    panels = []
    for side, title, colour in sides:
        tokens, logits = row[f"{side}_tokens"][:LOGITS], row[f"{side}_values"][:LOGITS]
        if tokens:
            values = _bars(tokens, logits)
            panels.append(_logit_panel(values, title, colour, bar=bar, name=f"{name}{title.lower()}"))
    return panels


def _bars(tokens: Sequence[str], logits: Sequence[float]) -> list[dict[str, Any]]:
    return [
        {
            "rank": rank,
            "token": token,
            "label": token_label(token),
            "logit": rounded(logit),
            "size": rounded(abs(logit)),
            "logit_text": f"{logit:+.2f}",
        }
        for rank, (token, logit) in enumerate(zip(tokens, logits, strict=True))
    ]


def token_label(token: str, columns: int = TOKEN_COLUMNS) -> str:
    """A token between quotes, so that its spaces are seen; what is longer is cut."""
    return "'" + cut(shown(token), columns).replace(" ", "\N{NO-BREAK SPACE}") + "'"


def _logit_panel(
    values: Sequence[dict[str, Any]], title: str, colour: str, *, bar: int, name: str
) -> alt.LayerChart | alt.FacetChart:
    room = _room([value["token"] for value in values])
    largest = max(value["size"] for value in values) or 1.0
    # The names stand inside the plot, left of 0, so that panels are as wide as they say.
    scale = alt.Scale(domain=[rounded(-largest * room / bar), largest], nice=False)
    base = alt.Chart().encode(
        y=alt.Y("rank:O", axis=None, scale=alt.Scale(paddingInner=0.25)),
        tooltip=[alt.Tooltip("token:N"), alt.Tooltip("logit:Q")],
    )
    x = alt.X("size:Q", scale=scale, axis=None)
    bars = base.mark_bar(color=colour).encode(x=x, x2=alt.datum(0))
    labels = base.mark_text(align="right", dx=-6, font=FONT_MONO, fontSize=FONT_SIZE, color=INK).encode(
        x=alt.datum(0, scale=scale, axis=None), text="label:N"
    )
    numbers = base.mark_text(align="left", dx=4, fontSize=10, color=INK_SOFT).encode(x=x, text="logit_text:N")
    heading = alt.TitleParams(title, fontSize=12, offset=6, anchor="start")
    return alt.layer(bars, labels, numbers, data=alt.InlineData(values=values, name=name)).properties(
        width=panel_width([value["token"] for value in values], bar), height=PANEL_HEIGHT, title=heading
    )


def blank(words: str, width: int, height: int = 40) -> alt.LayerChart | alt.FacetChart:
    """A panel that says why there is nothing to draw."""
    text = alt.Chart(alt.InlineData(values=[{"note": words}])).mark_text(align="left", color=INK_SOFT)
    return alt.layer(text.encode(text="note:N", x=alt.value(0))).properties(width=width, height=height)
