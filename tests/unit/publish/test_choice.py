"""Which SAEs of a sweep are published, and the sweep that an SAE belongs to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from midiscover import figures
from midiscover.configio import to_tree
from midiscover.errors import NotFoundError
from midiscover.publish.choice import chosen, sweep_of, sweep_rows
from midiscover.saeconfig import StandardConfig
from midiscover.store import layout
from midiscover.store.local import LocalStorage

A, B = "model.layers.1.mlp", "model.layers.2.mlp"
ROWS: list[dict[str, Any]] = [
    {"sae_id": "l1.a", "hook": A, "l0": 10.0, "fvu": 0.40},
    {"sae_id": "l1.beaten", "hook": A, "l0": 12.0, "fvu": 0.45},
    {"sae_id": "l1.b", "hook": A, "l0": 50.0, "fvu": 0.20},
    {"sae_id": "l1.control", "hook": A, "l0": 5.0, "fvu": 0.01, "control": "neurons"},
    {"sae_id": "l2.a", "hook": B, "l0": 70.0, "fvu": 0.50},
    {"sae_id": "l2.unmeasured", "hook": B, "l0": None, "fvu": None},
]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("all", [row["sae_id"] for row in ROWS]),
        ("frontier", ["l1.a", "l1.b", "l2.a"]),
        ("best", ["l1.b", "l2.a"]),
        ("l1.b", ["l1.beaten", "l1.b"]),
        ("l2.a", ["l2.a"]),
    ],
)
def test_chosen(wanted: str, expected: list[str]) -> None:
    assert chosen(ROWS, wanted) == expected


def test_what_fits_nothing() -> None:
    with pytest.raises(NotFoundError, match=r"publish\.saes is 'l3', which fits none of the sweep's 6 finished SAEs"):
        chosen(ROWS, "l3")


def sweep(storage: LocalStorage, name: str, created: str, saes: list[str]) -> None:
    rows = [{"sae_id": sae, "hook": A} for sae in saes]
    record = {"id": name, "created": created, "sae_ids": saes, "saes": rows, "evaluation_id": "e.1"}
    storage.write(layout.sweep_record(name), json.dumps(record).encode())


def test_the_newest_sweep_of_an_sae(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    sweep(storage, "z.1", "2026-11-01T00:00:00+00:00", ["a", "b"])
    sweep(storage, "a.2", "2026-11-02T00:00:00+00:00", ["a"])
    assert (sweep_of(storage, "a") or {})["id"] == "a.2"
    assert (sweep_of(storage, "b") or {})["id"] == "z.1"
    assert sweep_of(storage, "c") is None


def test_rows_are_of_finished_saes_only(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    sweep(storage, "s.1", "2026-11-01T00:00:00+00:00", ["a", "b", "c"])
    for sae in ("a", "b"):
        storage.write(layout.evaluation(sae, "e.1"), json.dumps({"metrics": {"l0": 7.0, "fvu": 0.3}}).encode())
    for sae in ("a", "c"):
        storage.write(layout.record(sae), b"{}")
    (row,) = sweep_rows(storage, sweep_of(storage, "a") or {})
    assert (row["sae_id"], row["l0"], row["fvu"], row["ce_recovered"]) == ("a", 7.0, 0.3, None)


def test_rows_tell_learning_rates_apart(tmp_path: Path) -> None:
    """So that a frontier has a line for each, and not one through their means."""
    storage = LocalStorage(tmp_path)
    rates, saes = {"a": 0.001, "b": 0.01}, [("a", 1.0), ("b", 1.0), ("a", 3.0), ("b", 3.0)]
    names = [f"{name}.{l1:g}" for name, l1 in saes]
    sweep(storage, "s.1", "2026-11-01T00:00:00+00:00", names)
    for name, (rate, l1) in zip(names, saes, strict=True):
        settings = to_tree(StandardConfig(l1_coefficient=l1, d_sae=64))
        record = {"hook": A, "output_hook": A, "d_sae": 64, "sae": settings, "train": {"lr": rates[rate]}}
        storage.write(layout.record(name), json.dumps(record).encode())
        metrics = {"l0": 80 / l1, "fvu": 0.1 * l1}
        storage.write(layout.evaluation(name, "e.1"), json.dumps({"metrics": metrics}).encode())
    rows = sweep_rows(storage, sweep_of(storage, names[0]) or {})
    assert [row["variant"] for row in rows] == ["lr 0.001", "lr 0.01"] * 2
    points = figures.frontier_chart([row | {"kind": "standard"} for row in rows]).to_dict()["data"]["values"]
    assert len({point["line"] for point in points}) == 2


def test_a_record_that_cannot_be_read_ends_no_other_sae_s_export(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    sweep(storage, "s.1", "2026-11-01T00:00:00+00:00", ["a", "b"])
    for name, text in (("a", b"{}"), ("b", b"{broken")):
        storage.write(layout.record(name), text)
        storage.write(layout.evaluation(name, "e.1"), json.dumps({"metrics": {"l0": 7.0, "fvu": 0.3}}).encode())
    rows = sweep_rows(storage, sweep_of(storage, "a") or {})
    assert [(row["sae_id"], row["variant"]) for row in rows] == [("a", ""), ("b", "")]
