"""The report: complete, closed to the network, closed to what stands in names, and small."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from midiscover.frontier import frontier_of_hooks, frontier_of_kinds
from midiscover.report import frontier_png, write_report
from midiscover.summary import CONTROLS_NEED, METRICS
from tests.unit.grid_tables import grid_tables, stability_rows
from tests.unit.plain_tables import Rows, plain_tables

EVIL = "<script>alert('x')</script>&\"</pre>"


class Page(HTMLParser):
    """What a browser would find: elements with their attributes, and the text of each kind of element."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts[self._open[-1]][-1] += data

    def of(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag in tags]


def sweep(rows: Rows, **changes: Any) -> dict[str, Any]:
    return {
        "v": 1,
        "id": "demo.0a1b2c3d4e",
        "name": "demo",
        "created": "2026-01-02T03:04:05+00:00",
        "owner": "lab",
        "tags": ["cpu"],
        "note": "A note.",
        "config": {"name": "demo", "train": {"betas": (0.9, 0.999)}},
        "sae_ids": [row["sae_id"] for row in rows],
        "evaluation_id": "e0",
        "corpus": "c0",
        "harvest": "h0",
        "lineage": {"code": {"version": "0.1.0", "commit": "abc"}},
    } | changes


def records(rows: Rows) -> list[dict[str, Any]]:
    lineage = {
        "model": {"name": "tiny", "digest": "d" * 64, "revision": None},
        "corpus": {"id": "c0", "source": "builtin"},
    }
    metrics = {"tokens": 14_416, "density": {"counts": [1] * 24}}
    return [{"v": 1, "id": row["sae_id"], "hook": row["hook"], "metrics": metrics, "lineage": lineage} for row in rows]


