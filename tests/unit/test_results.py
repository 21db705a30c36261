"""Tables of a sweep, and which features its SAEs have in common, from SAEs as they lie in a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from midiscover import results
from midiscover.config import TrainConfig
from midiscover.configio import to_tree
from midiscover.figures import frontier_chart, map_chart
from midiscover.results import CURVES, ROW_METRICS, sae_stability, sweep_results
from midiscover.saeconfig import StandardConfig
from midiscover.store import layout
from midiscover.store.documents import dump
from midiscover.store.storage import Storage, open_store

D_IN, D_SAE = 64, 40
DENSITY = {"counts": [1, 2], "log10_edges": [-3.0, -2.0, -1.0]}


def directions(seed: int) -> Tensor:
    rows = torch.randn(D_SAE, D_IN, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=1)


def put(storage: Storage, sae_id: str, decoder: Tensor, dead: int = 0) -> None:
    """A folded SAE; its last `dead` features never fire."""
    cfg = {"architecture": "standard", "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32"}
    bias = {"b_enc": torch.zeros(D_SAE), "b_dec": torch.zeros(D_IN)}
    weights = {"W_enc": decoder.T.contiguous(), "W_dec": decoder, **bias}
    rate = torch.full((D_SAE,), 1e-6)
    rate[D_SAE - dead :] = 0
    storage.write(layout.sae_file(sae_id, "cfg.json"), dump(cfg))
    storage.write(layout.sae_file(sae_id, "sae_weights.safetensors"), save(weights))
    storage.write(layout.sae_file(sae_id, "sparsity.safetensors"), save({"sparsity": torch.log10(rate + 1e-10)}))


def row(sae_id: str, **changes: Any) -> dict[str, Any]:
    settings = {"kind": "standard", "control": "none", "l1": 5.0, "k": None, "target_l0": None, "d_sae": D_SAE}
    base = {"sae_id": sae_id, "hook": "h.1.mlp", "output_hook": "h.1.mlp", "layer": 1, "seed": 0}
    return base | settings | {"sparsity_label": "l1 5"} | changes


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_store(str(tmp_path / "store"))


def test_rows_tell_what_their_saes_differ_in_and_what_the_sweep_measured(storage: Storage) -> None:
    """A learning rate stands in records only; what a record measured may be another sweep's."""
    found = {1e-3: 0.2, 3e-3: 0.6}
    for lr, fvu in found.items():
        metrics = dict.fromkeys(ROW_METRICS, 0.5) | {"fvu": fvu, "tokens": 5000, "density": DENSITY}
        trained = {"sae": to_tree(StandardConfig()), "train": to_tree(TrainConfig(lr=lr))}
        record = {"id": str(lr), "hook": "h.1.mlp", "seconds": 1.0, "metrics": metrics | {"tokens": 14_416, "fvu": 0.1}}
        storage.write(layout.record(str(lr)), dump(record | trained))
        storage.write(layout.training(str(lr)), dump({"history": dict.fromkeys(CURVES, [1.0])}))
        storage.write(layout.evaluation(str(lr), "e.1"), dump({"metrics": metrics}))
    tables = sweep_results(storage, {"id": "lr.0", "saes": [row(str(lr)) for lr in found], "evaluation_id": "e.1"})
    told = [(row["variant"], row["fvu"], row["tokens"]) for row in tables.rows]
    assert told == [("lr 0.001", 0.2, 5000), ("lr 0.003", 0.6, 5000)]
    assert {bin["variant"] for bin in tables.densities} == {"lr 0.001", "lr 0.003"}
    cells = map_chart(tables.rows).to_dict()["data"]["values"]
    assert [(cell["group"], cell["fvu"]) for cell in cells] == [("lr 0.001", 0.2), ("lr 0.003", 0.6)]


def test_a_sweep_of_the_first_release_has_its_tables(storage: Storage) -> None:
    """Its rows know neither output hook, label, control nor target."""
    metrics = dict.fromkeys(ROW_METRICS, 0.5) | {"density": DENSITY}
    settings = {"sae": to_tree(StandardConfig()), "train": to_tree(TrainConfig())}
    storage.write(
        layout.record("a"), dump({"id": "a", "hook": "h.1.mlp", "seconds": 1.0, "metrics": metrics} | settings)
    )
    storage.write(layout.training("a"), dump({"history": dict.fromkeys(CURVES, [1.0])}))
    storage.write(layout.evaluation("a", "e.1"), dump({"metrics": metrics}))
    new = ("output_hook", "control", "sparsity_label", "target_l0")
    old = {name: value for name, value in row("a").items() if name not in new}
    tables = sweep_results(storage, {"id": "s.0", "saes": [old], "evaluation_id": "e.1"})
    (now,) = sweep_results(storage, {"id": "s.0", "saes": [row("a")], "evaluation_id": "e.1"}).rows
    assert {**tables.rows[0], "target_l0": None} == now
    assert frontier_chart(tables.rows).to_dict()


def test_pairs_are_loaded_compared_and_plain(storage: Storage) -> None:
    """Two seeds that share half of their features, and one whose shared half is dead; an untrained control."""
    first, other = directions(0), directions(1)
    put(storage, "a", first)
    put(storage, "b", torch.cat([first[:20], other[20:]]))
    put(storage, "c", torch.cat([other[:20], first[20:]]), dead=20)
    put(storage, "d", directions(7))
    rows = [row("a"), row("b", seed=1), row("c", seed=2), row("d", control="untrained")]
    found = {(pair["a"], pair["b"]): pair for pair in sae_stability(storage, rows)}
    assert {names: (pair["axis"], pair["matched"]) for names, pair in found.items()} == {
        ("a", "b"): ("seed", 0.5),
        ("a", "c"): ("seed", 0),
        ("b", "c"): ("seed", 0),
        ("a", "d"): ("control", 0),
    }
    assert (found["a", "c"]["live_a"], found["a", "c"]["live_b"]) == (40, 20)
    assert found["a", "b"]["setting"] == "standard 40 l1 5"
    dump(list(found.values()))  # JSON can hold them


def test_a_huge_sweep_is_compared_up_to_a_number_of_pairs(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "DECODERS_HELD", 2)
    rows = []
    for l1 in (1.0, 2.0, 3.0):
        for seed in (0, 1):
            put(storage, f"{l1} {seed}", directions(0))
            rows.append(row(f"{l1} {seed}", l1=l1, seed=seed))
    assert [pair["axis"] for pair in sae_stability(storage, rows, most=4)] == ["seed"] * 3 + ["sparsity"]
    assert sae_stability(storage, rows, most=0) == []
