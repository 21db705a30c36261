"""`midiscover figure` on a store that was written by hand."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from midiscover.cli.figures import OF_BOTH, OF_FEATURE, OF_SAE, OF_SWEEP, VERBS, concept_rows, parse_feature
from midiscover.errors import ConfigError, NotFoundError, UserError
from midiscover.features.records import CONTEXTS, FEATURES, GROUP
from midiscover.saeconfig import StandardConfig
from midiscover.store import layout
from midiscover.store.storage import Storage, open_store
from tests.unit.figures.samples import feature_row
from tests.unit.plain_tables import plain_tables

SWEEP = "made.0123456789"
CONTROLS = "only.0123456789"
"""A sweep of untrained SAEs."""
FEATURES_OF_SAE = 3


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    storage = open_store(str(tmp_path_factory.mktemp("store")))
    rows, curves, densities = plain_tables(layers=(10, 15), l1s=(3, 8))
    put_sweep(storage, SWEEP, rows, curves, densities)
    put_features(storage, rows[0]["sae_id"])
    tables = plain_tables(layers=(10, 15), l1s=(1,))
    for table in tables:
        for row in table:
            row["sae_id"] = row["sae_id"].replace(".0123", ".untrained.0123")
    put_sweep(storage, CONTROLS, *tables, control="untrained")
    return storage


def put_sweep(storage: Storage, name: str, rows: list, curves: list, densities: list, control: Any = "none") -> None:
    for row in rows:
        row |= {"control": control, "output_hook": row["hook"], "target_l0": None}
        put_sae(storage, row, curves, densities)
    planned = [{key: row[key] for key in row if key not in ("l0", "fvu")} for row in rows]
    sweep = {"v": 1, "id": name, "config": {"name": name[:4]}, "evaluation_id": "e.1", "saes": planned}
    put(storage, layout.sweep_record(name), sweep | {"sae_ids": [row["sae_id"] for row in rows]})


def put(storage: Storage, key: str, document: dict[str, Any]) -> None:
    storage.write(key, json.dumps(document).encode())


def put_sae(storage: Storage, row: dict[str, Any], curves: list, densities: list) -> None:
    sae = row["sae_id"]
    history = [point for point in curves if point["sae_id"] == sae]
    columns = {key: [point[key] for point in history] for key in ("step", "tokens", "loss", "mse", "l0", "fvu")}
    bins = [bin for bin in densities if bin["sae_id"] == sae]
    edges = [bin["log10_low"] for bin in bins] + [bins[-1]["log10_high"]]
    density = {"counts": [bin["count"] for bin in bins], "log10_edges": edges}
    put(storage, layout.record(sae), {"id": sae, "seconds": 1.0})
    put(storage, layout.training(sae), {"history": columns})
    put(storage, layout.evaluation(sae, "e.1"), {"metrics": row | {"density": density}})
    settings = vars_of(StandardConfig(l1_coefficient=row["l1"], control=row["control"]))
    judged = [{"feature": f, "auroc": 0.6 + 0.1 * f, "passes": f > 0} for f in range(FEATURES_OF_SAE)]
    for concept in ("zebras", "numbers", "emotions"):
        of = {"hook": row["hook"], "layer": row["layer"], "sae": settings}
        document = {"concept": concept, "sae": sae, "of": of, "sae_scores": {"features": judged}}
        put(storage, layout.concept_scores(sae, concept), document)


def vars_of(config: StandardConfig) -> dict[str, Any]:
    import dataclasses

    return dataclasses.asdict(config)


def put_features(storage: Storage, sae: str) -> None:
    rows = [feature_row(index, dead=index == 2) for index in range(FEATURES_OF_SAE)]
    context = {"feature": 1, "kind": "top", "rank": 0, "bin_min": -1.0, "bin_max": 8.0, "bin_share": -1.0, "value": 8.0}
    place = {"window": 2, "position": 5, "document": None, "start": 4, "token_ids": [1, 2], "tokens": ["A", " dog"]}
    files = {}
    tables = {FEATURES: rows, CONTEXTS: [context | place | {"values": [1.0, 8.0]}]}
    for name, table in tables.items():
        file = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(table), file, row_group_size=GROUP)
        storage.write(layout.features_file(sae, "f.1", name), file.getvalue())
        files[name] = {"sha256": hashlib.sha256(file.getvalue()).hexdigest(), "bytes": len(file.getvalue())}
    manifest = {"v": 1, "sae": sae, "features_id": "f.1", "d_sae": FEATURES_OF_SAE, "tokens": 5000}
    manifest |= {"files": files, "created": "2026"}
    put(storage, layout.features_manifest(sae, "f.1"), manifest)


def figure(store: Storage, *arguments: str) -> None:
    VERBS["figure"]([*arguments, "--store", store.uri])


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


SAE = "l10.mlp-down_proj.standard-4608.l1-3"
WITH_DATA = [name for name in OF_SWEEP if name not in ("foreign", "stability")]


@pytest.mark.parametrize("name", [*WITH_DATA, *OF_BOTH])
def test_charts_of_a_sweep(store: Storage, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / f"{name}.csv"
    figure(store, "made", name, "--out", str(out))
    assert capsys.readouterr().out == f"{out}\n"
    assert len(table(out)) >= 4


@pytest.mark.parametrize("name", [name for name in OF_SAE if name != "norms"])
def test_charts_of_an_sae(store: Storage, name: str, tmp_path: Path) -> None:
    out = tmp_path / "chart.csv"
    figure(store, SAE, name, "--out", str(out), *(["--feature", "1"] if name in OF_FEATURE else []))
    assert table(out)


def test_frontier_has_what_was_measured(store: Storage, tmp_path: Path) -> None:
    rows, _, _ = plain_tables(layers=(10, 15), l1s=(3, 8))
    figure(store, SWEEP, "frontier", "--out", str(tmp_path / "f.csv"))
    found = {line["sae"]: (float(line["l0"]), float(line["fvu"])) for line in table(tmp_path / "f.csv")}
    assert found == {row["sae_id"]: (float(f"{row['l0']:.5g}"), float(f"{row['fvu']:.5g}")) for row in rows}


def test_losses_name_their_saes(store: Storage, tmp_path: Path) -> None:
    _, curves, _ = plain_tables(layers=(10, 15), l1s=(3, 8))
    figure(store, SWEEP, "losses", "--measure", "fvu", "--out", str(tmp_path / "l.csv"))
    found = {(line["sae"], int(line["tokens"]), float(line["fvu"])) for line in table(tmp_path / "l.csv")}
    assert found == {(point["sae_id"], point["tokens"], float(f"{point['fvu']:.5g}")) for point in curves}


@pytest.mark.parametrize(("name", "kind"), [("activations", "Activations"), ("logits", "Logits")])
def test_a_feature_is_called_as_asked(store: Storage, name: str, kind: str, tmp_path: Path) -> None:
    for feature, title in (("1=Dogs", f"{kind} of Dogs (feature 1) of {SAE}"), ("1", f"{kind} of feature 1 of {SAE}")):
        figure(store, SAE, name, "--feature", feature, "--out", str(tmp_path / "f.svg"))
        assert title in (tmp_path / "f.svg").read_text()


def test_concepts_in_the_order_of_the_modules(store: Storage, tmp_path: Path) -> None:
    figure(store, SAE, "concepts", "--out", str(tmp_path / "c.csv"))
    assert list(dict.fromkeys(line["concept"] for line in table(tmp_path / "c.csv"))) == [
        "emotions",
        "numbers",
        "zebras",
    ]


def test_heat_maps_of_saes_that_share_a_name_have_their_whole_ids(tmp_path: Path) -> None:
    storage = open_store(str(tmp_path))
    names = [*(f"{SAE}.{digit * 10}" for digit in "ab"), f"{SAE}0.cccccccccc"]
    for name in names:
        judged = {"features": [{"feature": 1, "auroc": 0.9, "passes": True}]}
        of = {"hook": "model.layers.10.mlp.down_proj", "layer": 10, "sae": vars_of(StandardConfig(l1_coefficient=3))}
        put(storage, layout.concept_scores(name, "numbers"), {"concept": "numbers", "of": of, "sae_scores": judged})
    assert [row["label"] for row in concept_rows(storage, names)] == [*names[:2], f"{SAE}0"]


def test_cards_beneath_each_other_with_titles(store: Storage, tmp_path: Path) -> None:
    out = tmp_path / "cards.svg"
    figure(store, SAE, "card", "--feature", "1=Dogs <3", "--feature", "2", "--out", str(out))
    svg = out.read_text()
    assert "Dogs &lt;3 (feature 1)" in svg
    assert f"Feature 2 of {SAE}" in svg


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ([SAE, "nothing", "--out", "x.png"], ConfigError, "'nothing' is no chart; known are frontier"),
        ([SAE, "frontier", "--out", "x.png"], ConfigError, "is of a sweep"),
        ([SAE, "concept-map", "--out", "x.png"], ConfigError, "compares the SAEs of a sweep"),
        ([SWEEP, "dead", "--out", "x.png"], ConfigError, f"is of one SAE; give one of this sweep, such as {SAE}"),
        ([SAE, "card", "--out", "x.png"], ConfigError, "card needs one --feature"),
        ([SWEEP, "map", "--measure", "loss", "--out", "x.png"], ConfigError, "map takes no --measure; losses does"),
        ([CONTROLS, "map", "--out", "x.png"], NotFoundError, f"leaves controls out, and {CONTROLS} has results of"),
        ([CONTROLS, "layer-density", "--out", "x.html"], NotFoundError, "layer-density leaves controls out"),
        ([CONTROLS, "concept-map", "--out", "x.png"], NotFoundError, "concept-map leaves controls out"),
        ([SAE, "dead", "--feature", "1", "--out", "x.png"], ConfigError, "dead takes no --feature"),
        ([SAE, "logits", "--feature", "1", "--feature", "2", "--out", "x.png"], ConfigError, "logits needs one"),
        ([SAE, "card", "--feature", "-1", "--out", "x.png"], ConfigError, "--feature '-1' is not understood"),
        ([SAE, "card", "--feature", "3", "--out", "x.png"], NotFoundError, "has no feature 3"),
        ([SAE, "card", "--feature", "1", "--out", "x.gif"], UserError, "the name may end in"),
        ([SAE, "dead", "--out", "/nowhere/x.png"], ConfigError, "There is no folder /nowhere"),
        ([SWEEP, "foreign", "--out", "x.png"], NotFoundError, "measured on no foreign text"),
        ([SWEEP, "stability", "--out", "x.png"], NotFoundError, "none of its grid are neighbours"),
        (["l15.mlp-down_proj.standard-4608.l1-8", "dead", "--out", "x.png"], NotFoundError, "midiscover features"),
    ],
)
def test_wrong_input_is_one_sentence_and_writes_nothing(
    store: Storage,
    arguments: list[str],
    error: type[UserError],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words) as raised:
        figure(store, *arguments)
    assert raised.value.exit_code == 2
    assert not list(tmp_path.iterdir())


def test_features_and_their_titles() -> None:
    assert parse_feature("17") == (17, None)
    assert parse_feature(" 17 = a = b") == (17, "a = b")
    assert parse_feature("17=") == (17, None)