@pytest.fixture(scope="module")
def html() -> str:
    rows, curves, densities = plain_tables()
    rows[4] = rows[4] | {"ce_recovered": None}
    return write_report(rows, curves, densities, sweep(rows), records(rows), minutes=9.8).decode()


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_asks_the_network_for_nothing(html: str, page: Page) -> None:
    assert not page.of("link", "img", "iframe", "object", "embed", "audio", "video", "base")
    assert all("src" not in attributes for attributes in page.of("script"))
    assert all((attributes["href"] or "").startswith("#") for attributes in page.of("a"))
    policy = next(m["content"] or "" for m in page.of("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    assert "unsafe-eval" not in policy
    assert not re.search(r"url\(|@import", page.texts["style"][0])


def test_nothing_that_scrolls_is_cut_on_paper(page: Page) -> None:
    style = page.texts["style"][0]
    screen, paper = style.split("@media print")
    scrolling = re.findall(r"^(\S+) {[^}]*overflow-x: auto", screen, re.MULTILINE)
    assert set(scrolling) == {"pre", ".scroll", ".chart"}
    assert re.search(r"\.scroll, \.chart { overflow: visible; }", paper)
    assert re.search(r"pre { white-space: pre-wrap;", paper)


def test_holds_vega_once_and_stays_small(html: str, page: Page) -> None:
    assert len(page.of("script")) == 3
    assert sum(len(text) > 500_000 for text in page.texts["script"]) == 1
    assert len(html.encode()) < 3_000_000


def test_shows_what_a_reader_looks_for(page: Page) -> None:
    facts = dict(zip(page.texts["dt"], page.texts["dd"], strict=True))
    assert page.texts["h1"] == ["demo"]
    assert facts["Tokens"] == "276,480 trained on, all epochs together, 11,932 held out"
    assert facts["Model"] == "tiny, " + "d" * 12
    assert facts["Run"] == "2026-01-02 03:04 UTC, 9.8 minutes"
    assert {name: facts[name] for name in METRICS} == METRICS
    code = "".join(page.texts["pre"])
    assert "from midiscover import load_sae" in code
    assert "SAE.load_from_disk(" in code
    assert "betas:\n  - 0.9" in code
    assert "light dark" in str(page.of("meta"))


def test_the_facts_are_of_the_sweeps_own_evaluation() -> None:
    """Of SAEs that another sweep made, the records hold what that one measured."""
    rows, curves, densities = plain_tables(layers=[10], l1s=[3, 8])
    others: list[dict[str, Any]] = [record | {"evaluation_id": "e9"} for record in records(rows)]
    others[1]["evaluation_id"] = "e0"
    assert others[0]["metrics"]["tokens"] != rows[0]["tokens"]
    page = Page(write_report(rows, curves, densities, sweep(rows), others).decode())
    facts = dict(zip(page.texts["dt"], page.texts["dd"], strict=True))
    assert facts["Tokens"].endswith(f"{rows[0]['tokens']:,} held out")
    told = [text for text in page.texts["summary"] if "metrics" in text]
    assert told == [": its metrics are of evaluation e9; above stand those of e0"]


def test_table_has_the_columns_of_the_terminal_and_sorts_by_number(page: Page) -> None:
    titles = ["hook", "l1", "L0", "FVU", "CE recovered", "dead", "inactive", "seconds", "frontier", "SAE"]
    assert page.texts["button"] == titles
    rows, _, _ = plain_tables()
    cells = [attributes["data-key"] for attributes in page.of("td") if "data-key" in attributes]
    assert len(cells) == 9 * (len(titles) - 1)
    assert [float(cell or "nan") for cell in cells[1::9]] == [row["l0"] for row in rows]
    assert [index for index, cell in enumerate(cells[3::9]) if cell == ""] == [4]


def test_charts_are_complete_and_share_their_data(page: Page) -> None:
    data = json.loads(page.texts["script"][0])
    assert set(data["specs"]) == {
        "frontier",
        "shares",
        "density",
        "layer-density",
        "map",
        *(f"curves-{m}" for m in ("loss", "mse", "l0", "fvu")),
    }
    used = {spec["data"]["name"] for spec in data["specs"].values()}
    own = {"frontier", "shares", "density", "layer-density", "map"}
    assert used == set(data["datasets"]) == own | {"curves-loss"}
    drawn = {attributes["data-chart"] for attributes in page.of("div") if "data-chart" in attributes}
    assert drawn == own | {"curves-loss"}


@pytest.fixture(scope="module")
def whole() -> Page:
    """A sweep over everything, with controls, foreign text, pairs, and SAEs that were retired."""
    rows, curves, densities = grid_tables()
    retired = {"gone-1": "dropped at step 7: another had a lower L0 and a lower FVU", EVIL: EVIL}
    told = sweep(rows)
    html = write_report(
        rows, curves, densities, told, records(rows), minutes=30, stability=stability_rows(rows), retired=retired
    )
    assert len(html) < 3_000_000
    return Page(html.decode())


def test_a_sweep_over_everything_shows_it_all(whole: Page) -> None:
    data = json.loads(whole.texts["script"][0])
    assert {"map", "foreign", "stability", "layer-density"} <= data["specs"].keys()
    drawn = {attributes["data-chart"] for attributes in whole.of("div") if "data-chart" in attributes}
    assert {"map", "foreign", "stability", "layer-density"} <= drawn
    anchors = {(attributes["href"] or "")[1:] for attributes in whole.of("a")}
    assert anchors <= {attributes.get("id") for attributes in whole.of("section")}
    assert {"retired", "map", "foreign", "stability"} <= anchors
    assert {"control", "FVU foreign", "kind", "seed", "sparsity"} <= set(whole.texts["button"])
    facts = dict(zip(whole.texts["dt"], whole.texts["dd"], strict=True))
    assert facts["SAEs"] == "66 of 66, 2 retired"
    assert EVIL in whole.texts["dd"]
    assert any("lower L0 and a lower FVU" in text for text in whole.texts["dd"])


def test_controls_are_marked_and_explained_once(whole: Page) -> None:
    rows, _, _ = grid_tables()
    classes = [attributes.get("class") for attributes in whole.of("tr")]
    assert classes.count("control") == sum(row["control"] != "none" for row in rows)
    assert sum(CONTROLS_NEED in text for text in whole.texts["p"]) == 1
    cells = [text for text in whole.texts["td"] if text in ("yes", "of its kind")]
    assert cells.count("yes") == sum(frontier_of_hooks(rows))
    assert cells.count("yes") + cells.count("of its kind") == sum(
        a or b for a, b in zip(frontier_of_hooks(rows), frontier_of_kinds(rows), strict=True)
    )


def test_what_was_not_measured_has_no_section(page: Page) -> None:
    sections = {attributes.get("id") for attributes in page.of("section")}
    assert not sections & {"foreign", "stability", "retired"}
    assert "map" in sections
    assert not any(CONTROLS_NEED in text for text in page.texts["p"])
    rows, curves, densities = plain_tables(layers=[10])
    alone = Page(write_report(rows, curves, densities, sweep(rows), records(rows)).decode())
    assert not {attributes.get("id") for attributes in alone.of("section")} & {"map", "layer-density"}


def test_sparsity_settings_sort_by_their_value(whole: Page) -> None:
    keys = [attributes["data-key"] or "" for attributes in whole.of("td") if "data-key" in attributes]
    ks = sorted({key for key in keys if re.fullmatch(r"k \d+\.\d+", key)})
    assert [float(key[2:]) for key in ks] == [16, 48, 128]


def test_what_stands_in_names_stays_text() -> None:
    rows, curves, densities = plain_tables(layers=[1], l1s=[3])
    rows = [row | {"hook": EVIL, "sae_id": EVIL, "sparsity_label": EVIL, "kind": EVIL} for row in rows]
    curves = [row | {"hook": EVIL, "label": EVIL} for row in curves]
    densities = [row | {"hook": EVIL, "label": EVIL, "sae_id": EVIL} for row in densities]
    told = sweep(rows, name=EVIL, id=EVIL, note=EVIL, owner=EVIL, tags=[EVIL], config={EVIL: EVIL}, sae_ids=[EVIL])
    failures = {EVIL: EVIL}
    page = Page(write_report(rows, curves, densities, told, records(rows), failures).decode())
    assert len(page.of("script")) == 3
    assert page.texts["h1"] == [EVIL]
    assert EVIL in page.texts["dd"]
    assert json.loads(page.texts["script"][0])["datasets"]["frontier"][0]["sae"] == EVIL


def test_missing_values_are_dashes_and_failures_have_reasons() -> None:
    rows, curves, densities = plain_tables(layers=[10], l1s=[3, 8])
    gone = ("l0", "fvu", "mse", "cosine", "ce_recovered", "kl_recovered", "dead_share", "inactive_share", "seconds")
    rows[1] = rows[1] | dict.fromkeys(gone)
    failures: dict[str, str] = {str(rows[1]["sae_id"]): "Out of memory."}
    html = write_report(rows, curves, densities, sweep(rows), records(rows[:1]), failures)
    page = Page(html.decode())
    facts = dict(zip(page.texts["dt"], page.texts["dd"], strict=True))
    assert facts["SAEs"] == "1 of 2, 1 failed"
    assert "Out of memory." in page.texts["dd"]
    failed = [
        text
        for text, attributes in zip(page.texts["td"], page.of("td"), strict=True)
        if attributes.get("data-key") == ""
    ]
    assert failed == ["–"] * 6
    assert not {"None", "nan", "-"} & {text.strip() for text in page.texts["td"]}


def test_a_sweep_without_any_result_has_a_page() -> None:
    page = Page(write_report([], [], [], sweep([], sae_ids=["a"]), [], {"a": "The pack failed."}).decode())
    assert "The pack failed." in page.texts["dd"]
    assert len(page.of("script")) == 1


def test_frontier_png_is_written(tmp_path: Path) -> None:
    frontier_png(plain_tables()[0], tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
