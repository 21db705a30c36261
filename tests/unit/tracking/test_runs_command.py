"""`midiscover runs compare` of several sweeps: one table, one frontier, and nothing that does not compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from midiscover.cli import main
from midiscover.store import layout
from midiscover.store.storage import open_store
from midiscover.tracking import Tracker
from midiscover.tracking.sweepfiles import stability_document
from tests.unit.tracking import samples

DEMO, WIDE = samples.sweep("demo", (1.0, 3.0)), samples.sweep("wide", (3.0, 9.0))
MEASURED = {1.0: (90.0, 0.2), 3.0: (50.0, 0.3), 9.0: (40.0, 0.1)}
"""l1 -> L0 and FVU: the last one, of the second sweep, beats both of the first."""


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MIDISCOVER_DATABASE_URL", raising=False)
    storage = open_store(str(tmp_path / "store"))
    with Tracker.for_store(storage) as tracker:
        for sweep in (DEMO, WIDE):
            tracker.start_sweep(sweep)
            for planned in sweep["saes"]:
                l0, fvu = MEASURED[planned["l1"]]
                tracker.record_sae(samples.record(planned, l0=l0, fvu=fvu))
            pair = {
                "axis": "seed",
                "hook": samples.HOOKS[0],
                "layer": 1,
                "kind": "standard",
                "matched": 0.5,
                "cosine": 0.9,
            }
            pairs = stability_document([pair | {"a": sweep["sae_ids"][0], "b": sweep["sae_ids"][1]}])
            document = json.dumps(pairs).encode()
            storage.write(layout.sweep_file(sweep["id"], "stability.json"), document)
    return tmp_path / "store"


def compared(store: Path, capsys: pytest.CaptureFixture[str], *sweeps: str) -> dict[str, list[dict[str, Any]]]:
    assert main(["runs", "compare", *sweeps, "--json", "--store", str(store)]) == 0
    return json.loads(capsys.readouterr().out)


def test_sweeps_stand_side_by_side(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = compared(store, capsys, "demo")
    assert [row["frontier"] for row in alone["saes"]] == [True] * 4
    both = compared(store, capsys, "demo", "wide")
    # An SAE that both have stands once, and says that both have it.
    assert [row["sae_id"] for row in both["saes"]] == list(dict.fromkeys([*DEMO["sae_ids"], *WIDE["sae_ids"]]))
    shared = f"{DEMO['id']} and {WIDE['id']}"
    assert [row["variant"] for row in both["saes"]] == [DEMO["id"], shared] * 2 + [WIDE["id"]] * 2
    assert [(row["l1"], row["frontier"]) for row in both["saes"] if row["layer"] == 1] == [
        (1.0, False),
        (3.0, False),
        (9.0, True),
    ]
    assert [pair["a"] for pair in both["stability"]] == [DEMO["sae_ids"][0], WIDE["sae_ids"][0]]
    assert compared(store, capsys, "demo", DEMO["id"])["stability"] == alone["stability"]
    assert main(["runs", "compare", "demo", "wide", "--store", str(store)]) == 0
    assert "Features in common" in capsys.readouterr().out


def test_a_pair_that_several_sweeps_have_counts_once(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = open_store(str(store))
    again = samples.sweep("again", (3.0, 1.0))
    with Tracker.for_store(storage) as tracker:
        tracker.start_sweep(again)
    (pair,) = json.loads(storage.read(layout.sweep_file(DEMO["id"], "stability.json")))["pairs"]
    turned = pair | {"a": pair["b"], "b": pair["a"]}  # its grid has them the other way round
    pairs = [turned, turned | {"axis": "sparsity"}]
    storage.write(layout.sweep_file(again["id"], "stability.json"), json.dumps(stability_document(pairs)).encode())
    both = compared(store, capsys, "demo", "again")
    assert set(DEMO["sae_ids"]) == set(again["sae_ids"])
    assert both["stability"] == [pair, pairs[1]]
    assert [row["variant"] for row in both["saes"]] == [f"{DEMO['id']} and {again['id']}"] * 4


def test_an_sae_of_several_sweeps_has_the_settings_that_any_of_them_names(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = samples.plan(samples.HOOKS[0], 3.0)
    settings = plain["settings"] | {"train": plain["settings"]["train"] | {"lr": 1e-3}}
    tuned = plain | {"sae_id": plain["sae_id"][:-10] + "f" * 10, "settings": settings}
    rates = samples.sweep("rates", saes=[plain, tuned], sae_ids=[plain["sae_id"], tuned["sae_id"]])
    with Tracker.for_store(open_store(str(store))) as tracker:
        tracker.start_sweep(rates)
        tracker.record_sae(samples.record(tuned))
    rows = {row["sae_id"]: row["variant"] for row in compared(store, capsys, "demo", "rates")["saes"]}
    assert rows[plain["sae_id"]] == f"{DEMO['id']} and {rates['id']}, lr 0.0003"
    assert rows[tuned["sae_id"]] == f"{rates['id']}, lr 0.001"


def test_a_setting_that_several_sweeps_name_stands_once(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = samples.plan(samples.HOOKS[0], 3.0)
    names = []
    with Tracker.for_store(open_store(str(store))) as tracker:
        for place, train in enumerate(({"lr": 1e-3}, {"lr": 1e-3, "betas": [0.0, 0.999]})):
            other = first | {"sae_id": first["sae_id"][:-1] + "yz"[place]}
            other |= {"settings": first["settings"] | {"train": first["settings"]["train"] | train}}
            sweep = samples.sweep(f"s{place}", saes=[first, other], sae_ids=[first["sae_id"], other["sae_id"]])
            tracker.start_sweep(sweep)
            tracker.record_sae(samples.record(other))
            names.append(sweep["id"])
    rows = {row["sae_id"]: row["variant"] for row in compared(store, capsys, *names)["saes"]}
    assert rows[first["sae_id"]] == f"{' and '.join(names)}, lr 0.0003, betas [0.9,0.999]"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"harvest": "h.other"}, "one is measured on other activations; their numbers do not compare"),
        ({"evaluation_id": "e.other"}, "one is measured in another way; their numbers do not compare"),
    ],
)
def test_what_does_not_compare_is_refused(
    store: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], sentence: str
) -> None:
    with Tracker.for_store(open_store(str(store))) as tracker:
        tracker.start_sweep(samples.sweep("other", **changes))
    assert main(["runs", "compare", "demo", "other", "--store", str(store)]) == 2
    assert sentence in capsys.readouterr().err
