"""Charts of one feature, alone and on a card: they hold the record, whatever the feature is like."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest

from midiscover import figures
from midiscover.figures.activations import NEVER, NO_LOGITS
from midiscover.figures.cards import LOWER, TOP, chosen
from tests.unit.figures.samples import WEIRD, context, feature_row
from tests.unit.figures.test_contexts import size
from tests.unit.test_figures import parts


def contexts() -> list:
    top = [context(tokens=["The", " dog", f" ran{place}"], value=8.0 - 0.5 * place) for place in range(9)]
    below = [
        context("interval", ["A", f" cat{place}"], peak=1, value=3.6 - 0.4 * place, bin_min=3.5 - 0.5 * (place // 2))
        for place in range(9)
    ]
    return [top[0], *top, context("interval", ["High"], peak=0, value=7.9, bin_min=7.0), *below, context("random")]


CHARTS: dict[str, Callable[[], figures.Chart]] = {
    "card": lambda: figures.feature_card(feature_row(), contexts()),
    "weird": lambda: figures.feature_card(
        feature_row(7, tokens=WEIRD), [context(tokens=WEIRD)], "<b>Markup</b> & 中文"
    ),
    "dead": lambda: figures.feature_card(feature_row(dead=True), []),
    "dead without logits": lambda: figures.feature_card(
        feature_row(dead=True, logits=False), [context("random", value=0)]
    ),
    "without logits": lambda: figures.feature_card(feature_row(logits=False), contexts()),
    "several": lambda: figures.feature_cards([figures.Card(feature_row(), contexts()) for _ in range(2)]),
    "activations": lambda: figures.activation_chart(feature_row()),
    "activations, dead": lambda: figures.activation_chart(feature_row(dead=True)),
    "logits": lambda: figures.logit_chart(feature_row(tokens=WEIRD)),
    "logits, none": lambda: figures.logit_chart(feature_row(logits=False)),
}


def all_json() -> dict[str, str]:
    return {name: CHARTS[name]().to_json() for name in ("card", "weird", "several", "logits", "activations")}


@pytest.mark.parametrize("name", list(CHARTS))
def test_draws_and_fits(name: str) -> None:
    chart = CHARTS[name]()
    png = figures.png(chart, scale=1)
    assert png.startswith(b"\x89PNG")
    width, height = size(png)
    assert 200 < width <= 905
    assert height > 40
    assert not any("url" in part for part in parts(chart.to_dict()))


def test_equal_records_give_equal_json_in_this_process_and_in_another() -> None:
    first = all_json()
    assert all_json() == first
    code = "import json; from tests.unit.figures.test_cards import all_json; print(json.dumps(all_json()))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(other.stdout) == first


def test_activations_have_the_bins_of_the_record() -> None:
    row = feature_row()
    row["hist_heights"][3] = 0
    values = figures.data(figures.activation_chart(row))["activations"]
    assert [(v["low"], v["high"], v["count"]) for v in values] == [
        (0.5 * bin, 0.5 * bin + 0.5, count) for bin, count in enumerate(row["hist_heights"]) if count
    ]
    subtitle = figures.activation_chart(row).to_dict()["title"]["subtitle"]
    assert subtitle[0] == "Fires on 0.633% of tokens (6,332), mean 0.70, max 8.00"
    assert subtitle[1].startswith("Quantiles where it fires: 25% 0.20, 50% 0.40")


@pytest.mark.parametrize(("heights", "given", "log"), [([100, 4], None, True), ([10, 4], None, False)])
@pytest.mark.parametrize("asked", [None, True, False])
def test_counts_have_a_log_axis_where_it_is_asked_for_or_helps(
    heights: list[int], given: None, log: bool, asked: bool | None
) -> None:
    row = feature_row() | {"hist_heights": heights, "hist_values": [1.0, 3.0]}
    spec = figures.activation_chart(row, log=asked).to_dict()
    y = next(part["y"] for part in parts(spec) if part.get("y", {}).get("field") == "count")
    assert (y["scale"].get("type") == "log") == (log if asked is None else asked)
    # A bar of a log axis begins below 1, so that a single token is seen.
    assert next(part["y2"]["datum"] for part in parts(spec) if "y2" in part) == (0.5 if y["scale"] else 0)


def five_digits(value: float) -> float:
    return float(f"{value:.5g}")


def test_logits_are_the_records_with_their_spaces_seen() -> None:
    tables = figures.data(figures.logit_chart(feature_row(tokens=[" a  b", "\n"])))
    assert [row["logit"] for row in tables["promotes"]] == [five_digits(1.5 - 0.1 * i) for i in range(10)]
    assert [row["logit"] for row in tables["suppresses"]] == [five_digits(-0.9 + 0.05 * i) for i in range(10)]
    space = "\N{NO-BREAK SPACE}"
    assert [row["label"] for row in tables["promotes"]][:2] == [f"'{space}a{2 * space}b'", "'↵'"]


def test_what_is_not_there_is_said() -> None:
    assert NEVER in json.dumps(figures.feature_card(feature_row(dead=True), []).to_dict()["title"])
    assert NO_LOGITS in figures.logit_chart(feature_row(logits=False)).to_json()
    assert NEVER in figures.activation_chart(feature_row(dead=True)).to_json()


def test_a_card_takes_different_texts_and_intervals_beneath() -> None:
    taken = chosen(contexts())
    top, below = taken[:TOP], taken[TOP:]
    assert [c.value for c in top] == [8.0 - 0.5 * place for place in range(TOP)]
    assert len(below) == LOWER
    assert all(c.kind == "interval" and c.value < top[-1].value for c in below)
    assert len({c.bin_min for c in below}) == LOWER
    assert [c.value for c in below] == sorted((c.value for c in below), reverse=True)


def test_tables_of_several_cards_stay_apart() -> None:
    names = list(figures.data(CHARTS["several"]()))
    assert {name.split(" ", 1)[0] for name in names} == {"1", "2"}
    assert {name.split(" ", 1)[1] for name in names} == {"activations", "notes", "promotes", "suppresses", "tokens"}
