"""Dashboard batches beside the Neuronpedia rows that they must agree with, and in SAEDashboard's own class."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from midiscover.config import NeuronpediaConfig
from midiscover.features.records import open_features
from midiscover.publish.dashboard import BATCH, Dashboards
from midiscover.publish.neuronpedia import ModelFacts, NeuronpediaExport
from midiscover.store.local import LocalStorage
from tests.unit.features.naive import D_IN, D_SAE
from tests.unit.publish import folders
from tests.venvs import cached_venv, checked

FACTS = ModelFacts(name="microsoft/phi-2", model_type="phi", layers=32, d_model=D_IN, neurons_per_layer=24)
PROBE = """
import json, sys
from sae_dashboard.neuronpedia.neuronpedia_dashboard import NeuronpediaDashboardBatch
for path in sys.argv[1:]:
    given = json.load(open(path))
    batch = NeuronpediaDashboardBatch(**given)
    assert len(batch.features) == len(given["features"])
    first = next(feature for feature in batch.features if feature.activations)
    print(type(batch).__name__, type(first).__name__, type(first.activations[0]).__name__)
    given["features"][0]["more"] = 1
    try:
        NeuronpediaDashboardBatch(**given)
    except TypeError:
        print("refuses what it does not know")
"""


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("store")
    sae = folders.write_sae(root)
    folders.add_features(root, sae)
    record, cfg = folders.get_json(sae / "record.json"), folders.get_json(sae / "cfg.json")
    made = NeuronpediaExport(record, cfg, FACTS, NeuronpediaConfig())
    return dict(made.files(open_features(LocalStorage(root), sae.name)))


def lines(export: dict[str, bytes], table: str) -> list[dict[str, Any]]:
    (name,) = [name for name in export if f"/{table}/batch-" in name]
    return [json.loads(line) for line in gzip.decompress(export[name]).decode().rstrip("\n").split("\n")]


def batches(export: dict[str, bytes]) -> list[dict[str, Any]]:
    names = [name for name in export if name.startswith("dashboards/batch-")]
    return [json.loads(export[f"dashboards/batch-{number}.json"]) for number in range(len(names))]


def test_features_and_activations_are_those_of_the_rows(export: dict[str, bytes]) -> None:
    (batch,) = batches(export)
    assert (batch["model_id"], batch["layer"]) == ("phi-2", 1)
    rows, activations = lines(export, "features"), lines(export, "activations")
    assert [feature["feature_index"] for feature in batch["features"]] == list(range(D_SAE))
    for feature, row in zip(batch["features"], rows, strict=True):
        assert feature["frac_nonzero"] == row["frac_nonzero"]
        assert feature["pos_str"] == row["pos_str"]
        assert feature["correlated_neurons_pearson"] == row["correlated_neurons_pearson"]
        mine = [found for found in activations if found["index"] == row["index"]]
        assert [found["values"] for found in feature["activations"]] == [found["values"] for found in mine]
        for found in feature["activations"]:
            assert found["tokens"][found["qualifying_token_index"]] is not None
            if found["bin_min"] == -1:
                assert found["values"][found["qualifying_token_index"]] == max(found["values"])


def test_batches_count_on_across_files() -> None:
    """The Neuronpedia files hold more features than a batch; numbers go on where the last one ended."""
    source = {"num_prompts": 3, "num_tokens_in_prompt": 8, "dataset": "builtin"}
    made = Dashboards("phi-2", 1, "mdc", source)
    names: dict[str, Any] = dict.fromkeys(
        (
            *("neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1"),
            *("correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson"),
            *("correlated_features_indices", "correlated_features_l1", "correlated_features_pearson"),
            *("neg_str", "neg_values", "pos_str", "pos_values", "frac_nonzero", "decoder_weights_dist", "vector"),
            *("freq_hist_data_bar_values", "freq_hist_data_bar_heights"),
            *("logits_hist_data_bar_heights", "logits_hist_data_bar_values"),
        ),
        0,
    )

    def rows(start: int, stop: int) -> list[dict[str, Any]]:
        return [names | {"index": str(index)} for index in range(start, stop)]

    found = [*made.batches(0, rows(0, 1024), []), *made.batches(1024, rows(1024, 1300), [])]
    assert [name for name, _ in found] == [f"dashboards/batch-{number}.json" for number in range(11)]
    indices = [feature["feature_index"] for _, data in found for feature in json.loads(data)["features"]]
    assert indices == list(range(1300))
    assert BATCH == 128


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_saedashboards_own_class_reads_them(export: dict[str, bytes], tmp_path: Path) -> None:
    """The class that SAEDashboard 0.8.0 reads its output with, which knows every field by name."""
    python = cached_venv("sae-dashboard-0.8.0", [["numpy<3"], ["--no-deps", "sae-dashboard==0.8.0"]])
    paths = []
    for name, data in export.items():
        if name.startswith("dashboards/batch-"):
            path = tmp_path / name.rpartition("/")[2]
            path.write_bytes(data)
            paths.append(str(path))
    told = checked([str(python), "-c", PROBE, *paths]).splitlines()
    assert told == [
        "NeuronpediaDashboardBatch NeuronpediaDashboardFeature NeuronpediaDashboardActivation",
        "refuses what it does not know",
    ]
