"""Architectures, seeds and controls in one sweep, with a foreign text and early retirement, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from midiscover import load_sae
from tests.jobs_cli import Done, midiscover
from tests.runs import harvested_run, weights

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

HOOK = "model.layers.1.mlp.down_proj"
GRID = [
    {"sae.kind": ["standard", "jumprelu"], "sae.target_l0": [6]},
    {"sae.kind": ["batchtopk"], "sae.k": [4], "train.seed": [0, 1]},
    {"sae.kind": ["skip_transcoder"], "sae.output_hook": ["model.layers.{layer}"]},
    {"sae.control": ["untrained", "neurons", "random_model", "frozen_decoder"]},
    # A learning rate at which nothing is learned: beaten by its twin at L0 and FVU.
    {"sae.initial_density": [None], "train.lr": [1e-9]},
    {"sae.initial_density": [None]},
]


@pytest.fixture(scope="module")
def run(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    folder = tmp_path_factory.mktemp("grid")
    config = harvested_run(
        finished,
        folder,
        harvest={"hooks": HOOK, "block_tokens": 1024},
        sae={"expansion_factor": 4, "l1_coefficient": 0.5},
        grid=GRID,
        train={"epochs": 4, "batch_size": 64, "report_every": 10, "retire_after": 0.5},
        evaluate={"ce_tokens": 128, "foreign_source": "builtin-code", "foreign_tokens": 512},
    )
    done = midiscover("sweep", str(config), "--store", str(folder / "store"))
    assert done.code == 0, done.err
    return folder, done


@pytest.fixture(scope="module")
def records(run: tuple[Path, Done]) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in (run[0] / "store" / "saes").glob("*/record.json")]


def test_every_sae_but_the_beaten_one_is_measured_on_both_texts(
    run: tuple[Path, Done], records: list[dict[str, Any]]
) -> None:
    assert len(records) == 10
    assert run[1].out.count("retired: ") == 1
    for record in records:
        metrics = record["metrics"]
        assert metrics["fvu_foreign"] > 0
        assert metrics["l0_foreign"] > 0
        spliced = record["sae"]["control"] != "random_model"
        assert (metrics["ce_recovered"] is not None) == spliced
        assert load_sae(record["id"], store=str(run[0] / "store")).cfg["metadata"]["midiscover_id"] == record["id"]


def test_controls_are_what_they_say(records: list[dict[str, Any]]) -> None:
    by_control = {record["sae"]["control"]: record for record in records if record["kind"] == "standard"}
    assert by_control["neurons"]["metrics"]["fvu"] < 1e-6
    assert by_control["neurons"]["metrics"]["l0"] == pytest.approx(by_control["neurons"]["d_in"], rel=0.01)
    assert by_control["untrained"]["seconds"] == 0
    assert by_control["random_model"]["lineage"]["model"]["weights"] == "shuffled"
    harvests = {record["lineage"]["harvest"] for record in records}
    assert len(harvests) == 2


def test_targets_are_met_and_transcoders_predict_another_hook(records: list[dict[str, Any]]) -> None:
    steered = [record for record in records if record["sae"].get("target_l0") is not None]
    assert len(steered) == 2
    assert all(record["metrics"]["l0"] == pytest.approx(6, rel=0.15) for record in steered)
    (transcoder,) = (record for record in records if record["kind"] == "skip_transcoder")
    assert transcoder["output_hook"] == "model.layers.1"
    assert 0 < transcoder["metrics"]["fvu"] < 0.9


def test_comparison_and_report_show_kinds_seeds_controls_and_the_retired(run: tuple[Path, Done]) -> None:
    store = run[0] / "store"
    (sweep,) = (store / "sweeps").iterdir()
    compared = midiscover("runs", "compare", sweep.name, "--store", str(store)).out
    for word in ("batchtopk", "neurons", "foreign", "seed"):
        assert word in compared, word
    stability = json.loads((sweep / "stability.json").read_text())["pairs"]
    assert "seed" in {pair["axis"] for pair in stability}
    page = (sweep / "report.html").read_text()
    for word in ("skip_transcoder", "untrained", "dropped at step"):
        assert word in page, word
    shown = json.loads(midiscover("runs", "show", sweep.name, "--store", str(store), "--json").out)
    assert [sae["status"] for sae in shown["saes"]].count("retired") == 1


def test_the_second_run_makes_nothing_and_does_not_train_the_retired(run: tuple[Path, Done]) -> None:
    store = run[0] / "store"
    before = weights(str(store))
    again = midiscover("sweep", str(run[0] / "run.yaml"), "--store", str(store))
    assert again.code == 0, again.err
    assert "tokens/s" not in again.err
    assert weights(str(store)) == before
    assert again.out.count("retired: ") == 1
