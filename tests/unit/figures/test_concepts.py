"""Heat maps of concepts against the rows they are drawn from."""

from __future__ import annotations

import random
from typing import Any

from midiscover import figures
from midiscover.figures.concepts import MOST_COLUMNS, first_features
from midiscover.palette import on_heat
from tests.unit.figures.test_contexts import size

CONCEPTS = ["emotions", "formal", "technical", "numbers", "questions"]


def concept_rows(layers: tuple[int, ...] = (10, 15), l1s: tuple[int, ...] = (1, 4), top: int = 10) -> list[dict]:
    draw = random.Random(0)
    return [
        {
            "sae_id": f"l{layer}.l1-{l1}.abc",
            "label": f"l{layer}.l1-{l1}",
            "hook": f"model.layers.{layer}.mlp",
            "layer": layer,
            "l1": float(l1),
            "sparsity_label": f"l1 {l1}",
            "concept": concept,
            "feature": feature,
            "auroc": draw.uniform(0.4, 1.0),
            "passes": draw.random() > 0.5,
        }
        for layer in layers
        for l1 in l1s
        for concept in CONCEPTS
        for feature in draw.sample(range(40), top)
    ]


def judged(chart: figures.Chart) -> dict[tuple[str, str], dict[str, Any]]:
    (rows,) = figures.data(chart).values()
    return {(row["concept"], row["feature"]): dict(row) for row in rows if row["auroc"] is not None}


def test_cells_hold_scores_and_passes() -> None:
    rows = concept_rows((10,), (1,), top=3)
    cells = judged(figures.concept_chart(rows))
    assert len(cells) == len(rows)
    for row in rows:
        cell = cells[row["concept"], str(row["feature"])]
        assert abs(cell["auroc"] - row["auroc"]) < 1e-4
        assert cell["passes"] == row["passes"]
        assert float(cell["auroc_text"]) == round(row["auroc"], 2)
        assert cell["ink"] == on_heat(max(0.0, 2 * row["auroc"] - 1))


def test_a_perfect_score_is_not_written_as_none() -> None:
    rows = [concept_rows()[0] | {"auroc": 1.0}]
    assert [cell["auroc_text"] for cell in judged(figures.concept_chart(rows)).values()] == ["1.0"]


def test_as_many_features_of_each_concept_as_fit() -> None:
    rows = concept_rows((10,), (1,))
    features = first_features(rows, CONCEPTS, MOST_COLUMNS)
    assert len(features) == len(set(features)) <= MOST_COLUMNS
    counts = []
    for concept in CONCEPTS:
        ranked = [r["feature"] for r in rows if r["concept"] == concept]
        counts.append(next((depth for depth, feature in enumerate(ranked) if feature not in features), len(ranked)))
    assert min(counts) >= MOST_COLUMNS // len(CONCEPTS) - 1
    assert len(first_features(rows, CONCEPTS, 3)) == 3
    assert first_features([], [], 3) == []


def test_a_map_per_sae_under_its_name() -> None:
    spec = figures.concept_chart(concept_rows()).to_dict()
    assert [part["title"]["text"] for part in spec["vconcat"]] == ["l10.l1-1", "l10.l1-4", "l15.l1-1", "l15.l1-4"]


def test_a_place_has_the_score_of_the_feature_that_ranks_first_not_the_best_of_many() -> None:
    rows = concept_rows((10, 15, 20), (1, 4))
    other_seed = [row | {"sae_id": f"{row['sae_id']} seed 1", "auroc": row["auroc"] / 2} for row in rows]
    for table, factor in ((rows, 1.0), ([*rows, *other_seed], 0.75)):
        cells = figures.data(figures.concept_map_chart(table))["scores"]
        assert len(cells) == 3 * 2 * len(CONCEPTS)
        for cell in cells:
            layer, l1 = int(cell["hook"].removeprefix("layer ")), cell["setting"]
            here = [r for r in rows if (r["layer"], r["sparsity_label"], r["concept"]) == (layer, l1, cell["concept"])]
            assert cell["auroc"] == float(f"{factor * here[0]['auroc']:.5g}")
            of_concept = [other["auroc"] for other in cells if other["concept"] == cell["concept"]]
            assert cell["best"] == (cell["auroc"] == max(of_concept))


def test_controls_are_in_no_cell_and_means_are_told() -> None:
    rows = concept_rows()
    controls = [row | {"sae_id": f"{row['sae_id']}.c", "control": "untrained", "auroc": 0.5} for row in rows]
    alone, beside = (figures.concept_map_chart(table) for table in (rows, [*rows, *controls]))
    assert beside.to_dict() == alone.to_dict()
    seeds = figures.concept_map_chart([*rows, *(row | {"control": "none"} for row in controls)])
    assert figures.data(seeds) != figures.data(alone)
    told = [any("Means" in line for line in chart.to_dict()["title"]["subtitle"]) for chart in (alone, seeds)]
    assert told == [False, True]


def test_small_large_and_empty_tables_draw() -> None:
    for chart in (
        figures.concept_chart([]),
        figures.concept_map_chart([]),
        figures.concept_chart(concept_rows()[:1]),
        figures.concept_map_chart(concept_rows()[:1]),
        figures.concept_chart([row | {"auroc": None} for row in concept_rows()]),
    ):
        assert figures.png(chart, scale=1).startswith(b"\x89PNG")
    assert size(figures.png(figures.concept_chart(concept_rows((10,), (1,))), scale=1))[0] <= 920
    assert size(figures.png(figures.concept_map_chart(concept_rows()), scale=1))[0] <= 900
