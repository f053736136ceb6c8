"""The page in a real browser: no errors, accessible in both schemes and on a phone, and its controls work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from browser import DESK, PHONE, needs_browser, open_page
from fake_run import write_run
from made_runs import make_job, make_pipeline, make_run, midtrain_lines

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
        assert len(heights) == 25, "a figure is missing"
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


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a job and evaluations on the way, so that each part of the page is there."""
    directory = write_run(tmp_path_factory.mktemp("quickstart") / "run")
    make_job(directory / "midtrained")
    asked = ({"step": step, "eval/accuracy/sums": 0.5, "eval/loss/text": 3.0} for step in (0, 200, 400))
    with (directory / "midtrained/metrics.jsonl").open("a") as file:
        file.writelines(f"{json.dumps(line)}\n" for line in asked)
    return write_report(directory)


@pytest.mark.parametrize(("width", "scheme"), [(DESK, "light"), (DESK, "dark"), (PHONE, "light"), (PHONE, "dark")])
def test_nothing_is_wrong_with_the_page_of_a_quickstart(quickstart: Path, width: int, scheme: str) -> None:
    with open_page(quickstart, width=width, scheme=scheme) as opened:
        assert opened.console == []
        assert opened.axe() == []
        assert not opened.scrolls_sideways()
        assert opened.page.locator(".controls").count() > 5
        assert opened.page.get_by_role("heading", name="Slurm jobs").is_visible()
        assert opened.page.locator("svg[aria-label='sums while training']").is_visible()
        heights = opened.page.eval_on_selector_all("figure svg[role=img]", "all => all.map(one => one.clientHeight)")
        assert min(heights) > 40


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_print_has_no_controls_and_light_colours_and_every_number(quickstart: Path, scheme: str) -> None:
    with open_page(quickstart, scheme=scheme) as opened:
        page = opened.page
        page.emulate_media(media="print")
        controls = "button, nav, #tip, details.numbers > summary"
        boxes = page.eval_on_selector_all(controls, "all => all.map(one => one.getClientRects().length)")
        assert len(boxes) > 50
        assert set(boxes) == {0}, "a control is printed"
        page.evaluate("() => window.dispatchEvent(new Event('beforeprint'))")
        heights = page.eval_on_selector_all("figure table", "all => all.map(one => one.getClientRects().length)")
        assert heights, "no numbers"
        assert min(heights) == 1, "a table stays closed"
        colours = page.evaluate(
            "() => ['body', '.card', '.badge'].map(one => getComputedStyle(document.querySelector(one)))"
            ".map(one => [one.backgroundColor, one.color])"
        )
        assert colours[0] == ["rgb(255, 255, 255)", "rgb(0, 0, 0)"]
        assert [back for back, _ in colours[1:]] == ["rgb(255, 255, 255)"] * 2
        page.evaluate("() => window.dispatchEvent(new Event('afterprint'))")
        assert page.locator("details[open]").count() == 0, "what was opened for the print is closed again"


def test_nothing_is_cut_at_the_end_of_a_printed_page(quickstart: Path) -> None:
    with open_page(quickstart) as opened:
        opened.page.emulate_media(media="print")
        for selector, name in (("figure, .card, tr", "breakInside"), ("h2, h3", "breakAfter")):
            kept = f"all => all.map(one => getComputedStyle(one).{name})"
            assert set(opened.page.eval_on_selector_all(selector, kept)) == {"avoid"}, selector
        wide = opened.page.eval_on_selector_all(
            "svg[role=img]", "all => all.map(one => getComputedStyle(one).minWidth)"
        )
        assert set(wide) == {"0px"}, "a picture that does not shrink is cut at the edge of the paper"


def test_a_page_made_from_a_large_run_opens(tmp_path: Path) -> None:
    """What opens fast does not grow with the run: a small file, few elements, and no data in the script."""
    sizes, nodes = [], []
    for count in (6_000, 60_000):
        root = tmp_path / str(count)
        make_run(root / "mid", "midtrain", midtrain_lines(count), steps=count)
        page = write_report(root)
        with open_page(page) as opened:
            assert opened.console == []
            nodes.append(opened.page.locator("svg *").count())
            script = opened.page.locator("script").inner_text()
        sizes.append(page.stat().st_size)
        assert len(script) < 12_000
    assert sizes[1] < 150_000
    assert nodes[1] < 1_500
    assert sizes[1] < 1.1 * sizes[0], "ten times the rows, and the page grows"
    assert nodes[1] <= nodes[0] + 20
