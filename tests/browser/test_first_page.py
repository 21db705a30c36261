"""The first page in a real browser: log in with a key, ask a text, look at what fires."""

from __future__ import annotations

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
        page.locator("#features tr").nth(0).focus()
        page.keyboard.press("Enter")
        assert [depth > 0 for depth in grounds()] == [value > 0 for value in strongest[0]["values"]]

        page.fill("#text", "river " * 2000)
        page.click("#go")
        page.wait_for_selector("#problem:not([hidden])")
        assert "reads at most" in page.inner_text("#problem")
        page.click("text=Log out")
        page.wait_for_selector("#key")
        assert context.cookies() == []
        assert problems == []
        context.close()


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
