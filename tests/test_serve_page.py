"""The page of `depthkv serve` in headless Chromium: keyboard, phone, light and dark.

DEPTHKV_SHOTS names a folder that screenshots are kept in.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("playwright")

from playwright import sync_api

from depthkv.serve.app import create_app
from serving import PLAN, endless_tokenizer, listening, running
from tiny import tiny_model

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture(scope="module", params=[None, "secret"], ids=["open", "key"])
def address(request: pytest.FixtureRequest) -> Iterator[tuple[str, str | None]]:
    with (
        running(tiny_model(eos_token_id=None), endless_tokenizer(), PLAN, min_retention=0.25) as engine,
        listening(create_app(engine, name="tiny", api_key=request.param, max_tokens=1900)) as url,
    ):
        yield url, request.param


@pytest.mark.parametrize(("width", "height"), [(1280, 860), (390, 844)], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page(browser: Any, address: tuple[str, str | None], width: int, height: int, scheme: str) -> None:
    url, key = address
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    trouble: list[str] = []
    page.on("console", lambda message: trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda made: None if made.url.startswith((url, "data:")) else trouble.append(made.url))
    page.goto(url)
    if key is not None:
        wait(lambda: "asks for an API key" in page.inner_text("#status"), page)
        page.keyboard.type(key)  # the field has the focus
        page.keyboard.press("Tab")
    wait(lambda: page.inner_text("#chosen") == "2 of 4 (50 %)", page)
    page.focus("#retention")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#chosen") == "1 of 4 (25 %)"
    page.fill("#tokens", "40")
    page.fill("#prompt", "w3 w7 w50")
    page.keyboard.press("Control+Enter")
    wait(lambda: page.inner_text("#status").startswith("Done"), page)
    assert page.inner_text("#status") == "Done: the second cache is 4.00 times smaller."
    for panel, layers, cache in (("#full", "4 of 4", "10.50 KiB"), ("#shared", "1 of 4", "2.63 KiB")):
        assert page.inner_text(f"{panel} .layers") == layers
        assert page.inner_text(f"{panel} .cache") == cache
        assert page.inner_text(f"{panel} .count") == "40"
        assert float(page.inner_text(f"{panel} .speed")) > 0
        assert page.inner_text(f"{panel} .text").startswith("w")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    if folder := os.environ.get("DEPTHKV_SHOTS"):
        page.screenshot(path=Path(folder) / f"{width}-{scheme}.png", full_page=True)
    page.fill("#tokens", "1800")
    page.click("#run")
    page.keyboard.press("Escape")
    wait(lambda: page.inner_text("#status") == "Stopped.", page)
    assert page.get_attribute("#tokens", "max") == "1900"
    # the browser itself tells the console of these
    expected = ("the server responded with a status of 400", "the server responded with a status of 401")
    assert not [text for text in trouble if not any(known in text for known in expected)]
    context.close()


def wait(condition: Callable[[], bool], page: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, page.inner_text("#status")
        page.wait_for_timeout(20)
