"""Charts: that they hold the table, are legible to more people than their author, and do not depend on the run."""

from __future__ import annotations

import itertools
import json
import math
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from midiscover import figures, palette
from midiscover.figures import curve_chart, density_chart, frontier_chart, share_chart, training
from midiscover.figures.features import quantile
from midiscover.figures.grid import AXIS_NAMES
from midiscover.scales import log_ticks
from tests.unit.grid_tables import grid_tables, sae_row, stability_rows
from tests.unit.plain_tables import plain_tables


def all_charts() -> dict[str, figures.Chart]:
    rows, curves, densities = plain_tables()
    return {
        "frontier": frontier_chart(rows),
        "loss": curve_chart(curves, "loss"),
        "l0": curve_chart(curves, "l0"),
        "density": density_chart(densities),
        "shares": share_chart(rows),
    } | whole_charts()


def whole_charts() -> dict[str, figures.Chart]:
    """Of a sweep over everything: architectures, seeds, controls, foreign text."""
    rows, curves, densities = grid_tables()
    return {
        "whole frontier": frontier_chart(rows),
        "whole loss": curve_chart(curves, "loss"),
        "whole density": density_chart(densities),
        "whole shares": share_chart(rows),
        "layer density": figures.layer_density_chart(densities),
        "map": figures.map_chart(rows),
        "foreign": figures.foreign_chart(rows),
        "stability": figures.stability_chart(stability_rows(rows)),
    }


NEW = ["whole frontier", "layer density", "map", "foreign", "stability"]


def parts(spec: Any) -> list[dict[str, Any]]:
    """Every mapping inside a specification, the data apart."""
    if isinstance(spec, list):
        return [found for item in spec for found in parts(item)]
    if not isinstance(spec, dict):
        return []
    return [spec, *(found for key, value in spec.items() if key not in ("data", "config") for found in parts(value))]


def test_equal_tables_give_equal_json_in_this_process_and_in_another() -> None:
    first = {name: chart.to_json() for name, chart in all_charts().items()}
    assert {name: chart.to_json() for name, chart in all_charts().items()} == first
    code = (
        "import json; from tests.unit.test_figures import all_charts; "
        "print(json.dumps({name: chart.to_json() for name, chart in all_charts().items()}))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(other.stdout) == first


def test_import_loads_neither_torch_nor_pandas() -> None:
    code = (
        "import sys, midiscover.figures, midiscover.report, midiscover.tables; "
        "print({'torch', 'pandas', 'ray'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize("name", ["frontier", "loss", "l0", "density", "shares", *NEW])
def test_axes_have_titles_and_nothing_is_fetched(name: str) -> None:
    spec = all_charts()[name].to_dict()
    axes = [part[axis] for part in parts(spec) for axis in ("x", "y") if "field" in str(part.get(axis, ""))]
    assert axes
    # A category axis needs no title: its labels are names.
    assert all(axis.get("title") for axis in axes if axis["type"] == "quantitative" and name != "layer density")
    assert not any("url" in part for part in parts(spec))
    assert list(spec["data"]) == ["values"]


def test_frontier_holds_every_measured_sae_and_marks_the_beaten() -> None:
    rows, _, _ = plain_tables()
    rows[0] = rows[0] | {"l0": None, "fvu": None}
    beaten = rows[1] | {"sae_id": "beaten", "fvu": rows[1]["fvu"] + 0.1, "ce_recovered": None}
    spec = frontier_chart([*rows, beaten]).to_dict()
    points = {value["sae"]: value for value in spec["data"]["values"]}
    assert set(points) == {row["sae_id"] for row in rows[1:]} | {"beaten"}
    assert [name for name, point in points.items() if not point["frontier"]] == ["beaten"]
    assert points["beaten"]["ce_text"] == "-"
    assert any("Hollow" in line for line in spec["title"]["subtitle"])
    (low, high) = next(part["x"]["scale"]["domain"] for part in parts(spec) if "domain" in str(part.get("x", "")))
    assert all(low < point["l0"] < high for point in points.values())


def test_notes_name_each_setting_at_most_once_and_never_touch() -> None:
    rows, _, _ = plain_tables(layers=range(12))
    notes = [value["note"] for value in frontier_chart(rows).to_dict()["data"]["values"] if value["note"]]
    assert len(notes) == len(set(notes)) > 0
    same_place = [rows[0] | {"sparsity_label": f"l1 {i}", "fvu": 0.5 + i * 1e-4} for i in range(4)]
    notes = [value["note"] for value in frontier_chart([*same_place, rows[-1]]).to_dict()["data"]["values"]]
    assert sorted(notes) == ["", "", "", "l1 20", "l1 3"]


def test_long_curves_are_thinned_and_keep_their_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "CURVE_POINTS", 100)
    curve = [
        {
            "sae_id": sae,
            "hook": "h",
            "label": "l1 3",
            "step": i,
            "tokens": i,
            "loss": 1 / (i + 1),
            "mse": None,
            "l0": float("nan"),
            "fvu": 1.0,
        }
        for sae in ("a", "b")
        for i in range(2000)
    ]
    values = curve_chart(curve).to_dict()["data"]["values"]
    assert len(values) <= training.CURVE_POINTS + 4
    for sae in ("a", "b"):
        tokens = [value["tokens"] for value in values if value["sae"] == sae]
        assert (tokens[0], tokens[-1]) == (0, 1999)
    assert {(value["mse"], value["l0"]) for value in values} == {(None, None)}
    numbered = drawn_points(curve_chart(curve, numbered=True))
    assert numbered == [value | {"sae": "ab".index(value["sae"])} for value in values]


@pytest.mark.parametrize(("values", "kind"), [([1.0, 10.0], None), ([1.0, 100.0], "log"), ([0.0, 100.0], None)])
def test_log_axis_only_where_it_helps(values: list[float], kind: str | None) -> None:
    curve = [
        {
            "sae_id": "a",
            "hook": "h",
            "label": "l1 3",
            "step": i,
            "tokens": i,
            "loss": value,
            "mse": 1.0,
            "l0": 1.0,
            "fvu": 1.0,
        }
        for i, value in enumerate(values)
    ]
    scale = next(
        part["y"]["scale"] for part in parts(curve_chart(curve).to_dict()) if "field" in str(part.get("y", ""))
    )
    assert scale.get("type") == kind


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (18, 190, [20, 30, 50, 70, 100]),
        (0.9, 150, [1, 2, 5, 10, 20, 50, 100]),
        (1e-3, 1e3, [10.0**i for i in range(-3, 4)]),
    ],
)
def test_log_ticks_are_round_and_few(low: float, high: float, ticks: list[float]) -> None:
    assert log_ticks(low, high) == ticks


