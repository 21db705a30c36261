"""Charts as files of every format: what they hold, and that none asks for anything."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from midiscover import figures
from midiscover.errors import UserError
from tests.unit.figures.samples import WEIRD, context, feature_row
from tests.unit.plain_tables import plain_tables
from tests.unit.test_report import Page

STARTS = {".png": b"\x89PNG", ".svg": b"<svg", ".pdf": b"%PDF", ".html": b"<!doctype html>", ".csv": b"table,"}


def card() -> figures.Chart:
    return figures.feature_card(feature_row(tokens=WEIRD), [context(tokens=WEIRD)], "</script><b> & 'x'")


@pytest.mark.parametrize("suffix", list(figures.FORMATS))
def test_the_suffix_says_what_is_written(suffix: str, tmp_path: Path) -> None:
    for name in (f"chart{suffix}", f"CHART{suffix.upper()}"):
        figures.save(card(), tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(STARTS[suffix])


@pytest.mark.parametrize("name", ["chart.jpg", "chart", ".png"])
def test_another_suffix_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the name may end in \.png, \.svg, \.pdf, \.html, \.csv"):
        figures.save(card(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_csv_holds_the_rows_of_one_table() -> None:
    rows, _, _ = plain_tables()
    read = list(csv.DictReader(io.StringIO(figures.csv(figures.frontier_chart(rows)))))
    assert {(line["sae"], float(line["l0"]), float(line["fvu"])) for line in read} == {
        (row["sae_id"], float(f"{row['l0']:.5g}"), float(f"{row['fvu']:.5g}")) for row in rows
    }
    assert "table" not in read[0]


def test_csv_holds_numbers_and_nothing_that_only_draws() -> None:
    rows, _, _ = plain_tables()
    rows = [row | {"fvu_foreign": 0.5} for row in rows]
    rows[0] |= {"d_sae": 16_384, "ce_recovered": None}
    read = {line["sae"]: line for line in csv.DictReader(io.StringIO(figures.csv(figures.frontier_chart(rows))))}
    for row in rows:
        line = read[row["sae_id"]]
        assert line["d_sae"] == str(row["d_sae"])
        assert line["ce_recovered"] == ("" if row["ce_recovered"] is None else f"{row['ce_recovered']:.5g}")
        assert line["dead_share"] == f"{row['dead_share']:.5g}"
    assert not {"width", "line", "colour", "note"} & set(read[rows[0]["sae_id"]])
    charts = [figures.map_chart(rows), figures.dead_chart([{"value": 0.5}]), figures.foreign_chart(rows), card()]
    for chart in [*charts, figures.frontier_chart(rows)]:
        columns = next(csv.reader(io.StringIO(figures.csv(chart))))
        assert len(columns) > 1
        assert not [name for name in columns if name.endswith(("_text", "_ink", "_head")) or name in ("left", "ground")]


def test_csv_of_a_card_names_its_tables_and_keeps_every_token() -> None:
    read = list(csv.DictReader(io.StringIO(figures.csv(card()))))
    tables = {line["table"] for line in read}
    assert tables == {"activations", "notes", "promotes", "suppresses", "tokens"}
    tokens = [line for line in read if line["table"] == "tokens"]
    assert [line["token"] for line in tokens][: len(WEIRD) - 1] == WEIRD[:-1]
    counts = [int(line["count"]) for line in read if line["table"] == "activations"]
    assert counts == feature_row()["hist_heights"]
    assert all(line["count"] == "" for line in tokens)


def test_the_page_asks_for_nothing_and_no_token_ends_a_script() -> None:
    page = Page(figures.html(card()))
    assert not page.of("link", "img", "iframe", "object", "embed")
    assert all("src" not in attributes for attributes in page.of("script"))
    policy = next(m["content"] or "" for m in page.of("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert page.texts["title"] == ["</script><b> & 'x'"]
    assert len(page.of("script")) == 3
    assert json.loads(page.texts["script"][0]) == card().to_dict()


def test_characters_without_a_font_are_named() -> None:
    # A private-use character of plane 16: no font is made for it.
    odd = "\U0010fffd"
    chart = figures.logit_chart(feature_row(tokens=[f"a{odd}", "plain é λ", "  "]))
    assert figures.undrawable(chart) == odd


def test_characters_without_a_font_are_looked_for_in_titles() -> None:
    odd, other = "\U0010fffd", "\U0010fffc"
    chart = figures.feature_cards([figures.Card(feature_row(), [context()], f"{title}1") for title in (odd, other)])
    assert figures.undrawable(chart) == other + odd
    span = {"stage": "train", "what": "work", "lane": "train 1", "begin": 0.0, "end": 5.0}
    assert figures.undrawable(figures.schedule_chart([span], "a plan", f"by {odd}")) == odd


def test_where_nothing_can_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=r"folder\.png' can't be written: Is a directory"):
        figures.save(card(), tmp_path / "folder.png")


def test_a_plan_with_more_workers_than_are_drawn_says_so() -> None:
    spans = [
        {"stage": stage, "what": "work", "lane": f"{stage} {i}", "begin": 0.0, "end": 5.0}
        for stage in ("harvest", "train")
        for i in range(64)
    ]
    for some, left in ((spans[:30], None), (spans, "88 more workers")):
        told = json.dumps(figures.schedule_chart(some, "a plan", "by rates").to_dict())
        assert ("more workers" in told) is (left is not None)
        assert left is None or left in told


def test_of_many_workers_the_one_that_ends_last_is_drawn() -> None:
    def drawn(ends: dict[int, float]) -> tuple[list[str], str]:
        spans = [
            {"stage": stage, "what": "work", "lane": f"{stage} {i}", "begin": 0.0, "end": ends.get(i, 5.0)}
            for stage in ("harvest", "train")
            for i in range(64)
        ]
        tree = figures.schedule_chart(spans, "a plan", "by rates").to_dict()
        encoding = tree["layer"][0]["encoding"]
        return encoding["y"]["sort"], encoding["x"]["title"].partition(" ")[0]

    def lanes(*numbers: int) -> list[str]:
        return [f"{stage} {i}" for stage in ("harvest", "train") for i in numbers]

    assert drawn({40: 9.0}) == (lanes(*range(19), 40), "Seconds")
    assert drawn({3: 7200.0}) == (lanes(*range(20)), "Hours")
    assert drawn({3: 7199.0}) == (lanes(*range(20)), "Minutes")
