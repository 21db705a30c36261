"""Tables of concepts over a sweep: what may be the best of it, and what counts."""

from __future__ import annotations

import io
from dataclasses import asdict
from typing import Any

from midiscover import tables
from midiscover.conceptview import map_rows, sweep_tables
from midiscover.features.modules import BASELINES
from midiscover.saeconfig import TopKConfig


def document(control: Any, auroc: float, *, beats: bool) -> dict[str, Any]:
    told = "better than" if beats else "no better than"
    return {
        "concept": "numbers",
        "sae": f"l1.mlp.topk-64.k-30.{control}.0",
        "of": {"hook": "h.1.mlp", "layer": 1, "d_sae": 64, "seed": 0, "sae": asdict(TopKConfig(k=30, control=control))},
        "sae_scores": {
            "features": [{"feature": 7, "auroc": auroc, "passes": True, "peaks": []}],
            "auroc_first": auroc,
            "auroc_held_out": auroc,
        },
        "against": {name: {"first": {"told": told}} for name in BASELINES},
    }


def printed(documents: list[dict[str, Any]]) -> str:
    file = io.StringIO()
    tables.show(sweep_tables(documents), file)
    return " ".join(file.getvalue().split())


def test_controls_have_columns_and_win_nothing() -> None:
    documents = [document("none", 0.8, beats=True), document("frozen_decoder", 0.95, beats=True)]
    text = printed(documents)
    assert "0.80*" in text
    assert "0.95*" in text
    assert f"numbers {documents[0]['sae'].removesuffix('.0')} 7 0.80" in text
    assert "shown among 1," in text
    assert "Controls are neither picked nor counted." in text
    assert "Of 1 concepts, the first feature beats" in text
    assert "Controls are" not in printed(documents[:1])
    assert f"numbers {documents[1]['sae'].removesuffix('.0')} 7 0.95" in printed(documents[1:])  # nothing else is there


def test_rows_of_the_map_tell_controls() -> None:
    assert [row["control"] for row in map_rows([document("untrained", 0.5, beats=False)])] == ["untrained"]
