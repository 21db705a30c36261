"""What the frontier bench shows: a table, verdicts at common L0s, a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import altair as alt
from rich import box
from rich.table import Table

from midiscover import figures, tables
from midiscover.palette import HOOKS, THEME
from midiscover.scales import log_ticks, padded

Row = dict[str, Any]
OURS = "midiscover"


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error; the error of a single value is not known (NaN)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def fvu_at(points: Sequence[tuple[float, float]], l0: float) -> float:
    """FVU of a frontier of (L0, FVU) at an L0: the polynomial through all points in logarithms of both."""
    logs = list({math.log(a): math.log(b) for a, b in points}.items())  # once where two points share an L0
    at, value = math.log(l0), 0.0
    for i, (x, y) in enumerate(logs):
        others = [other for j, (other, _) in enumerate(logs) if j != i]
        value += y * math.prod((at - other) / (x - other) for other in others)
    return math.exp(value)


def sides_of(rows: Sequence[Row]) -> dict[tuple[str, str], dict[int, list[tuple[float, float]]]]:
    """(kind, side) -> seed -> (L0, FVU) in rising L0."""
    found: dict[tuple[str, str], dict[int, list[tuple[float, float]]]] = {}
    for row in sorted(rows, key=lambda row: row["l0"]):
        found.setdefault((row["kind"], row["side"]), {}).setdefault(row["seed"], []).append((row["l0"], row["fvu"]))
    return found


def verdicts(rows: Sequence[Row], targets: Sequence[float]) -> list[Row]:
    """Ours against each peer of the same kind, at the L0s of `targets` moved into the range that both sides cover.

    `errors`: the difference of log FVU, peer minus ours, in standard errors of that difference over the seeds; above 0
    we are better.
    """
    curves, found = sides_of(rows), []
    for kind, side in sorted(curves):
        ours = curves.get((kind, OURS))
        if side == OURS or ours is None:
            continue
        both = [*ours.values(), *curves[kind, side].values()]
        low, high = max(curve[0][0] for curve in both), min(curve[-1][0] for curve in both)
        if low > high:
            found.append({"kind": kind, "peer": side, "l0": None})
            continue
        for l0 in sorted({min(max(target, low), high) for target in targets}):
            values = [[fvu_at(curve, l0) for curve in of.values()] for of in (ours, curves[kind, side])]
            (mine, a), (theirs, b) = (mean_and_error([math.log(value) for value in side_of]) for side_of in values)
            error = math.hypot(a, b)
            found.append(
                {
                    "kind": kind,
                    "peer": side,
                    "l0": l0,
                    "fvu_ours": math.exp(mine),
                    "fvu_peer": math.exp(theirs),
                    "ratio": math.exp(mine - theirs),
                    "errors": (theirs - mine) / error if error > 0 else math.nan,
                }
            )
    return found


def show(rows: Sequence[Row], judged: Sequence[Row], title: str) -> None:
    """Print the table of all sides and that of the verdicts."""
    table = Table(
        "kind", "side", "settings", "lr", "k or l1", "L0", "FVU ± s.e.", "dead", "CE rec.", "s",
        title=title, box=box.SIMPLE_HEAD,
    )  # fmt: skip

    def key(row: Row) -> tuple[Any, ...]:
        return row["kind"], row["side"], -row["target"]

    for (kind, side, _), group in groupby(sorted(rows, key=key), key):
        of = list(group)
        fvu, error = mean_and_error([row["fvu"] for row in of])
        ce = [row["ce_recovered"] for row in of if row.get("ce_recovered") is not None]
        l0, dead, seconds = (statistics.fmean(row[name] for row in of) for name in ("l0", "dead_share", "seconds"))
        lr = f"{of[0]['lr']:.2g}{'*' if of[0]['lr_at_edge'] else ''}" if of[0]["lr"] else "recipe"
        table.add_row(
            kind, side, of[0]["variant"], lr, f"{of[0]['sparsity']:.3g}", f"{l0:.1f}",
            f"{fvu:.4f} ± {error:.4f}", f"{dead:.1%}", f"{statistics.fmean(ce):.1%}" if ce else "-", f"{seconds:.0f}",
        )  # fmt: skip
    tables.show(table)
    print("* the best of three learning rates was the lowest or the highest; s: seconds of one training")
    verdict = Table("kind", "against", "L0", "our FVU", "theirs", "ours / theirs", "", box=box.SIMPLE_HEAD)
    for row in judged:
        if row["l0"] is None:
            verdict.add_row(row["kind"], row["peer"], "-", "", "", "", "no L0 that both reach")
            continue
        word = "better" if row["ratio"] < 1 else "worse"
        errors = f"{word} by {abs(row['errors']):.1f} s.e." if math.isfinite(row["errors"]) else f"{word}, one seed"
        verdict.add_row(
            row["kind"], row["peer"], f"{row['l0']:.0f}", f"{row['fvu_ours']:.4f}", f"{row['fvu_peer']:.4f}",
            f"{row['ratio']:.3f}", errors,
        )  # fmt: skip
    tables.show(verdict)


def picture(rows: Sequence[Row], path: Path, title: str) -> None:
    """FVU against L0, a panel per kind and a colour per side; a line through the means, every seed a point."""
    sides = sorted({row["side"] for row in rows}, key=lambda side: (side != OURS, side))
    low, high = padded([row["l0"] for row in rows], 1.2)
    values = [{name: row[name] for name in ("kind", "side", "l0", "fvu", "target")} for row in rows]
    base = alt.Chart(alt.Data(values=values)).encode(
        color=alt.Color("side:N", title=None, scale=alt.Scale(domain=sides, range=list(HOOKS[: len(sides)])))
    )
    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    axis = alt.Axis(values=log_ticks(low, high), format="~r")
    y = alt.Scale(type="log", nice=False, domain=padded([row["fvu"] for row in rows], 1.08))
    points = base.mark_point(size=45, strokeWidth=1.5).encode(
        x=alt.X("l0:Q", title="L0 (features per token, log scale)", scale=scale, axis=axis),
        y=alt.Y("fvu:Q", title="FVU (log scale)", scale=y),
    )
    lines = (
        base.transform_aggregate(l0="mean(l0)", fvu="mean(fvu)", groupby=["kind", "side", "target"])
        .mark_line(strokeWidth=1.5)
        .encode(x=alt.X("l0:Q", scale=scale, axis=axis), y=alt.Y("fvu:Q", scale=y), order="l0:Q")
    )
    panel = alt.layer(lines, points).properties(width=320, height=320)
    chart = panel.facet(facet=alt.Facet("kind:N", title=None), columns=3).properties(title=title)
    figures.save_png(chart.configure(**THEME), path)
