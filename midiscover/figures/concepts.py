"""Which features stand for which concept, and which layer and sparsity carries a concept best."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from midiscover.figures.drawing import PLOT_WIDTH, Chart, finish, of
from midiscover.frontier import is_control
from midiscover.palette import GRID, HEAT, HOOKS, INK, INK_SOFT, on_heat
from midiscover.scales import rounded
from midiscover.summary import Row, hook_names, in_order, is_missing, natural_key

CHANCE = 0.5
"""AUROC of a feature that knows nothing; the palest colour."""
CELL_WIDTH, CELL_HEIGHT = 26, 22
MOST_COLUMNS = 30
"""Features of one SAE at most, which fit into 900 pixels."""
MAP_COLUMNS, MAP_GAP = 5, 14
HELD_OUT = "AUROC on texts that the ranking did not see: 0.5 knows nothing, 1 tells the concept from its controls"
OUTLINED = "Outlined: beyond the best that shuffled labels give"
MIN_MAP = 110
"""Pixels of a small map's width at least."""
TEXT_ROOM = 22
"""Pixels that a cell needs for its number."""


def concept_chart(rows: Sequence[Row]) -> Chart:
    """Heat maps of AUROC, a map per SAE: concepts down, features across; what passes is outlined.

    rows: `sae_id, concept, feature, auroc, passes` of each pair that was judged, and `label`, the name of the SAE. A
    feature may stand for several concepts. Of an SAE's features the first of each concept are drawn, as many of each as
    fit, so rows come in the order of a ranking that did not see the texts of their AUROC: the best of many scores on
    the same texts would promise too much. A pair that was not judged is an empty cell.
    """
    rows = [row for row in rows if not is_missing(row.get("auroc"))]
    concepts = list(dict.fromkeys(str(row["concept"]) for row in rows))
    saes = list(dict.fromkeys(str(row["sae_id"]) for row in rows))
    maps = []
    for place, sae in enumerate(saes):
        own = [row for row in rows if str(row["sae_id"]) == sae]
        features = first_features(own, concepts, MOST_COLUMNS)
        values = _pairs(own, concepts, features)
        title = str(own[0].get("label") or sae) if len(saes) > 1 else ""
        maps.append(_concept_map(values, concepts, features, title, name=f"{place + 1} scores"))
    if not maps:
        maps = [_concept_map([], [], [], "", name="scores")]
    chart = alt.vconcat(*maps, spacing=18) if len(maps) > 1 else maps[0]
    one = str(rows[0].get("label") or saes[0]) if len(saes) == 1 else ""
    return finish(chart, "Concepts and features", [one, HELD_OUT, OUTLINED])


def first_features(rows: Sequence[Row], concepts: Sequence[str], most: int) -> list[int]:
    """The first features of each concept, equally many of each, in the order of the concepts; `most` at most."""
    by_concept = {concept: [row["feature"] for row in rows if str(row["concept"]) == concept] for concept in concepts}
    deepest = max((len(found) for found in by_concept.values()), default=0)
    taken: set[int] = set()
    for depth in range(deepest):
        more = {found[depth] for found in by_concept.values() if depth < len(found)}
        if len(taken | more) > most and taken:
            break
        taken |= more
    return list(dict.fromkeys(feature for found in by_concept.values() for feature in found if feature in taken))[:most]