def test_empty_and_single_tables_draw() -> None:
    rows, curves, densities = plain_tables(layers=[15], l1s=[5])
    unmeasured = [row | {"l0": None, "fvu": None, "dead_share": None, "inactive_share": None} for row in rows]
    for chart in (frontier_chart(rows), curve_chart(curves), density_chart(densities), share_chart(rows)):
        assert figures.png(chart, scale=1).startswith(b"\x89PNG")
    for chart in (
        frontier_chart([]),
        frontier_chart(unmeasured),
        share_chart(unmeasured),
        curve_chart([]),
        density_chart([]),
        figures.layer_density_chart([]),
        figures.map_chart([]),
        figures.map_chart(unmeasured),
        figures.foreign_chart([]),
        figures.stability_chart([]),
    ):
        assert figures.svg(chart).startswith("<svg")


def drawn_points(chart: figures.Chart) -> list[dict[str, Any]]:
    return chart.to_dict()["data"]["values"]


def test_a_frontier_of_several_architectures_is_coloured_by_them_in_a_panel_per_hook() -> None:
    rows, _, _ = grid_tables()
    spec = frontier_chart(rows).to_dict()
    assert spec["facet"]["sort"] == ["layer 10", "layer 15", "layer 20"]
    assert {point["colour"] for point in spec["data"]["values"]} == {"standard", "gated", "topk", "batchtopk"}
    one_kind = frontier_chart([row for row in rows if row["kind"] == "topk"]).to_dict()
    assert "facet" not in one_kind
    assert {point["colour"] for point in one_kind["data"]["values"]} == {"layer 10", "layer 15", "layer 20"}
    widths = [row | {"d_sae": row["d_sae"] * (1 + row["seed"])} for row in rows if row["kind"] == "topk"]
    one_hook = [row for row in widths if row["layer"] == 10 and row["control"] == "none"]
    assert {point["colour"] for point in drawn_points(frontier_chart(one_hook))} == {"4,608 features", "9,216 features"}
    assert any("strokeDash" in part for part in parts(frontier_chart(widths).to_dict()))


