"""The site in a real browser: no console errors, nothing that axe-core finds, no page wider than a phone."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from browser import DESK, PHONE, needs_browser, open_page
from pages import DOCS
from test_documentation_site import build

pytestmark = needs_browser()
NAMES = sorted(page.stem for page in DOCS.glob("*.md"))
FEW = ("index", "getting_started")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seen") / "site"
    done = build(folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
@pytest.mark.parametrize(("width", "scheme"), [(DESK, "light"), (PHONE, "dark")])
def test_a_page_has_no_faults(site: Path, name: str, width: int, scheme: Literal["light", "dark"]) -> None:
    with open_page(site / f"{name}.html", width=width, scheme=scheme) as page:
        assert page.console == []
        assert page.axe() == []
        assert not page.scrolls_sideways()  # a wide table or line of code scrolls in its own frame


def test_a_page_from_disk_can_be_searched(site: Path) -> None:
    with open_page(site / "index.html") as page:
        page.page.click(".md-search__input")
        page.page.locator(".md-search__input").press_sequentially("retention")
        results = page.page.locator(".md-search-result__link")
        results.first.wait_for(timeout=60_000)
        found = {link.get_attribute("href") or "" for link in results.all()}
        assert any("/evaluation.html" in address for address in found), found
        assert page.console == []
