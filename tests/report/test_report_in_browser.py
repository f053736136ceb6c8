"""The page in a real browser: no errors, accessible in both schemes and on a phone, and its controls work."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import DESK, PHONE, needs_browser, open_page
from fake_run import write_run
from made_runs import make_pipeline

from prism_nemo.report.page import write_report

pytestmark = needs_browser()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pipeline")
    return write_report(make_pipeline(root), root / "page.html")


@pytest.mark.parametrize(("width", "scheme"), [(DESK, "light"), (DESK, "dark"), (PHONE, "light"), (PHONE, "dark")])
def test_nothing_is_wrong(page: Path, width: int, scheme: str) -> None:
    with open_page(page, width=width, scheme=scheme) as opened:
        assert opened.console == []
        assert opened.axe() == []
        assert not opened.scrolls_sideways()
        heights = opened.page.eval_on_selector_all("figure svg[role=img]", "all => all.map(one => one.clientHeight)")
        assert len(heights) == 23, "a figure is missing"
        assert min(heights) > 40


def test_a_series_can_be_hidden_and_shown(page: Path) -> None:
    with open_page(page) as opened:
        lines = "document.querySelectorAll('svg[aria-label=Reward] [data-name=rl_on_mid]')"
        shown = f"() => [...{lines}].map(line => line.style.display)"
        choice = opened.page.locator("figure", has=opened.page.locator("svg[aria-label=Reward]")).get_by_role(
            "button", name="rl_on_mid"
        )
        assert opened.page.evaluate(shown) == [""]
        choice.click()
        assert opened.page.evaluate(shown) == ["none"]
        assert choice.get_attribute("aria-pressed") == "false"
        choice.press("Enter")
        assert opened.page.evaluate(shown) == [""]


def test_dragging_zooms_and_reset_goes_back(page: Path) -> None:
    with open_page(page) as opened:
        svg = opened.page.locator("svg[aria-label=Reward]")
        svg.scroll_into_view_if_needed()
        ticks = "all => all.map(one => one.textContent)"
        before = svg.locator(".x-tick").evaluate_all(ticks)
        box = svg.bounding_box()
        y = box["y"] + box["height"] / 2
        opened.page.mouse.move(box["x"] + 0.4 * box["width"], y)
        opened.page.mouse.down()
        opened.page.mouse.move(box["x"] + 0.6 * box["width"], y, steps=4)
        opened.page.mouse.up()
        after = [float(one) for one in svg.locator(".x-tick").evaluate_all(ticks)]
        assert 12 < min(after) < max(after) < 28, "the middle fifth of 40 steps"
        figure = opened.page.locator("figure", has=svg)
        figure.get_by_role("button", name="Reset zoom").click()
        assert svg.locator(".x-tick").evaluate_all(ticks) == before
        figure.get_by_role("button", name="Zoom in").click()
        assert svg.locator(".x-tick").evaluate_all(ticks) != before
        assert opened.console == []


def test_the_pointer_reads_values_off_a_curve(page: Path) -> None:
    with open_page(page) as opened:
        svg = opened.page.locator("svg[aria-label=Reward]")
        svg.scroll_into_view_if_needed()
        svg.hover()
        tip = opened.page.locator("#tip")
        assert tip.is_visible()
        assert "rl_on_mid: 0." in tip.inner_text()


def test_the_page_of_a_quickstart(tmp_path: Path) -> None:
    with open_page(write_report(write_run(tmp_path / "run"))) as opened:
        assert opened.console == []
        assert opened.axe() == []
        assert opened.page.locator(".controls").count() > 5