def test_lines_go_through_the_mean_of_seeds_and_through_no_control() -> None:
    """Read back from the SVG: the corners of the line of two seeds lie where their means do."""
    rows, _, _ = grid_tables()
    rows = [row for row in rows if (row["layer"], row["kind"]) == (10, "topk")]
    spec = frontier_chart(rows).to_dict()
    lines = next(layer for layer in spec["layer"] if layer["name"] == "lines")
    scales = [lines["encoding"][axis]["scale"]["domain"] for axis in ("x", "y")]
    path = next(
        part
        for part in re.findall(
            r'aria-roledescription="line mark" d="([^"]+)"|d="(M[^"]+L[^"]+)"', figures.svg(frontier_chart(rows))
        )
    )
    corners = [tuple(map(float, corner.split(","))) for corner in re.split("[ML]", "".join(path)) if corner]
    means = []
    for k in (16, 48, 128):
        seeds = [row for row in rows if row["k"] == k and row["control"] == "none"]
        assert len(seeds) == 2
        means.append((sum(row["l0"] for row in seeds) / 2, sum(row["fvu"] for row in seeds) / 2))
    (low, high), (bottom, top) = scales
    expected = [
        (640 * math.log(l0 / low) / math.log(high / low), 380 * (1 - (fvu - bottom) / (top - bottom)))
        for l0, fvu in means
    ]
    np.testing.assert_allclose(corners, expected, atol=0.05)


def test_controls_have_shapes_and_leave_room_for_the_frontier() -> None:
    rows, _, _ = grid_tables()
    spec = frontier_chart(rows).to_dict()
    untrained = [point for point in spec["data"]["values"] if point["control"] == "untrained"]
    assert untrained
    assert not any(point["frontier"] for point in untrained)
    shape = next(part["shape"] for part in parts(spec) if "shape" in part)
    assert shape["scale"]["domain"] == ["trained", "untrained", "frozen_decoder", "random_model", "neurons"]
    (_, high), (_, top) = (
        next(part[axis]["scale"]["domain"] for part in parts(spec) if "domain" in str(part.get(axis))) for axis in "xy"
    )
    assert max(row["l0"] for row in rows if row["control"] == "none") < high < 2304
    assert max(row["fvu"] for row in rows if row["control"] == "none") < top < 1
    plain = frontier_chart([row for row in rows if row["control"] == "none"]).to_dict()
    assert next(part["shape"] for part in parts(plain) if "shape" in part)["legend"] is None


def test_map_cells_are_means_of_seeds_with_legible_numbers() -> None:
    rows, _, _ = grid_tables()
    cells = drawn_points(figures.map_chart(rows))
    assert len(cells) == 3 * 4 * 3
    for cell in cells:
        seeds = [
            row
            for row in rows
            if (row["hook"], row["kind"], row["sparsity_label"]) == (cell["path"], cell["group"], cell["setting"])
            and row["control"] == "none"
        ]
        assert cell["fvu"] == pytest.approx(sum(row["fvu"] for row in seeds) / len(seeds), rel=1e-4)
    gaps = [row | {"ce_recovered": None} for row in rows]
    assert {(cell["ce_recovered"], cell["ce_recovered_text"]) for cell in drawn_points(figures.map_chart(gaps))} == {
        (None, "-")
    }


def test_the_legends_of_a_map_without_numbers_are_plain() -> None:
    rows = [sae_row(layer, "standard", "l1", l1, 0) for layer in (10, 15) for l1 in (2, 3, 4, 5, 6, 8, 11, 15)]
    written = re.findall(r"<text[^>]*>([^<]+)</text>", figures.svg(figures.map_chart(rows)))
    legends = [text for text in written if not re.match("[lFCd]|L0", text) and text != "Layers by sparsity"]
    assert len(legends) >= 8
    assert all(re.fullmatch(r"[\d.,]+%?", text) for text in legends), legends
    shares = [float(text.rstrip("%")) / 100 for text in legends if text.endswith("%")]
    assert any(0.5 < share <= 1 for share in shares), "CE recovered"
    assert any(0.02 < share <= 0.3 for share in shares), "dead features"


def test_quantiles_of_a_histogram_are_those_of_what_it_holds() -> None:
    rates = np.random.default_rng(0).normal(-3, 1, 100_000).clip(-5.99, -0.01)
    counts, edges = np.histogram(rates, bins=24, range=(-6, 0))
    bins = {(float(low), float(high)): int(n) for low, high, n in zip(edges, edges[1:], counts, strict=False)}
    for share in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert quantile(bins, share) == pytest.approx(np.quantile(rates, share), abs=0.02)
    assert quantile({(-3.0, -2.0): 1, (-2.0, -1.0): 0}, 1.0) == -2.0


