"""Tables of concepts over a sweep: what may be the best of it, and what counts."""

from __future__ import annotations

import io
import re
from dataclasses import asdict
from typing import Any

import pytest

from midiscover import tables
from midiscover.conceptview import concept_table, heat_rows, map_rows, short_names, sweep_tables
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


SAME = [
    ({"seed": 0}, {"seed": 1}, ("seed 0", "seed 1")),
    ({"train": {"lr": 0.001}}, {"train": {"lr": 0.01}}, ("lr 0.001", "lr 0.01")),
    ({}, {}, ("aaaaaaaaaa", "bbbbbbbbbb")),  # in nothing that a heading has a name for
]


@pytest.mark.parametrize(("first", "second", "told"), SAME)
def test_saes_of_the_same_name_are_told_apart(
    first: dict[str, Any], second: dict[str, Any], told: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    documents = [document("none", auroc, beats=True) for auroc in (0.8, 0.9)]
    for place, (found, facts) in enumerate(zip(documents, (first, second), strict=True)):
        found["sae"] = "l1.mlp.topk-64.k-30." + "ab"[place] * 10
        found["of"] |= facts
    text = printed(documents)
    before = text.partition("0.80*")[0]
    assert told[0] in before
    assert told[1] in before.partition(told[0])[2], "as headings, in the order of the scores below"
    assert f"numbers {documents[1]['sae']} 7 0.90" in text
    assert f"{documents[0]['sae']} " not in text


def test_a_name_is_as_short_as_it_can_be() -> None:
    assert short_names(["l1.k-3.aa", "l1.k-3.bb", "l1.k-4.aa", "mine"]) == {
        "l1.k-3.aa": "l1.k-3.aa",
        "l1.k-3.bb": "l1.k-3.bb",
        "l1.k-4.aa": "l1.k-4",
        "mine": "mine",
    }


def test_rows_of_the_map_tell_controls() -> None:
    assert [row["control"] for row in map_rows([document("untrained", 0.5, beats=False)])] == ["untrained"]


def test_a_cell_shows_the_score_that_was_judged() -> None:
    first, other = document("none", 0.9, beats=True), document("none", 0.6, beats=True) | {"concept": "questions"}
    other["sae_scores"] = {"features": [{"feature": 3, "auroc": 0.6, "passes": False, "peaks": []}]}
    held_out = {(first["sae"], "numbers"): [0.5] * 8, (first["sae"], "questions"): [0.4] * 8}
    cells = {(row["concept"], row["feature"]): row for row in heat_rows([first, other], held_out, 1, name="SAE")}
    assert {place: (cell["auroc"], cell["passes"]) for place, cell in cells.items()} == {
        ("numbers", 7): (0.9, True),
        ("numbers", 3): (0.5, False),
        ("questions", 7): (0.4, False),
        ("questions", 3): (0.6, False),
    }


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (80, ["max", "mean", "wise p"]),
        (100, ["max", "mean", "d", "wise p", "tokens"]),
        (120, ["max", "mean", "d", "p", "wise p", "q", "tokens"]),
    ],
)
def test_a_narrow_terminal_has_fewer_numbers_and_whole_words(
    width: int, shown: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    feature = {"feature": 7, "by": "max", "auroc_max": 0.982, "auroc_mean": 0.971, "effect": 2.71, "passes": True}
    chances = {"p": 1e-12, "family_wise_p": 0.001, "q_all_texts": 1e-18}
    features = [feature | chances | {"peaks": ["2", "3", "9", " ten"]}]
    texts = {"concept": "numbers", "texts": ["one"], "controls": ["none"], "controls_are": "own"}
    file = io.StringIO()
    tables.show(
        concept_table(texts | {"sae_scores": {"features": features}, "verdict": "-"}, {7: ["6", "8", "70"]}), file
    )
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "'2'  '3'  '9'  ' ten'" in file.getvalue()
    assert ("'6'  '8'  '70'" in file.getvalue()) == ("tokens" in shown)
    assert re.findall(r"max|mean|wise p|\b[dpq]\b|tokens", lines[3]) == shown
