"""A real headless Chromium for the tests of what people look at.

    with open_page(path_or_url, width=390, scheme="dark") as page:
        assert page.console == []
        assert page.axe() == []

The page may load nothing but files and this machine: any other request is refused and listed in `console`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import pytest

PHONE, DESK = 390, 1280
_NAMES = ("chromium", "chromium-browser", "google-chrome")
# As root there is no sandbox of Chromium's own; the rest keeps it from calling home.
_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
_HERE = {"127.0.0.1", "localhost"}


def missing() -> str | None:
    """Why there is no browser, or None."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError as error:
        return f"{error}; pip install 'prism-nemo[dev]'"
    if _chromium() is None:
        return "no Chromium; as root: apt-get install chromium"
    return None


def _chromium() -> str | None:
    return next((found for name in _NAMES if (found := shutil.which(name))), None)


def needs_browser() -> pytest.MarkDecorator:
    """Skips with the reason where there is no browser; `make test` installs one where it can."""
    reason = missing()
    return pytest.mark.skipif(reason is not None, reason=f"no browser: {reason}")


@dataclass
class OpenPage:
    """A page that is open.

    Attributes:
        page: Playwright's page.
        console: Errors and warnings of the console, errors of scripts, requests that failed or were refused.
    """

    page: Any
    console: list[str] = field(default_factory=list)

    def axe(self) -> list[str]:
        """What axe-core finds (WCAG 2 A, AA and its best practices), one line for each element."""
        self.page.evaluate(_axe_source())
        found = self.page.evaluate("() => axe.run(document, {resultTypes: ['violations']})")
        return [
            f"{one['id']}: {one['help']}: {node['html'][:200]} {node.get('failureSummary', '')}"
            for one in found["violations"]
            for node in one["nodes"]
        ]

    def screenshot(self, path: Path, full: bool = True) -> None:
        """Write what is seen, or the whole page, as PNG."""
        self.page.screenshot(path=str(path), full_page=full)

    def scrolls_sideways(self) -> bool:
        """Whether the page is wider than its window."""
        return bool(self.page.evaluate("() => document.documentElement.scrollWidth > window.innerWidth + 1"))


@cache
def _axe_source() -> str:
    return (files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8")


@contextmanager
def browser() -> Iterator[Any]:
    """A Chromium; starting one takes about a second, so share it where there are many pages."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=_chromium(), args=_OPTIONS)
        try:
            yield chromium
        finally:
            chromium.close()


@contextmanager
def open_page(
    place: Path | str,
    width: int = DESK,
    height: int = 900,
    scheme: Literal["light", "dark"] = "light",
    javascript: bool = True,
    chromium: Any = None,
) -> Iterator[OpenPage]:
    """Open a file or an address of this machine.

    Args:
        place: A file, or an address that begins with http://127.0.0.1.
        width: Of the window, in pixels; `PHONE` is one.
        height: Of the window.
        scheme: What the reader prefers.
        javascript: Whether scripts run. Without, axe cannot be used.
        chromium: From `browser`; None starts one for this page.
    """
    if chromium is None:
        with browser() as own, open_page(place, width, height, scheme, javascript, own) as opened:
            yield opened
        return
    context = chromium.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, java_script_enabled=javascript
    )
    try:
        opened = OpenPage(context.new_page())
        _listen(opened)
        opened.page.goto(place.resolve().as_uri() if isinstance(place, Path) else place, wait_until="load")
        yield opened
    finally:
        context.close()


def _listen(opened: OpenPage) -> None:
    page, said = opened.page, opened.console

    def only_here(route: Any) -> None:
        address = urlsplit(route.request.url)
        if address.scheme in ("file", "data", "blob", "about") or address.hostname in _HERE:
            route.continue_()
        else:
            said.append(f"asked for {route.request.url}")
            route.abort()

    page.route("**/*", only_here)
    page.on("console", lambda one: one.type in ("error", "warning") and said.append(f"{one.type}: {one.text}"))
    page.on("pageerror", lambda error: said.append(f"script: {error}"))
    page.on("requestfailed", lambda request: said.append(f"failed: {request.url[:200]}"))
