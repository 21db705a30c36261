"""Settings that would change no SAE of a grid are refused, and what is told to give instead is taken."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from midiscover.configio import expand_grid, load_config, parse_value, to_yaml
from midiscover.errors import ConfigError


@pytest.mark.parametrize("width", ["sae: {d_sae: 30}\n", ""])
def test_who_gives_a_multiple_where_the_width_is_an_axis_is_told_a_flag_that_is_taken(
    tmp_path: Path, width: str
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(f"harvest: {{hooks: a.0.b}}\n{width}grid: {{sae.d_sae: [10, 20]}}\n")
    with pytest.raises(ConfigError, match=r"grid.sae.d_sae is set and goes before it; give --grid.sae.d_sae\."):
        load_config(path, {"sae.expansion_factor": 4})
    assert [p.sae.d_sae for p in expand_grid(load_config(path, {"grid": {"sae.d_sae": [40]}}))] == [40]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"sae.l1_coefficient": 64}, "--sae.l1_coefficient changes no SAE: the grid sets it; give --grid.sae.l1_co"),
        ({"train.seed": 3}, "--train.seed changes no SAE: the grid sets it; give --grid.train.seed '[3]'."),
        ({"sae.kind": "gated"}, "--sae.kind changes no SAE: the grid sets it; give --grid.sae.kind '[gated]'."),
        ({"sae.k": 3}, "'sae.k' is a setting of topk, batchtopk, matryoshka_batchtopk, and not of the sae.kind"),
        ({"sae.target_l0": 9, "sae.expansion_factor": 4}, "--sae.expansion_factor changes no SAE: sae.d_sae is set"),
        ({"grid": {"sae.kind": ["topk"]}}, "grid.sae.l1_coefficient is an axis that topk SAEs lack"),
    ],
)
def test_a_flag_that_would_change_nothing_is_refused(tmp_path: Path, overrides: dict[str, Any], sentence: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(
        "harvest: {hooks: a.0.b}\nsae: {d_sae: 40, l1_coefficient: 5}\n"
        "grid: {sae.kind: [standard, gated], sae.l1_coefficient: [1], train.seed: [0, 1]}\n"
    )
    assert len(expand_grid(load_config(path, {"train.lr": 0.5, "sae.d_sae": 80}))) == 4
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert sentence in str(caught.value)


def test_a_flag_with_a_default_that_other_architectures_would_not_take_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("harvest: {hooks: a.0.b}\ngrid: {sae.kind: [standard, gated, jumprelu, topk]}\n")
    sentence = r"--sae.initial_density 0.02 is the default of standard and does not go over to gated, jumprelu; give"
    with pytest.raises(ConfigError, match=sentence):
        load_config(path, {"sae.initial_density": 0.02})
    taken = expand_grid(load_config(path, {"sae.initial_density": 0.03}))
    assert [getattr(point.sae, "initial_density", None) for point in taken] == [0.03, 0.03, 0.03, None]
    # The way that is told is one, and a default that is the same for all is no such case.
    path.write_text("harvest: {hooks: a.0.b}\ngrid: {sae.kind: [standard, gated, jumprelu]}\n")
    load_config(path, {"sae.l1_coefficient": 5.0})
    held = expand_grid(load_config(path, {"grid": {"sae.initial_density": [0.02]}}))
    assert [getattr(point.sae, "initial_density", None) for point in held] == [0.02] * 3
    # What a job is handed on has every default written down, and is taken.
    path.write_text(to_yaml(load_config(path)))
    assert len(expand_grid(load_config(path))) == 3


@pytest.mark.parametrize(
    ("grids", "advice", "value", "flag", "instead", "held"),
    [
        (  # topk has no such setting, so that as a flag it would be refused
            "{sae.kind: [standard, gated, topk]}",
            r"over to gated; give those a grid of their own in the file, with sae.initial_density: \[0.02\]\.",
            0.02,
            "sae.initial_density",
            "[{sae.kind: [standard, topk]}, {sae.kind: [gated], sae.initial_density: [0.02]}]",
            [0.02, None, 0.02],
        ),
        (  # a flag would replace the axis alone
            "[{sae.kind: [gated]}, {sae.kind: [standard], sae.initial_density: [0.07]}]",
            r"over to gated; give those a grid of their own in the file, with sae.initial_density: \[0.02\]\.",
            0.02,
            "sae.initial_density",
            "[{sae.kind: [gated], sae.initial_density: [0.02]}, {sae.kind: [standard], sae.initial_density: [0.07]}]",
            [0.02, 0.07],
        ),
        (
            "[{sae.kind: [gated], sae.l1_coefficient: [1]}, {sae.kind: [topk]}]",
            r"goes through the coefficient; write sae.target_l0: \[9\] into that grid of the file\.",
            9,
            "sae.target_l0",
            "[{sae.kind: [gated], sae.l1_coefficient: [1], sae.target_l0: [9]}, {sae.kind: [topk]}]",
            [9, None],
        ),
    ],
)
def test_where_a_flag_for_all_grids_would_not_do_the_file_is_named(
    tmp_path: Path, grids: str, advice: str, value: float, flag: str, instead: str, held: list[float | None]
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(f"harvest: {{hooks: a.0.b}}\ngrid: {grids}\n")
    with pytest.raises(ConfigError, match=advice):
        load_config(path, {flag: value})
    path.write_text(f"harvest: {{hooks: a.0.b}}\ngrid: {instead}\n")
    found = [getattr(point.sae, flag.removeprefix("sae."), None) for point in expand_grid(load_config(path))]
    assert found == held


def test_the_flag_that_is_told_is_read_as_the_value_that_was_given(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("harvest: {hooks: a.0.b}\ngrid: {sae.initial_density: [0.1], train.resample_at: [[0.5]]}\n")
    for flag, value in (("sae.initial_density", None), ("train.resample_at", [0.25, 0.75])):
        with pytest.raises(ConfigError) as caught:
            load_config(path, {flag: value})
        found = re.search(r"give --grid\.(\S+) '(.*)'\.$", str(caught.value))
        assert found is not None
        assert (found[1], parse_value(found[2])) == (flag, [value])
        load_config(path, {"grid": {found[1]: parse_value(found[2])}})


def test_a_flag_counts_where_one_grid_leaves_it_open(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(
        "harvest: {hooks: a.0.b}\ngrid:\n  - {sae.kind: [standard], sae.target_l0: [20], train.seed: [0, 1]}\n"
        "  - {sae.kind: [topk], sae.k: [20]}\n"
    )
    assert [point.train.seed for point in expand_grid(load_config(path, {"train.seed": 7}))] == [0, 1, 7]
    with pytest.raises(ConfigError, match=r"--sae.target_l0 changes no SAE: .* --grid.sae.target_l0 '\[55\]'"):
        load_config(path, {"sae.target_l0": 55})  # topk has no such setting
    # An axis replaces that of the grids that have it; one that none has comes to all of them.
    assert [point.sae.sparsity() for point in expand_grid(load_config(path, {"grid": {"sae.k": [8, 9]}}))] == [
        *[("L0", 20)] * 2,
        *[("k", 8), ("k", 9)],
    ]
    assert [p.train.lr for p in expand_grid(load_config(path, {"grid": {"train.lr": [0.1]}}))] == [0.1] * 3


def test_a_setting_that_no_architecture_of_the_grid_has_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("harvest: {hooks: a.0.b}\nsae: {l1_coefficient: 2}\ngrid: {sae.kind: [topk, batchtopk]}\n")
    with pytest.raises(ConfigError, match="sae.l1_coefficient is no setting of the architectures in the grid, batch"):
        load_config(path)
