"""Contexts as pictures: every token in its place, nothing over anything else, grounds as Neuronpedia has them."""

from __future__ import annotations

import itertools
import math
import struct

import pytest

from midiscover import figures
from midiscover.features.records import Context
from midiscover.figures.contexts import CHARACTER, GUTTER, LINE, PLACE, WIDTH, cells, contexts_chart, cut, ground
from midiscover.tokens import shown
from tests.unit.figures.samples import WEIRD, SampleContext, context
from tests.unit.test_figures import lab, luminance, parts

WORDS = ["It", "rained", "for", "forty", "days", "and", "forty", "nights", ",", "and", "the", "waters", "rose"]


def size(png: bytes) -> tuple[int, int]:
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def tokens_of(chart: figures.Chart) -> list[dict]:
    return [dict(row) for name, rows in figures.data(chart).items() if name.endswith("tokens") for row in rows]


def lines_of(rows: list[dict]) -> list[str]:
    """The text as it stands on the picture, read back from where each token is drawn."""
    lines = []
    for _, line in itertools.groupby(rows, key=lambda row: row["top"]):
        text = ""
        for row in line:
            column = round((row["start"] - GUTTER) / CHARACTER)
            assert cells(text) <= column, "a token stands over the one before"
            text += " " * (column - cells(text)) + row["text"].replace("\N{NO-BREAK SPACE}", " ")
        lines.append(text)
    return lines


@pytest.mark.parametrize("count", [1, 5, 13, 80])
def test_the_text_reads_as_it_is_and_wraps_between_tokens(count: int) -> None:
    tokens = [f" {word}" for word in itertools.islice(itertools.cycle(WORDS), count)]
    rows = tokens_of(contexts_chart([context(tokens=tokens, peak=0)], lines=10))
    columns = int((WIDTH - GUTTER - PLACE) / CHARACTER)
    naive, line = [], ""
    for token in tokens:
        if len(line) + len(token) > columns:
            naive.append(line)
            line = ""
        line += token
    assert lines_of(rows) == [*naive, line]
    assert max(row["right"] for row in rows) <= WIDTH - PLACE


def test_tokens_that_could_break_a_picture_keep_their_room() -> None:
    rows = tokens_of(contexts_chart([context(tokens=WEIRD, peak=0)], lines=10))
    assert [row["token"] for row in rows] == WEIRD
    for before, after in itertools.pairwise(rows):
        assert after["top"] > before["top"] or after["left"] == pytest.approx(before["right"], abs=0.02)
    wide = next(row for row in rows if row["token"] == " 中文字")
    assert wide["right"] - wide["left"] == pytest.approx(7 * CHARACTER, abs=0.02)
    assert next(row for row in rows if row["token"] == "\n\n")["text"] == "↵↵"
    # An override would turn the text around it.
    assert not any("\u202e" in row["text"] for row in rows)
    assert rows[-1]["text"].endswith("…")


def test_a_long_context_keeps_what_stands_around_its_peak() -> None:
    tokens = [f" word{place}" for place in range(400)]
    for peak in (0, 200, 399):
        rows = tokens_of(contexts_chart([context(tokens=tokens, peak=peak)], lines=2))
        assert len({row["top"] for row in rows}) <= 2
        assert [row["token"] for row in rows if row["peak"]] == [tokens[peak]]
        kept = [row["token"] for row in rows if row["token"] != "…"]
        first = tokens.index(kept[0])
        assert kept == tokens[first : first + len(kept)]
        assert (rows[0]["token"] == "…", rows[-1]["token"] == "…") == (first > 0, first + len(kept) < 400)
        if peak == 200:
            assert 200 - first > first + len(kept) - 201 > 3


def test_grounds_are_neuronpedias() -> None:
    for share in (1e-4, 0.01, 0.3, 1.0):
        assert ground(4 * share, 4) == pytest.approx(0.05 + math.log10(1 + 9 * share) * 0.95, abs=1e-4)
    assert ground(4.9e-5, 1) == ground(0, 1) == ground(1, 0) == 0
    assert ground(9, 4) == 1
    rows = tokens_of(contexts_chart([context(value=2.0)], highest=8.0))
    assert [row["ground"] for row in rows] == [ground(value, 8) for value in (0.2222, 0.5, 2.0)]


def test_contexts_of_one_kind_stand_under_one_heading_and_never_overlap() -> None:
    long = [f" {word}" for word in WORDS * 5]
    contexts = [context(), context(tokens=long), context("interval", bin_min=2.0), context("random", document=None)]
    chart = contexts_chart(contexts)
    notes = [row for name, rows in figures.data(chart).items() if name == "notes" for row in rows]
    headings = [note for note in notes if note["bold"]]
    assert [note["text"] for note in headings] == ["Highest activations", "Drawn from intervals", "Drawn at random"]
    assert [note["text"] for note in notes if note["text"].startswith(("doc", "window"))][-2:] == ["doc 3", "window 12"]
    edges = {}
    for row in tokens_of(chart):
        top, bottom = edges.get(row["context"], (math.inf, 0))
        edges[row["context"]] = (min(top, row["top"]), max(bottom, row["bottom"]))
    for (_, above), (below, _) in itertools.pairwise(edges.values()):
        assert above < below
    for heading in headings:
        assert not any(top < heading["middle"] < bottom for top, bottom in edges.values())


def test_feature_records_are_contexts_as_they_are() -> None:
    made = Context("top", 0, -1.0, 8.0, -1.0, 8.0, 12, 42, 3, 40, [1, 2, 3], ["The", " dog", " ran"], [1.0, 2.0, 8.0])
    sample = SampleContext("top", -1.0, 8.0, made.tokens, made.values, 2, 12, 42, 3)
    assert contexts_chart([made]).to_json() == contexts_chart([sample]).to_json()


def test_no_context_draws_and_a_picture_is_as_wide_as_it_says() -> None:
    assert figures.png(contexts_chart([]), scale=1).startswith(b"\x89PNG")
    assert size(figures.png(contexts_chart([context(tokens=WEIRD)]), scale=1))[0] == 900
    assert size(figures.png(contexts_chart([context()], width=600), scale=1))[0] == 624


def test_text_is_legible_on_the_deepest_ground() -> None:
    spec = contexts_chart([context()]).to_dict()
    colours = {part["color"] for part in parts(spec) if isinstance(part.get("color"), str)}
    green, ink = "#34d399", "#1f2328"
    assert {green, ink} <= colours
    assert (luminance(green) + 0.05) / (luminance(ink) + 0.05) > 7
    assert lab_distance(green, "#ffffff") > 40


def lab_distance(a: str, b: str) -> float:
    from tests.unit.test_figures import linear

    return float(sum((x - y) ** 2 for x, y in zip(lab(linear(a)), lab(linear(b)), strict=True)) ** 0.5)


def test_cutting_counts_columns() -> None:
    assert (cut("abcdef", 6), cut("abcdefg", 6)) == ("abcdef", "abcde…")
    assert cut("中文字", 5) == "中文…"
    assert cells("e\u0301") == 1
    assert shown("") == "·"
    assert LINE > 11
