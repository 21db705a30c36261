"""What the command line prints: complete at 120 columns, whole at 80, plain where there is no terminal."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import RenderableType

from midiscover.tables import (
    MAPS,
    compare_table,
    comparison,
    hooks_table,
    layer_map,
    quality_box,
    runs_table,
    show,
    stability_table,
    sweep_table,
)
from tests.unit.grid_tables import CONTROLS, LAYERS, grid_tables, stability_rows
from tests.unit.plain_tables import plain_tables


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def printed(renderable: RenderableType) -> list[str]:
    file = io.StringIO()
    show(renderable, file)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def everything() -> list[RenderableType]:
    rows, _, _ = plain_tables()
    return [sweep_table(rows), compare_table(rows), quality_box(rows, 9.8)]


@pytest.mark.parametrize("width", ["80", "120"])
def test_fits_the_width_without_breaking_a_row(width: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", width)
    rows, _, _ = plain_tables()
    for renderable in everything():
        lines = printed(renderable)
        assert max(map(len, lines)) <= int(width)
        assert not any("…" in line for line in lines)
    table = printed(sweep_table(rows))
    for row in rows:
        ends = (f"{row['l0']:.1f}", f"{row['fvu']:.3f}", f"{100 * row['ce_recovered']:.1f}%", "66", "*")
        assert any(all(word in line.split() for word in ends) for line in table)
    assert all(any(line.startswith(row["sae_id"] + " ") for line in printed(compare_table(rows))) for row in rows)


def test_narrow_tables_name_hooks_by_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _, _ = plain_tables()
    assert sum("model.layers.10.mlp.down_proj" in line for line in printed(sweep_table(rows))) == 3
    monkeypatch.setenv("COLUMNS", "80")
    lines = printed(sweep_table(rows))
    assert "model.layers.*.mlp.down_proj" in lines[0]
    assert sum(line.startswith("layer 10 ") for line in lines) == 3


def test_colour_on_a_terminal_only() -> None:
    for renderable in everything():
        file, terminal = io.StringIO(), Terminal()
        show(renderable, file)
        show(renderable, terminal)
        assert "\x1b[" not in file.getvalue()
        assert "\x1b[" in terminal.getvalue()


def test_a_beaten_sae_is_unmarked_and_missing_values_are_dashes() -> None:
    rows, _, _ = plain_tables(layers=[10])
    beaten = rows[0] | {"l1": 50.0, "fvu": 0.99, "l0": 500.0, "ce_recovered": None, "seconds": None}
    line = next(line for line in printed(sweep_table([*rows, beaten])) if " 50 " in line)
    assert line.split()[2:] == ["500.0", "0.990", "-", "2.2%", "22.0%", "-"]


@pytest.mark.parametrize("width", ["80", "120"])
def test_a_sweep_over_everything_keeps_settings_and_ids_whole(width: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", width)
    rows, _, _ = grid_tables()
    lines = printed(sweep_table(rows))
    assert max(map(len, lines)) <= int(width)
    listed = [line.split() for line in lines if line.startswith("layer ")]
    assert len(listed) == len(rows)
    assert sum("frozen_decoder" in line for line in listed) == len(LAYERS)
    compared = printed(compare_table(rows))
    assert max(map(len, compared)) <= int(width)
    assert all(any(line.startswith(row["sae_id"] + " ") for line in compared) for row in rows)


def test_marks_tell_the_best_from_the_best_of_their_kind() -> None:
    rows, _, _ = grid_tables()
    for table in (sweep_table(rows), compare_table(rows)):
        lines = printed(table)
        marked = {mark: [line for line in lines if line.endswith(f" {mark}")] for mark in ("*", "+")}
        assert all(marked.values())
        assert not any(control in line for found in marked.values() for line in found for _, control in CONTROLS)
        notes = " ".join(lines[-5:])
        assert "frontier of its own architecture" in notes
        assert "Controls show what a score is worth" in notes


def test_controls_are_dim_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    rows, _, _ = grid_tables()
    terminal = Terminal()
    show(sweep_table(rows), terminal)
    lines = [line for line in terminal.getvalue().splitlines() if "model.layers.10." in line]
    assert len(lines) == sum(row["layer"] == 10 for row in rows)
    dim = [line for line in lines if "\x1b[2m" in line]
    assert len(dim) == len(CONTROLS)
    assert all(any(control in line for line in dim) for _, control in CONTROLS)


def test_a_map_holds_the_means_of_seeds_and_no_control() -> None:
    rows, _, _ = grid_tables()
    lines = [line.split() for line in printed(layer_map(rows, "fvu"))]
    start = next(index for index, line in enumerate(lines) if line[:1] == ["standard"])
    for line, layer in zip(lines[start : start + len(LAYERS)], LAYERS, strict=True):
        expected = [
            sum(row["fvu"] for row in rows if (row["layer"], row["l1"], row["control"]) == (layer, l1, "none")) / 2
            for l1 in (2.2, 5.0, 15.0)
        ]
        assert line[-3:] == [f"{value:.3f}" for value in expected]


def test_a_map_that_is_too_wide_has_a_table_per_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _, _ = grid_tables()
    assert sum("FVU," in line for line in printed(layer_map(rows, "fvu"))) == 1
    monkeypatch.setenv("COLUMNS", "50")
    lines = printed(layer_map(rows, "fvu"))
    assert sum("FVU," in line for line in lines) == 4
    assert max(map(len, lines)) <= 50


def test_stability_is_summed_up_by_axis_and_hook() -> None:
    rows, _, _ = grid_tables()
    pairs = stability_rows(rows)
    lines = [line.split() for line in printed(stability_table(pairs))]
    first = next(line for line in lines if line[:2] == ["another", "seed"])
    found = [pair["matched"] for pair in pairs if (pair["axis"], pair["layer"]) == ("seed", 10)]
    shares = [f"{100 * value:.1f}%" for value in (sum(found) / len(found), min(found), max(found))]
    assert first[2:-1] == ["layer", "10", str(len(found)), *shares]
    unmeasured = stability_table([pair | {"matched": None, "cosine": None} for pair in pairs])
    assert not any("another" in line for line in printed(unmeasured))


def test_a_comparison_has_maps_of_several_hooks_and_stability_where_there_is_some() -> None:
    rows, _, _ = grid_tables()
    whole = "\n".join(printed(comparison(rows, stability_rows(rows))))
    assert all(f"{title}, model.layers.*" in whole for title, _ in MAPS.values())
    assert "Features in common" in whole
    alone = "\n".join(printed(comparison([row for row in rows if row["layer"] == 10])))
    assert "model.layers" not in alone
    assert "Features in common" not in alone
    unmeasured = "\n".join(printed(comparison([row | {"ce_recovered": None} for row in rows])))
    assert "CE recovered, model.layers.*" not in unmeasured


def test_topk_sweeps_are_listed_by_k() -> None:
    rows, _, _ = plain_tables(layers=[10], l1s=[3])
    lines = printed(sweep_table([rows[0] | {"kind": "topk", "l1": None, "k": 32, "sparsity_label": "k 32"}]))
    assert "k" in lines[1].split()
    assert "32" in lines[3].split()


def test_quality_box_judges_and_says_what_it_cannot() -> None:
    rows, _, _ = plain_tables()
    text = "\n".join(printed(quality_box(rows, 9.8)))
    # inactive_share is 0.2 ln(l1): 22 % at l1 3, 42 % at 8, 60 % at 20; mse is at most 0.003.
    for line in (
        ["inactive", "features", "20-30%", "22.0%", "pass", "3", "of", "9"],
        ["minutes", "<", "13", "9.8", "pass"],
    ):
        assert any(candidate.split()[: len(line)] == line for candidate in text.splitlines()), line
    assert "cannot tell" in text
    assert "fail" in "\n".join(printed(quality_box(rows, 14.0)))
    assert "Best SAE" not in "\n".join(printed(quality_box([])))


def test_runs_table() -> None:
    run: dict[str, Any] = {
        "id": "demo.01",
        "name": "a[b]c",
        "created_at": "2026-01-02T03:04:05+00:00",
        "status": "done",
    }
    lines = printed(runs_table([run | {"owner": None, "saes": 9, "done": 8, "failed": 1}]))
    assert lines[-1].split() == ["demo.01", "a[b]c", "2026-01-02", "03:04", "8/9,", "1", "failed", "done", "-"]
    lines = printed(runs_table([run | {"owner": None, "saes": 9, "done": 6, "failed": 1, "retired": 2}]))
    assert lines[-1].split()[4:9] == ["6/9,", "1", "failed,", "2", "retired"]
    assert printed(runs_table([])) == ["No runs yet."]


def test_hooks_table_counts_bytes_and_flops() -> None:
    hook = {"path": "model.layers.10.mlp:in", "d_in": 2560, "layer": 10, "flops_per_token": 1.5e9, "recommended": True}
    assert printed(hooks_table([hook]))[-1].split() == ["model.layers.10.mlp:in", "2,560", "5,120", "1.500", "yes"]
