"""The live page in a real browser: drawn, kept up to date, accessible, and deaf to markup in prompts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from browser import PHONE, browser, needs_browser, open_page
from watched_runs import HOSTILE, make_run, more_steps

from prism_nemo.watch.server import make_server
from prism_nemo.watch.state import Watched

pytestmark = needs_browser()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as found:
        yield found


@contextmanager
def served(folder: Path) -> Iterator[str]:
    server = make_server(Watched(folder), port=0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (PHONE, "dark")])
def test_a_run_is_shown_and_kept_up_to_date(tmp_path: Path, chromium: Any, width: int, scheme: Any) -> None:
    run = make_run(tmp_path / "rl", steps=20)
    with served(run) as address, open_page(address, width=width, scheme=scheme, chromium=chromium) as page:
        page.page.wait_for_selector("svg.curve")
        assert page.page.text_content("h1") == "Step 20 of 100"
        titles = page.page.eval_on_selector_all(".chart-title", "all => all.map(one => one.firstChild.textContent)")
        assert {"Loss", "Reward", "Response length", "Entropy of the policy", "Gradient norm"} <= set(titles)
        assert page.axe() == []
        assert not page.scrolls_sideways()
        more_steps(run, 21, 30)
        page.page.wait_for_function(
            "() => document.querySelector('h1').textContent === 'Step 30 of 100'", timeout=20000
        )
        page.page.hover("svg.curve >> nth=0")
        assert "step" in page.page.text_content(".readout >> nth=0")
        page.page.focus("svg.curve >> nth=1")
        page.page.keyboard.press("Home")
        assert page.page.text_content(".readout >> nth=1").startswith("step 1: ")
        page.page.keyboard.press("ArrowRight")
        assert page.page.text_content(".readout >> nth=1").startswith("step 2: ")
        assert page.console == []


def test_markup_in_prompts_names_and_events_is_text(tmp_path: Path, chromium: Any) -> None:
    run = make_run(tmp_path / "rl", steps=3, text=HOSTILE)
    with served(run) as address, open_page(address, chromium=chromium) as page:
        page.page.wait_for_selector("#rollouts article")
        assert page.page.evaluate("() => window.broken === undefined")
        assert page.page.query_selector("#rollouts img, #events img, #problems img, main script") is None
        assert "<img src=x onerror" in page.page.text_content("#rollouts .said")
        assert page.axe() == []
        assert page.console == []


def test_an_empty_directory_waits_and_a_server_that_stops_is_said(tmp_path: Path, chromium: Any) -> None:
    with served(tmp_path) as address, open_page(address, chromium=chromium) as page:
        page.page.wait_for_function("() => document.querySelector('#says').textContent !== ''")
        assert page.page.text_content("h1") == "Waiting for the first step"
        make_run(tmp_path / "late", steps=2)
        page.page.wait_for_function(
            "() => document.querySelector('h1').textContent.startsWith('Step 2')", timeout=20000
        )
        page.page.route("**/state.json*", lambda route: route.abort())
        page.page.wait_for_function(
            "() => document.querySelector('#says').textContent.includes('has stopped')", timeout=20000
        )
