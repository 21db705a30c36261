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
    # An SAE that both have stands once, in the first.
    assert [row["sae_id"] for row in both["saes"]] == list(dict.fromkeys([*DEMO["sae_ids"], *WIDE["sae_ids"]]))
    assert [row["variant"] for row in both["saes"]] == [DEMO["id"]] * 4 + [WIDE["id"]] * 2
    assert [(row["l1"], row["frontier"]) for row in both["saes"] if row["layer"] == 1] == [
        (1.0, False),
        (3.0, False),
        (9.0, True),
    ]
    assert [pair["a"] for pair in both["stability"]] == [DEMO["sae_ids"][0], WIDE["sae_ids"][0]]
    assert compared(store, capsys, "demo", DEMO["id"])["stability"] == alone["stability"]
    assert main(["runs", "compare", "demo", "wide", "--store", str(store)]) == 0
    assert "Features in common" in capsys.readouterr().out


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
