"""The server's page in a real browser, narrow and wide."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Page

from helpers.browser import chromium, fits
from helpers.serving import Served, made, serving

__all__ = ["made"]
pytestmark = pytest.mark.slow  # needs chromium, which make debian installs


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def served(made: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(made, tmp_path_factory.mktemp("more"), keys=["secret"]) as found:
        yield found


@pytest.fixture(params=[(360, 640), (1400, 900)], ids=["narrow", "wide"])
def page(request: pytest.FixtureRequest, browser: Any, served: Served) -> Iterator[Page]:
    page = browser.new_page(viewport=dict(zip(("width", "height"), request.param, strict=True)))
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(served.url)
    yield page
    assert not errors
    page.close()


def test_two_models_answer_side_by_side(page: Page, served: Served) -> None:
    page.get_by_text("the list of models needs an API key").wait_for()
    page.get_by_label("API key").fill("secret")
    page.get_by_label("API key").blur()
    first, second = page.get_by_label("first model"), page.get_by_label("second model")
    first.locator("option", has_text="side2").wait_for(state="attached")
    first.select_option("side0")
    second.select_option("side2")
    page.get_by_label("Prompt").fill("a kind of bird")
    page.get_by_label("tokens").fill("12")
    page.get_by_role("button", name="Ask both").click()
    page.locator("small", has_text="a second").nth(1).wait_for()
    page.locator("#ask:enabled").wait_for()
    texts = page.locator("pre").all_text_contents()
    assert texts == [served.expected(name, "a kind of bird", 12) for name in ("side0", "side2")]
    assert fits(page)


def test_what_is_refused_is_told_beside_the_model(page: Page) -> None:
    page.get_by_label("API key").fill("secret")
    page.get_by_label("API key").blur()
    page.get_by_label("first model").locator("option", has_text="side0").wait_for(state="attached")
    page.get_by_label("tokens").fill("5000")
    page.get_by_role("button", name="Ask both").click()
    page.locator("small", has_text="max_tokens: Input should be less than or equal to 4096").nth(1).wait_for()
    page.route("**/v1/completions", lambda route: route.abort())
    page.get_by_role("button", name="Ask both").click()
    page.locator("small", has_text="the server does not answer").nth(1).wait_for()
    page.locator("#ask:enabled").wait_for()