def concept_map_chart(rows: Sequence[Row]) -> Chart:
    """A small map per concept: hooks down, sparsity settings across, the AUROC of the feature that ranks first there.

    rows: as for `concept_chart`, with `hook, layer, sparsity_label` as well; of an SAE and concept the first counts.
    SAEs that share hook and setting (seeds, architectures) are drawn as their mean, controls are left out. The best
    place is outlined.
    """
    firsts: dict[tuple[str, str], Row] = {}
    for row in rows:
        firsts.setdefault((str(row.get("sae_id")), str(row["concept"])), row)
    rows = [row for row in in_order(list(firsts.values())) if not is_missing(row.get("auroc")) and not is_control(row)]
    names = hook_names([str(row["hook"]) for row in rows])
    concepts = sorted({str(row["concept"]) for row in rows})
    settings = sorted({str(row.get("sparsity_label") or "-") for row in rows}, key=natural_key)
    values = _places(rows, names.short)
    means = (
        "Means over SAEs of the same hook and setting: seeds, architectures, widths" if len(values) < len(rows) else ""
    )
    columns = max(1, min(MAP_COLUMNS, len(concepts)))
    width = max(MIN_MAP, (PLOT_WIDTH + 40 - MAP_GAP * (columns - 1)) // columns)
    cell = width / max(1, len(settings))
    flat = cell >= 7 * max(map(len, settings), default=0)
    x = alt.X("setting:N", sort=settings, title=None, axis=_bare(angle=0 if flat else -45))
    y = alt.Y("hook:N", sort=list(names.short.values()), title=None, axis=_bare(labels=len(names.short) > 1))
    layers = _cells(x, y, text=cell >= TEXT_ROOM, outline="best")
    facet = alt.Facet("concept:N", sort=concepts, header=alt.Header(title=None, labelPadding=4, labelAnchor="start"))
    size = {"width": width, "height": CELL_HEIGHT * max(1, len(names.short))}
    chart = (
        alt.layer(*layers, data=alt.InlineData(values=values, name="scores"))
        .properties(**size)
        .facet(facet=facet, columns=columns, spacing=MAP_GAP)
        .resolve_axis(x="independent" if len(concepts) > columns else "shared")
    )
    subtitle = [
        of(names.pattern),
        HELD_OUT,
        "Of the feature that ranks first in each SAE; outlined: the best place of a concept",
        means,
    ]
    return finish(chart, "Where concepts are carried", subtitle)


def _places(rows: Sequence[Row], short: Mapping[str, str]) -> list[dict[str, Any]]:
    members: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        place = (str(row["concept"]), str(row["hook"]), str(row.get("sparsity_label") or "-"))
        members.setdefault(place, []).append(row)
    means = {place: sum(row["auroc"] for row in found) / len(found) for place, found in members.items()}
    highest = {concept: max(mean for (c, _, _), mean in means.items() if c == concept) for concept, _, _ in means}
    return [
        {
            "concept": concept,
            "hook": short[hook],
            "setting": setting,
            "feature": ", ".join(str(row.get("feature")) for row in found),
            "passes": all(row.get("passes") for row in found),
            "best": means[concept, hook, setting] == highest[concept],
            **_score(means[concept, hook, setting]),
        }
        for (concept, hook, setting), found in members.items()
    ]


def _pairs(rows: Sequence[Row], concepts: Sequence[str], features: Sequence[int]) -> list[dict[str, Any]]:
    """A mapping per cell; those that were not judged have None for their score."""
    judged = {(str(row["concept"]), row["feature"]): row for row in rows}
    blank = {"passes": False, "auroc": None, "auroc_text": "", "ink": INK}
    values = []
    for concept, feature in itertools.product(concepts, features):
        row = judged.get((concept, feature))
        score = blank if row is None else {"passes": bool(row.get("passes")), **_score(row["auroc"])}
        values.append({"concept": concept, "feature": str(feature), **score})
    return values


def _score(auroc: float) -> dict[str, Any]:
    position = min(1.0, max(0.0, (auroc - CHANCE) / (1 - CHANCE)))
    return {
        "auroc": rounded(auroc),
        "auroc_text": "1.0" if auroc >= 0.995 else f"{auroc:.2f}"[1:],
        "ink": on_heat(position),
    }


def _concept_map(
    values: Sequence[Mapping[str, Any]], concepts: Sequence[str], features: Sequence[int], title: str, *, name: str
) -> alt.LayerChart | alt.FacetChart:
    x = alt.X("feature:N", sort=[str(feature) for feature in features], title="Feature", axis=_bare(angle=-45))
    y = alt.Y("concept:N", sort=list(concepts), title=None, axis=_bare())
    layers = _cells(x, y, text=True, outline="passes")
    data = alt.InlineData(values=list(values), name=name)
    chart = alt.layer(*layers, data=data).properties(
        width=max(1, len(features)) * CELL_WIDTH, height=max(1, len(concepts)) * CELL_HEIGHT
    )
    return chart.properties(title=alt.TitleParams(title, fontSize=12, offset=6)) if title else chart


def _cells(x: alt.X, y: alt.Y, *, text: bool, outline: str) -> list[alt.Chart]:
    tooltip = [alt.Tooltip(f"{key}:N") for key in ("concept", "feature", "passes")] + [alt.Tooltip("auroc:Q")]
    scale = alt.Scale(domain=[CHANCE, 1], range=list(HEAT), clamp=True, nice=False, interpolate="rgb")
    base = alt.Chart().encode(x=x, y=y, tooltip=tooltip)
    colour = alt.Color("auroc:Q", scale=scale, legend=None)
    judged = base.transform_filter("isValid(datum.auroc)").mark_rect(stroke=GRID, strokeWidth=0.5)
    layers = [base.mark_rect(fillOpacity=0, stroke=GRID, strokeWidth=0.5), judged.encode(color=colour)]
    if text:
        layers.append(base.mark_text(fontSize=10, color=alt.expr("datum.ink")).encode(text="auroc_text:N"))
    marked = base.transform_filter(f"datum.{outline}")
    layers.append(marked.mark_rect(fillOpacity=0, stroke=HOOKS[1], strokeWidth=1.6))
    return layers


def _bare(*, angle: float = 0, labels: bool = True) -> alt.Axis:
    return alt.Axis(
        ticks=False, domain=False, labelAngle=angle, labels=labels, labelColor=INK_SOFT, grid=False, labelOverlap=False
    )
