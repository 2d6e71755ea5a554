"""The page in a real browser: on a laptop and on a phone, light and dark, with JavaScript and without.

TITAN_SCREENSHOTS=DIR keeps what was seen. Needs Chromium; as root on Debian the test installs it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from titan.report.__main__ import main

from .made import eventful_run, sweep

pytestmark = pytest.mark.slow
NAMES = ("chromium", "chromium-browser", "google-chrome")
TOO_WIDE = """() => [...document.querySelectorAll("body *")].filter(each =>
    !each.closest(".scroll, pre, .tip") && each.getBoundingClientRect().right > innerWidth + 0.5
).map(each => each.tagName + "." + each.className)"""
LETTERS = """() => [...document.querySelectorAll(".plot svg text")].map(each =>
    parseFloat(getComputedStyle(each).fontSize) * each.ownerSVGElement.getBoundingClientRect().width / 400)"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium; where there is none and none can be installed, the tests do not run, and say so."""
    api = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None and os.getuid() == 0 and shutil.which("apt-get"):
        install = "apt-get install -y -q --no-install-recommends chromium"
        subprocess.run(["sh", "-c", f"{install} || {{ apt-get update -q; {install}; }}"], timeout=400, check=False)
        path = shutil.which("chromium")
    if path is None:
        pytest.skip("there is no Chromium, and none can be installed here: NOT RUN")
    with api.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of a run with everything in it, and that of a sweep."""
    folder = tmp_path_factory.mktemp("pages")
    eventful_run(folder / "run", steps=600)
    sweep(folder / "sweep", points=20, rows=400)
    for name in ("run", "sweep"):
        assert main([str(folder / name)]) == 0
    return {name: folder / name / "report.html" for name in ("run", "sweep")}


@pytest.mark.parametrize("has_script", [True, False], ids=["script", "no script"])
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
@pytest.mark.parametrize("name", ["run", "sweep"])
def test_a_page_is_readable(
    name: str, width: int, scheme: str, has_script: bool, browser: Any, pages: dict[str, Path]
) -> None:
    """Nothing is said on the console, nothing asked for, nothing wider than the screen, no letter too small."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=has_script
    )
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(pages[name].as_uri())
    folder = os.environ.get("TITAN_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=f"{folder}/{name}-{width}-{'script' if has_script else 'plain'}.png", full_page=True)
    plots = page.locator(".plot svg")
    assert plots.count() == len(page.locator(".plot").all()) >= 6
    assert page.locator(".plot polyline").first.is_visible()
    assert page.locator("pre").first.is_hidden()
    page.locator("summary").last.click()
    assert page.locator("pre").last.is_visible(), "also without JavaScript"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(TOO_WIDE) == []
    assert min(page.evaluate(LETTERS)) >= 9
    if has_script:
        plots.first.scroll_into_view_if_needed()
        box = plots.first.bounding_box()
        page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] / 2)
        tip = page.locator(".plot .tip").first
        assert tip.inner_text().startswith("step ")
        assert page.evaluate(TOO_WIDE) == []
    assert said == []
    assert asked == [pages[name].as_uri()]
    context.close()
