"""The first page in a real browser: log in with a key, ask a text, look at what fires."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.served import Served, api, live, store, store_to_serve

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]
__all__ = ["api", "store", "store_to_serve"]  # fixtures
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium; Debian's package is called chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


def test_a_key_opens_the_page_and_a_text_is_read(api: Served, browser: Any, tmp_path: Path) -> None:
    with live(api) as address:
        context = browser.new_context(viewport={"width": 1000, "height": 800})
        page, problems = context.new_page(), []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda said: problems.append(said.text) if "Content Security" in said.text else None)
        page.goto(address)
        page.fill("#key", "mdc_00000000_" + "0" * 48)
        page.click("button")
        assert "not valid here" in page.inner_text("body")
        page.fill("#key", api.keys["read"])
        page.click("button")
        page.wait_for_selector("#saes tr")
        assert page.locator("#saes tr").count() == 4
        (cookie,) = context.cookies()
        assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
        assert api.keys["read"] not in cookie["value"]
        assert page.evaluate("document.cookie") == ""

        text = "The river ran past <b>the</b> old mill."
        page.fill("#text", text)
        page.select_option("#sae", api.saes[1])
        page.click("#go")
        page.wait_for_selector("#features tr")
        answer = api.post("/interpret", {"text": text, "sae": api.saes[1], "top_k": 15}).json()["texts"][0]
        strongest = answer["saes"][api.saes[1]]["features"]
        tokens = page.locator("#tokens > span").evaluate_all("all => all.map(one => one.dataset.token)")
        assert tokens == answer["tokens"]
        rows = page.locator("#features tr td:first-child").all_inner_texts()
        assert rows == [str(one["feature"]) for one in strongest]
        assert page.locator("#tokens b").count() == 0, "a text is shown, never run"

        def grounds() -> list[float]:
            colours = page.locator("#tokens > span").evaluate_all(
                "all => all.map(one => getComputedStyle(one).backgroundColor)"
            )
            return [float(c.rpartition(",")[2].rstrip(")")) if c.startswith("rgba") else 1.0 for c in colours]

        for row in (0, 1):
            page.locator("#features tr").nth(row).click()
            shown = [depth > 0 for depth in grounds()]
            assert shown == [value > 0 for value in strongest[row]["values"]]
        for row, key in ((0, "Enter"), (1, "Space")):
            page.locator("#features button").nth(row).focus()
            page.keyboard.press(key)
            assert [depth > 0 for depth in grounds()] == [value > 0 for value in strongest[row]["values"]]
            pressed = page.locator("#features button").evaluate_all("all => all.map(one => one.ariaPressed)")
            assert [place for place, one in enumerate(pressed) if one == "true"] == [row]

        page.fill("#text", "river " * 2000)
        page.click("#go")
        page.wait_for_selector("#problem:not([hidden])")
        assert "reads at most" in page.inner_text("#problem")
        page.click("text=Log out")
        page.wait_for_selector("#key")
        assert context.cookies() == []
        assert problems == []
        context.close()


def test_what_was_typed_is_there_again_after_the_next_log_in(api: Served, browser: Any) -> None:
    with live(api) as address:
        page = logged_in(api, browser, address)
        given = page.input_value("#text")
        page.fill("#text", "Typed for an hour.")
        page.context.clear_cookies()
        page.click("#go")
        page.wait_for_selector("#key")
        page.fill("#key", api.keys["read"])
        page.click("button")
        page.wait_for_selector("#facts:not(:empty)")
        assert page.input_value("#text") == "Typed for an hour."
        page.goto(address)
        page.wait_for_selector("#facts:not(:empty)")
        assert page.input_value("#text") == given, "it is kept for that once"
        page.context.close()


def test_the_description_of_the_api_comes_from_here_alone(api: Served, browser: Any) -> None:
    with live(api) as address:
        context = browser.new_context(extra_http_headers={"X-Api-Key": api.keys["read"]})
        page, asked = context.new_page(), []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{address}/docs")
        page.wait_for_selector(".opblock")
        assert page.locator(".opblock").count() > 30
        assert all(url.startswith((address, "data:")) for url in asked)
        context.close()


def logged_in(api: Served, browser: Any, address: str, **settings: Any) -> Any:
    page = browser.new_context(**settings).new_page()
    page.goto(address)
    page.fill("#key", api.keys["read"])
    page.click("button")
    page.wait_for_selector("#facts:not(:empty)")
    return page


def interpreted(page: Any, text: str) -> None:
    page.fill("#text", text)
    page.click("#go")
    page.wait_for_selector("#found:not([hidden])")


def luminance(colour: list[float]) -> float:
    linear = [one / 255 / 12.92 if one / 255 <= 0.04045 else ((one / 255 + 0.055) / 1.055) ** 2.4 for one in colour[:3]]
    return sum(share * one for share, one in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_tokens_can_be_read_on_every_colour(api: Served, browser: Any, scheme: str) -> None:
    """As a browser paints it: the colour of a pixel of the ground, and that of the letters."""
    with live(api) as address:
        page = logged_in(api, browser, address, color_scheme=scheme)
        interpreted(page, " ".join(["The river ran past the old mill, and the people went down."] * 4))
        under = page.evaluate("getComputedStyle(document.getElementById('tokens')).backgroundColor")
        seen = 0
        for row in range(page.locator("#features button").count()):
            page.locator("#features button").nth(row).click()
            colours = page.locator("#tokens > span").evaluate_all(
                "all => all.map(one => [getComputedStyle(one).backgroundColor, getComputedStyle(one).color])"
            )
            for ground, ink in colours:
                (*top, depth), below, letters = (numbers(one) for one in (ground, under, ink))
                light = luminance([depth * a + (1 - depth) * b for a, b in zip(top, below, strict=False)])
                high, low = sorted((light, luminance(letters)), reverse=True)
                assert (high + 0.05) / (low + 0.05) >= 4.5, (ground, ink)
                seen += 0.2 < depth < 0.6
        assert seen > 5, "those in between are the hard ones"
        other = "dark" if scheme == "light" else "light"
        before = page.locator("#tokens > span").evaluate_all("all => all.map(one => getComputedStyle(one).color)")
        page.emulate_media(color_scheme=other)
        after = page.locator("#tokens > span").evaluate_all("all => all.map(one => getComputedStyle(one).color)")
        assert before != after
        page.context.close()


def numbers(colour: str) -> list[float]:
    """`rgb(…)` or `rgba(…)` as red, green, blue and opacity."""
    found = [float(one) for one in re.findall(r"[\d.]+", colour)]
    return [*found, 1.0][:4]


def test_on_a_phone_nothing_is_wider_than_it_and_every_tip_is_seen(api: Served, browser: Any) -> None:
    with live(api) as address:
        page = logged_in(api, browser, address, viewport={"width": 360, "height": 740})
        interpreted(page, "The river ran past the old mill, and the people of the valley went down to the water.")
        tokens = page.locator("#tokens > span")
        for place in range(tokens.count()):
            tokens.nth(place).focus()
            box = page.locator("#tip").bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 360
            assert page.evaluate("document.documentElement.scrollWidth") == 360
            assert page.inner_text("#tip") == tokens.nth(place).get_attribute("data-strongest")
        page.context.close()


def test_tokens_are_one_stop_of_the_tab_key(api: Served, browser: Any) -> None:
    with live(api) as address:
        page = logged_in(api, browser, address)
        interpreted(page, "The river ran past the old mill.")
        places = "[...document.querySelectorAll('#tokens > span')].indexOf(document.activeElement)"
        last = page.locator("#tokens > span").count() - 1
        page.focus("#go")
        page.keyboard.press("Tab")
        seen = [page.evaluate(places)]
        for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "End", "ArrowRight", "Home", "End"):
            page.keyboard.press(key)
            seen.append(page.evaluate(places))
        assert seen == [0, 1, 2, 1, last, last, 0, last]
        assert page.is_visible("#tip")
        page.keyboard.press("Escape")
        assert page.is_hidden("#tip")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.closest('#features') !== null")
        page.keyboard.press("Shift+Tab")
        assert page.evaluate(places) == last
        page.context.close()


def test_every_token_has_a_name(api: Served, browser: Any) -> None:
    with live(api) as address:
        page = logged_in(api, browser, address)
        tokens = ["a", "\n", " ", "\t\n", " b"]
        silent = {"features": [], "per_token": [[] for _ in tokens]}
        answer = {"model": "m", "texts": [{"text": "".join(tokens), "tokens": tokens, "saes": {"x": silent}}]}
        page.route("**/interpret", lambda route: route.fulfill(json=answer))
        interpreted(page, "a")
        names = page.locator("#tokens > span").evaluate_all("all => all.map(one => one.ariaLabel)")
        assert names == ["a 0.00", "line break 0.00", "space 0.00", "tab line break 0.00", " b 0.00"]
        page.context.close()


def test_what_is_not_there_is_said(api: Served, browser: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with live(api) as address:
        page = logged_in(api, browser, address)
        silent = {"features": [], "per_token": [[], []]}
        answer = {"model": "m", "texts": [{"text": "a b", "tokens": ["a", " b"], "saes": {"x": silent}}]}
        page.route("**/interpret", lambda route: route.fulfill(json=answer))
        interpreted(page, "a b")
        assert page.inner_text("#none") == "No feature fires on this text."
        assert page.is_hidden("#strongest")
        assert page.locator("#tokens > span").all_inner_texts() == ["a", " b"]
        page.context.clear_cookies()
        page.click("text=Log out")
        page.wait_for_selector("#key")
        assert page.url == f"{address}/login"
        page.context.close()
        monkeypatch.setattr(api.context.catalog, "_hosted", {})
        page = logged_in(api, browser, address)
        assert page.is_disabled("#go")
        assert "No SAE is hosted yet" in page.inner_text("#facts")
        page.context.close()
