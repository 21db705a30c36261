"""SAEs that differ in more than a seed are averaged nowhere, and tables and charts say what they differ in."""

from __future__ import annotations

import io
from typing import Any

import pytest

from midiscover import figures, tables
from midiscover.summary import columns, families
from tests.unit.grid_tables import sae_row
from tests.unit.test_figures import drawn_points, parts

FVU = {"lr 0.001": 0.2, "lr 0.003": 0.6}
"""Of each variant, whatever the hook and the seed; its dead share as well."""


def rows_of(layers: tuple[int, ...] = (10, 15)) -> list[dict[str, Any]]:
    return [
        sae_row(layer, "standard", "l1", 5.0, seed)
        | {"sae_id": f"l{layer}.{variant[-3:]}.{seed}", "variant": variant, "fvu": fvu, "dead_share": fvu, "l0": 100.0}
        for layer in layers
        for variant, fvu in FVU.items()
        for seed in (0, 1)
    ]


def transcoders() -> list[dict[str, Any]]:
    """Two outputs of each of two inputs, all else equal."""
    return [
        sae_row(layer, "standard", "l1", 5.0, 0)
        | {"sae_id": f"{layer} to {output}", "kind": "transcoder", "fvu": fvu}
        | {"output_hook": f"model.layers.{output}.mlp.down_proj"}
        for layer in (10, 15)
        for output, fvu in ((16, 0.2), (17, 0.8))
    ]


def printed(renderable: Any) -> str:
    file = io.StringIO()
    tables.show(renderable, file)
    return file.getvalue()


@pytest.mark.parametrize("rows", [rows_of(), transcoders()], ids=["variants", "outputs"])
def test_maps_keep_apart_what_differs_in_more_than_a_seed(rows: list[dict[str, Any]]) -> None:
    cells = drawn_points(figures.map_chart(rows))
    assert {(cell["path"], cell["group"]): cell["fvu"] for cell in cells} == {
        (row["hook"], family): row["fvu"] for row, family in zip(rows, families(rows), strict=True)
    }
    assert len(cells) == 4
    words = printed(tables.layer_map(rows, "fvu")).split()
    assert [word for word in words if word.startswith("0.") and len(word) == 5 and word[-2:] == "00"] == [
        f"{fvu:.3f}" for fvu in sorted({row["fvu"] for row in rows}) for _ in range(2)
    ]


def test_a_family_names_what_differs_and_nothing_else() -> None:
    rows = rows_of((10,))
    assert families(rows) == ["lr 0.001", "lr 0.001", "lr 0.003", "lr 0.003"]
    assert families(rows, kinds=True)[0] == "standard, lr 0.001"
    assert families([rows[0], rows[2] | {"d_sae": 9216, "kind": "topk"}]) == [
        "standard 4,608, lr 0.001",
        "topk 9,216, lr 0.003",
    ]
    assert families([row | {"variant": ""} for row in rows]) == [""] * 4
    assert families(transcoders()) == ["to layer 16", "to layer 17"] * 2


def test_tables_have_a_column_of_what_else_differs() -> None:
    assert "other settings" in [column.title for column in columns(rows_of())]
    assert "other settings" not in [column.title for column in columns([row | {"variant": ""} for row in rows_of()])]
    for table in (tables.sweep_table(rows_of()), tables.compare_table(rows_of())):
        assert printed(table).count("lr 0.003") == 4


@pytest.mark.parametrize(("layers", "by"), [((10, 15), "layer"), ((10,), "lr")])
def test_each_variant_has_a_line_and_a_look_of_its_own(layers: tuple[int, ...], by: str) -> None:
    chart = figures.frontier_chart(rows_of(layers))
    points = drawn_points(chart)
    assert len({point["line"] for point in points}) == 2 * len(layers)
    assert all(len({point["fvu"] for point in points if point["line"] == line["line"]}) == 1 for line in points)
    assert all(point["colour"].startswith(by) for point in points)
    dashed = [part["strokeDash"]["scale"]["domain"] for part in parts(chart.to_dict()) if "strokeDash" in part]
    assert dashed == ([list(FVU)] if by == "layer" else [])


def test_bars_and_firing_rates_are_means_of_seeds_only() -> None:
    bars = drawn_points(figures.share_chart(rows_of()))
    assert {bar["hook"]: bar["dead"] for bar in bars} == {
        f"layer {layer}, {variant}": fvu for layer in (10, 15) for variant, fvu in FVU.items()
    }
    bins = [
        row | {"label": "l1 5", "log10_low": low, "log10_high": low + 1, "count": 10}
        for row in rows_of()
        for low in [-2.0 if row["variant"] == "lr 0.001" else -4.0]
    ]
    boxes = drawn_points(figures.layer_density_chart(bins))
    assert {(box["panel"], box["q50"]) for box in boxes} == {("standard, lr 0.001", -1.5), ("standard, lr 0.003", -3.5)}