def test_firing_rates_by_layer_pool_seeds_and_keep_widths_apart() -> None:
    _, _, densities = grid_tables()
    boxes = drawn_points(figures.layer_density_chart(densities))
    assert len(boxes) == 3 * 4 * 3
    assert all(box["q10"] < box["q25"] < box["q50"] < box["q75"] < box["q90"] for box in boxes)
    wider = [row | {"d_sae": 9216, "sae_id": f"wide {row['sae_id']}"} for row in densities if row["kind"] == "topk"]
    panels = {box["panel"] for box in drawn_points(figures.layer_density_chart([*densities, *wider]))}
    assert {"topk 4,608", "topk 9,216"} <= panels


def test_stability_leaves_out_what_has_no_live_feature() -> None:
    rows, _, _ = grid_tables()
    pairs = stability_rows(rows)
    pairs[0] |= {"matched": None}
    points = drawn_points(figures.stability_chart(pairs))
    assert len(points) == len(pairs) - 1
    assert {point["axis"] for point in points} == {AXIS_NAMES[pair["axis"]] for pair in pairs}


def test_foreign_text_leaves_out_what_was_not_measured_on_it() -> None:
    rows, _, _ = grid_tables()
    rows[0] |= {"fvu_foreign": None}
    assert len(drawn_points(figures.foreign_chart(rows))) == len(rows) - 1


@pytest.mark.parametrize("name", ["frontier", "loss", "density", "shares"])
def test_images_fit_into_800_pixels(name: str, tmp_path: Path) -> None:
    chart = all_charts()[name]
    figures.save_png(chart, tmp_path / "chart.png", scale=2)
    figures.save_svg(chart, tmp_path / "chart.svg")
    width, height = struct.unpack(">II", (tmp_path / "chart.png").read_bytes()[16:24])
    assert width / 2 <= 800
    assert height / 2 <= 800
    svg = (tmp_path / "chart.svg").read_text(encoding="utf-8")
    assert f'width="{width // 2}"' in svg
    assert "layer 10" in svg


@pytest.mark.parametrize("name", ["whole loss", "whole density", "whole shares", *NEW])
def test_charts_of_a_sweep_over_everything_draw(name: str) -> None:
    assert figures.png(whole_charts()[name], scale=1).startswith(b"\x89PNG")


def linear(colour: str) -> np.ndarray:
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def luminance(colour: str) -> float:
    return float(linear(colour) @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("position", np.linspace(0, 1, 41).tolist())
def test_numbers_on_a_map_are_legible(position: float) -> None:
    """At least 4.5:1, WCAG 2.2, 1.4.3; the colours of the cells as Vega mixes them, linearly in sRGB."""
    place = position * (len(palette.HEAT) - 1)
    index = min(int(place), len(palette.HEAT) - 2)
    low, high = (
        np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) for colour in palette.HEAT[index : index + 2]
    )
    mixed = "#" + "".join(f"{round(part):02x}" for part in low + (place - index) * (high - low))
    dark, light = sorted([luminance(mixed), luminance(palette.on_heat(position))])
    assert (light + 0.05) / (dark + 0.05) >= 4.5


@pytest.mark.parametrize("sight", ["full", "protan", "deutan"])
def test_a_map_gets_darker_step_by_step_for_all_eyes(sight: str) -> None:
    matrix = {"full": np.eye(3), "protan": np.array(PROTAN), "deutan": np.array(DEUTAN)}[sight]
    lightness = [lab(np.clip(matrix @ linear(colour), 0, 1))[0] for colour in palette.HEAT]
    assert all(lighter - darker > 8 for lighter, darker in itertools.pairwise(lightness))


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of linear sRGB, D65."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = np.clip(to_xyz @ rgb / [0.9505, 1.0, 1.089], 1e-6, None)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("ground", [palette.LIGHT_GROUND, palette.DARK_GROUND])
def test_data_colours_stand_out_from_both_grounds(ground: str) -> None:
    for colour in {*palette.HOOKS, *palette.ramp(25)}:
        dark, light = sorted([luminance(colour), luminance(ground)])
        assert (light + 0.05) / (dark + 0.05) >= 3, colour


# Full protanopia and deuteranopia, Machado, Oliveira and Fernandes (2009), table 1, on linear sRGB.
PROTAN = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
DEUTAN = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]


@pytest.mark.parametrize("sight", [np.eye(3).tolist(), PROTAN, DEUTAN], ids=["full", "protan", "deutan"])
@pytest.mark.parametrize("colours", [palette.HOOKS[:5], palette.ramp(3)], ids=["hooks", "settings"])
def test_colours_stay_apart_for_colour_blind_eyes(sight: list[list[float]], colours: list[str]) -> None:
    seen = [lab(np.clip(np.array(sight) @ linear(colour), 0, 1)) for colour in colours]
    assert min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2)) > 25
