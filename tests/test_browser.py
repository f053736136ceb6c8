"""That the browser of the other tests sees what it should."""

from __future__ import annotations

from pathlib import Path

from browser import PHONE, browser, needs_browser, open_page

pytestmark = needs_browser()

GOOD = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>t</title></head>'
    "<body><main><h1>Heading</h1><p>text</p></main></body></html>"
)
BAD = (
    "<!doctype html><html><head><title>t</title></head><body><h1>x</h1>"
    '<img src="https://example.org/x.png"><div style="width:5000px">wide</div>'
    "<script>console.error('broken'); null.x</script></body></html>"
)


def test_a_good_page_is_silent_and_a_bad_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "good.html").write_text(GOOD)
    (tmp_path / "bad.html").write_text(BAD)
    with browser() as chromium:
        with open_page(tmp_path / "good.html", chromium=chromium) as page:
            assert page.console == []
            assert page.axe() == []
            assert not page.scrolls_sideways()
        with open_page(tmp_path / "bad.html", width=PHONE, scheme="dark", chromium=chromium) as page:
            said = " ".join(page.console)
            assert "asked for https://example.org/x.png" in said
            assert "error: broken" in said
            assert "script: " in said
            found = " ".join(page.axe())
            assert "html-has-lang" in found
            assert "image-alt" in found
            assert page.scrolls_sideways()
            assert page.page.evaluate("() => matchMedia('(prefers-color-scheme: dark)').matches")
            page.screenshot(tmp_path / "bad.png")
        with open_page(tmp_path / "bad.html", javascript=False, chromium=chromium) as page:
            assert not any("broken" in line for line in page.console)
    assert (tmp_path / "bad.png").stat().st_size > 1000
