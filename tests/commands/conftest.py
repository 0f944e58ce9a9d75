"""Pages in the system's Chromium, driven by Playwright: nothing is downloaded."""

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

SECONDS = 60


# Not for the whole session: while Playwright runs, nothing else in its thread can run an event loop, as Orbax does.
@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no chromium on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-quic"])
        yield browser
        browser.close()


@pytest.fixture
def problems() -> Iterator[list[str]]:
    """What the pages of a test complain of: errors of scripts and all that the console shows. Nothing, at its end."""
    found: list[str] = []
    yield found
    assert found == []


@pytest.fixture
def open_page(chromium: Any, problems: list[str]) -> Iterator[Callable[..., Any]]:
    """Opens a URL in a window of its own, and returns Playwright's page."""
    pages = []

    def open_page(url: str, *, width: int = 1100, height: int = 900, dark: bool = False) -> Any:
        page = chromium.new_page(viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light")
        pages.append(page)
        page.set_default_timeout(1000 * SECONDS)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text))
        page.goto(url)
        return page

    yield open_page
    for page in pages:
        page.close()
