"""Names, order, numbers and pass marks of plain rows."""

from __future__ import annotations

import math
from typing import Any

import pytest

from midiscover.summary import (
    ce_error_notes,
    columns,
    compact,
    fixed,
    hook_names,
    in_order,
    natural_key,
    percent,
    quality,
    strength,
)


def row(**changes: Any) -> dict[str, Any]:
    base = {"sae_id": "a", "hook": "model.layers.10.mlp", "layer": 10, "kind": "standard", "l1": 3.0, "k": None}
    measures = {"l0": 60.0, "fvu": 0.5, "mse": 0.01, "ce_recovered": 0.9, "dead_share": 0.1, "inactive_share": 0.25}
    return base | {"d_sae": 64, "seed": 0, "seconds": 6.0, "sparsity_label": "l1 3"} | measures | changes


def test_numbers_and_what_is_missing() -> None:
    assert (fixed(1234.567, 1), percent(0.98512), compact(0.0012678)) == ("1,234.6", "98.5%", "0.001268")
    for nothing in (None, math.nan, math.inf):
        assert (fixed(nothing, 1), percent(nothing), compact(nothing)) == ("-", "-", "-")


@pytest.mark.parametrize(
    ("hooks", "pattern", "short"),
    [
        (["model.layers.9.mlp.fc2", "model.layers.10.mlp.fc2"], "model.layers.*.mlp.fc2", ["layer 9", "layer 10"]),
        (["h.1.attn", "h.1.mlp"], "h.1.*", ["attn", "mlp"]),
        (["h.1.attn.o", "h.2.mlp.o"], "h.*.o", ["1.attn", "2.mlp"]),
        (["h.1.mlp", "h.1.mlp.down"], "h.1.*", ["mlp", "mlp.down"]),
        (["h.1.mlp"], "h.1.mlp", ["h.1.mlp"]),
        (["embed", "model.norm"], "*", ["embed", "model.norm"]),
        ([], "", []),
    ],
)
def test_hooks_are_named_by_what_differs(hooks: list[str], pattern: str, short: list[str]) -> None:
    names = hook_names([*hooks, *hooks])
    assert (names.pattern, list(names.short.values()), list(names.short)) == (pattern, short, hooks)


def test_order_is_by_layer_then_strength() -> None:
    rows = [
        row(layer=10, l1=20.0),
        row(layer=9, hook="model.layers.9.mlp"),
        row(layer=10, l1=8.0),
        row(layer=None, l1=1.0),
    ]
    assert [(r["layer"], r["l1"]) for r in in_order(rows)] == [(9, 3.0), (10, 8.0), (10, 20.0), (None, 1.0)]
    assert sorted(["l1 20", "l1 3", "l1 0.5"], key=natural_key) == ["l1 0.5", "l1 3", "l1 20"]


def test_columns_appear_where_rows_differ() -> None:
    same = ["hook", "l1", "L0", "FVU", "CE recovered", "dead", "inactive", "seconds"]
    assert [column.title for column in columns([row()])] == same
    mixed = columns([row(), row(kind="topk", l1=None, k=32, d_sae=128, seed=1, sparsity_label="k 32")])
    assert [column.title for column in mixed][:5] == ["hook", "kind", "width", "sparsity", "seed"]
    empty = row(l1=None, **dict.fromkeys(("l0", "fvu", "ce_recovered", "dead_share", "inactive_share", "seconds")))
    assert [column.text(empty) for column in columns([empty])][2:] == ["-"] * 6


def test_columns_of_a_sweep_with_controls_and_foreign_text() -> None:
    """A control's own width makes no column: `neurons` has another one wherever it stands."""
    rows = [row(fvu_foreign=0.7), row(fvu_foreign=None), row(control="neurons", d_sae=32, kind="topk", seed=7)]
    shown = columns(rows)
    assert [column.title for column in shown][:5] == ["hook", "control", "l1", "L0", "FVU"]
    assert "FVU foreign" in [column.title for column in shown]
    assert [shown[1].text(r | {"control": r.get("control", "none")}) for r in rows] == ["none", "none", "neurons"]


def test_the_sparsity_column_is_the_setting_that_all_have() -> None:
    targets = [row(l1=None, target_l0=60.0, sparsity_label="L0 60")]
    jump = row(l1=None, sparsity_label="l0c 0.5")
    assert columns(targets)[1].title == "target L0"
    assert columns([*targets, row()])[1].text(targets[0]) == "L0 60"
    assert columns([jump])[1].text(jump) == "l0c 0.5"


def test_strength_reads_settings_and_labels() -> None:
    assert strength(row(l1=1e-5)) == ("l1", 1e-5)
    assert strength(row(l1=None, sparsity_label="l0c 1e-05")) == ("l0c", 1e-5)
    assert strength(row(l1=None, target_l0=60.0)) == ("L0", 60)
    assert strength(row(l1=None, sparsity_label=None)) == ("", math.inf)


def test_controls_come_last_of_their_hook() -> None:
    rows = [row(control="untrained", l1=1.0), row(kind="topk"), row(layer=9, hook="model.layers.9.mlp")]
    assert [(r["layer"], r["kind"], r.get("control")) for r in in_order(rows)] == [
        (9, "standard", None),
        (10, "topk", None),
        (10, "standard", "untrained"),
    ]


def test_controls_are_not_judged() -> None:
    judged = quality([row(sae_id="a", inactive_share=0.9), row(sae_id="b", inactive_share=0.25, control="untrained")])
    assert (judged.best_id, judged.indicators[0].passing) == ("a", "0 of 1")


def test_quality_counts_passes_and_names_the_best() -> None:
    rows = [
        row(sae_id="passes-all", inactive_share=0.25, mse=0.019),
        row(sae_id="low-loss", inactive_share=0.9, mse=0.001),
        row(sae_id="unmeasured", inactive_share=None, mse=None, l0=None, fvu=None),
    ]
    judged = quality(rows, minutes=13.0)
    assert judged.best_id == "passes-all"
    lines = {line.name: (line.passing, line.best, line.passed) for line in judged.indicators}
    assert lines == {
        "inactive features": ("1 of 2", "25.0%", True),
        "active features": ("1 of 2", "75.0%", True),
        "reconstruction loss": ("2 of 2", "0.019", True),
        "minutes": ("-", "13.0", False),
    }
    assert [(line.name, line.best) for line in judged.measures] == [
        ("L0", "60.0"),
        ("FVU", "0.500"),
        ("CE recovered", "90.0%"),
    ]


@pytest.mark.parametrize(("inactive", "passed"), [(0.2, True), (0.3, True), (0.19, False), (0.31, False)])
def test_the_bounds_of_both_shares_are_one(inactive: float, passed: bool) -> None:
    first, second, *_ = quality([row(inactive_share=inactive)]).indicators
    assert (first.passed, second.passed) == (passed, passed)


def test_quality_of_nothing() -> None:
    judged = quality([])
    assert judged.best_id is None
    assert {line.passed for line in judged.indicators} == {None}
    assert {line.best for line in [*judged.indicators, *judged.measures]} == {"-"}


def test_how_exact_ce_recovered_is() -> None:
    rows = [row(ce_recovered_error=0.0123), row(ce_recovered_error=None), row(ce_recovered_error=0.031)]
    assert [note.partition(",")[0] for note in ce_error_notes(rows)] == [
        "CE recovered: standard error 1.2 to 3.1 points"
    ]
    assert "error 1.2 points" in ce_error_notes(rows[:2])[0]
    assert ce_error_notes([row()]) == []  # measured before errors were
