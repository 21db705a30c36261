"""Training curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import altair as alt

from midiscover.figures.drawing import (
    Chart,
    colouring,
    control,
    control_dash,
    finish,
    in_layer_order,
    labels_of,
    of,
    panel,
    panel_columns,
    setting_colour,
    several,
    thousands,
    wrapped,
)
from midiscover.scales import log_ticks, padded, rounded, thinned, wants_log
from midiscover.summary import Row, hook_names

Measure = Literal["loss", "mse", "l0", "fvu"]
MEASURES: dict[Measure, str] = {
    "loss": "Loss (per token, normalised inputs)",
    "mse": "Squared error (per token, normalised inputs)",
    "l0": "L0 (features per token)",
    "fvu": "FVU (fraction of variance unexplained)",
}
"""The measures of a training curve, and their axis titles."""
CURVE_POINTS = 6_000
"""Points of all training curves together; longer ones are thinned, which cannot be seen at 200 pixels a panel."""


def curve_chart(curves: Sequence[Row], measure: Measure = "loss", *, numbered: bool = False) -> Chart:
    """A training curve of every SAE, a panel per hook, coloured by architecture or, of one, by the sparsity setting.

    Those of controls are dashed. numbered: SAEs have numbers in the data, as their ids would be a third of a report.
    """
    names = hook_names(in_layer_order(curves))
    labels = labels_of(curves)
    numbers: dict[Any, int] = {}
    kinds = several(curves, "kind")
    values = [
        {
            "hook": names.short[str(row["hook"])],
            "sae": numbers.setdefault(row["sae_id"], len(numbers)) if numbered else row["sae_id"],
            "label": str(row["label"]),
            "kind": str(row.get("kind")),
            "control": control(row),
            "tokens": row["tokens"],
            **{key: rounded(row.get(key)) for key in MEASURES},
        }
        for row in thinned(curves, CURVE_POINTS)
    ]
    known = [value[measure] for value in values if value[measure] is not None]
    log = wants_log(known)
    y = alt.Y(
        f"{measure}:Q",
        title=MEASURES[measure],
        scale=alt.Scale(type="log", nice=False, domain=padded(known, 1.08)) if log else alt.Scale(zero=True),
        axis=alt.Axis(values=log_ticks(*padded(known, 1.08)), format="~r") if log else alt.Axis(),
    )
    colours = colouring(curves, names)
    by_kind = alt.Color("kind:N", title=None, scale=colours.scale(), legend=colours.legend())
    lines = (
        alt.Chart(alt.Data(values=values))
        .mark_line(strokeWidth=1.5)
        .encode(
            x=alt.X("tokens:Q", title="Training tokens", scale=alt.Scale(nice=False), axis=thousands(4)),
            y=y,
            color=by_kind if kinds else setting_colour(labels),
            strokeDash=control_dash(value["control"] for value in values),
            detail="sae:N",
            tooltip=[alt.Tooltip(f"{key}:N") for key in ("kind", "label", "control")],
        )
        .properties(width=panel(panel_columns(len(names.short)), gap=20), height=210)
    )
    return finish(wrapped(lines, names.short, gap=20), "Training curves", [of(names.pattern)])
