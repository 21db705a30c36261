"""Features in the terminal: what stands where, with colours and without, and how lists are asked for."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from midiscover.cli.features import parse_filter, read_texts
from midiscover.errors import ConfigError, CorpusError
from midiscover.features.records import QUANTILE_SHARES, Context
from midiscover.featureview import coloured, interpretation, listing, page, spread
from midiscover.interpret import TextFeature, TextSummary, TokenFeature


def plain(shown: RenderableType, width: int = 120) -> str:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=False, color_system=None).print(shown)
    return out.getvalue()


def feature(**changes: Any) -> dict[str, Any]:
    relations = {"neighbour": "cosine", "coactive": "pearson", "neuron": "value", "input": "pearson"}
    row: dict[str, Any] = {f"{name}_index": [3, 4] for name in relations}
    row |= {f"{name}_{measure}": [0.5, -0.25] for name, measure in relations.items()}
    row |= {"pos_tokens": [" [red]", "\n"], "pos_values": [2.0, 1.0], "neg_tokens": [" no"], "neg_values": [-1.5]}
    row |= {"index": 7, "count": 12, "firing_rate": 0.0012, "mean": 1.5, "std": 0.5, "max": 4.0}
    row |= {"quantiles": [0.5 * (i + 1) for i in range(len(QUANTILE_SHARES))], "top_tokens": [" river", "[/b]"]}
    return row | {"hist_heights": [9, 0, 3], "hist_values": [0.5, 1.5, 2.5]} | changes


def context(kind: str, rank: int, *, document: int | None = 5) -> Context:
    tokens, values = [" the", " river", " [b]"], [0.5, 4.0, 0.0]
    return Context(kind, rank, None, None, None, 4.0, 11, 9, document, 8, [1, 2, 3], tokens, values)


def test_depth_follows_activation_and_the_peak_is_marked() -> None:
    text = coloured([" a", " b", " c", " d"], [0.0, 1.0, 4.0, 4.0], 4.0, peak=2)
    assert text.plain == " a b⟦ c⟧⟦ d⟧"
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert " a" not in styles
    assert styles[" c"] == "black on #109669 underline"
    assert styles[" d"] == "black on #109669"
    red = [int(styles[token].partition("#")[2][:2], 16) for token in (" b", " d")]
    assert 255 > red[0] > red[1]
    assert coloured(["x"], [0.0], 0.0).plain == "x"
    assert coloured([" a", " b"], [0.5, 0.25], 4.0, peak=1).plain == " a⟦ b⟧"  # what the context is about
    assert coloured([" a", " b"], [0.5, 0.0], 4.0, peak=1).plain == " a b"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_numbers_stand_whole_in_any_width(width: int) -> None:
    """However long the tokens are and however many features stand there."""
    long = [f" token{i}" * 3 for i in range(9)]
    rows = [feature(index=i, top_tokens=long, pos_tokens=long) for i in range(1000, 1040)]
    lines = plain(listing(rows, 4000), width).splitlines()
    assert max(map(len, lines)) <= width
    for i in range(1000, 1040):
        assert any(line.split()[:4] == [str(i), "0.120%", "1.50", "4.00"] for line in lines)


def test_tokens_are_text_and_never_markup() -> None:
    out = plain(listing([feature()], 40))
    assert "[/b]" in out
    assert "[red]" in out
    assert "1 of 40 features" in out
    assert "0.120%" in out
    assert "[b]" in plain(page("an.sae", feature(), [context("top", 0)], most=3))


def test_a_page_holds_what_is_known() -> None:
    contexts = [*(context("top", i) for i in range(4)), context("random", 0, document=None)]
    out = plain(page("an.sae", feature(), contexts, most=2))
    for part in (
        "feature 7 of an.sae",
        "0.1200% of the tokens (12)",
        "max 4.000",
        "50% 1.00",
        "3 (+0.50)",
        "4 (-0.25)",
    ):
        assert part in out
    assert out.count("doc 5") == 2
    assert out.count("window 11") == 1
    assert "Drawn from intervals" not in out
    bars = next(line for line in out.splitlines() if "█" in line).strip("\n")
    assert len(bars) >= 3
    assert bars[0] == "█"
    assert bars[1] == " " != bars[2]


def test_a_dead_feature_has_a_page() -> None:
    dead = feature(count=0, max=0.0, quantiles=[], hist_heights=[], hist_values=[], coactive_index=[])
    out = plain(page("an.sae", dead | {"coactive_pearson": []}, [], most=3))
    assert "It never fired" in out
    assert "promotes" in out


def test_contexts_of_intervals_are_spread() -> None:
    found = [context("interval", i) for i in range(10)]
    assert [c.rank for c in spread(found, 5)] == [0, 2, 4, 6, 8]
    assert [c.rank for c in spread([context("top", i) for i in range(10)], 3)] == [0, 1, 2]
    assert spread(found, 0) == []


def test_what_an_sae_sees_in_a_text() -> None:
    strongest = [TextFeature(7, 4.0, 1, 2.0, [0.0, 4.0]), TextFeature(9, 1.0, 0, 0.5, [1.0, 0.0])]
    summary = TextSummary([" the", " river"], [[TokenFeature(9, 1.0)], [TokenFeature(7, 4.0)]], strongest, strongest)
    out = plain(interpretation("an.sae", summary, {7: [" river"]}, top=5))
    assert "⟦ river⟧" in out
    assert "9 (1.00)" in out
    nothing = TextSummary([" the"], [[]], [], [])
    assert "No feature fires on this text." in plain(interpretation("an.sae", nothing, {}, top=5))


def test_filters() -> None:
    rows = [{"max": value, "count": 10 * value} for value in (1, 2, 3)]

    def kept(text: str) -> list[int]:
        return [row["max"] for row in rows if all(test(row[name], value) for name, test, value in parse_filter(text))]

    assert kept("") == [1, 2, 3]
    assert kept("max>1") == [2, 3]
    assert kept("max >= 2, count<3e1") == [2]
    assert kept("max=3") == [3]
    for wrong in ("beauty>1", "max", "max>>1", "max>1e", "max>-"):
        with pytest.raises(ConfigError, match="--filter"):
            parse_filter(wrong)


def test_texts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("one\n\n  two  \r\n", encoding="utf-8")
    assert read_texts(path) == ["one", "two"]
    path.write_bytes("\ufeffa\u2028b\r\nc\x0bd\x85e\n".encode())
    assert read_texts(path) == ["a\u2028b", "c\x0bd\x85e"]
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(CorpusError, match="not UTF-8"):
        read_texts(path)
    path.write_text("\n \n")
    with pytest.raises(CorpusError, match="holds no text"):
        read_texts(path)
    with pytest.raises(CorpusError, match="No such file"):
        read_texts(tmp_path / "absent")
