"""Figures outside of the report, in its style: as a page of their own, one HTML file without the network, or as SVG."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup, escape

from prism_nemo.checkpoint.atomic import write_text
from prism_nemo.report.formatting import clean

_CSS = Path(__file__).parent / "page.css"


def figure_page(title: str, intro: str, figures: Sequence[tuple[str, Markup, str]]) -> str:
    """An HTML page of figures.

    Args:
        title: Of the page.
        intro: A sentence or two below it.
        figures: Heading, drawing (see `prism_nemo.report.charts`) and caption of each.
    """
    cards = Markup("").join(
        Markup(
            '<figure class="card wide"><h3>{}</h3><div class="scroll">{}</div><figcaption>{}</figcaption></figure>'
        ).format(clean(heading), drawing, clean(caption))
        for heading, drawing, caption in figures
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(clean(title))}</title><style>{_CSS.read_text(encoding='utf-8')}"
        "figure.card { margin-top: 18px; }</style></head><body>"
        f'<header class="page"><h1>{escape(clean(title))}</h1><p class="lede">{escape(clean(intro))}</p></header>'
        f"<main>{cards}</main></body></html>"
    )


def standalone_svg(drawing: Markup) -> str:
    """A drawing as an SVG file: with the style sheet's colours and its rules for pictures, and a background."""
    css = _CSS.read_text(encoding="utf-8")
    colours = css.partition("\n* {")[0]
    rules = "\n".join(re.findall(r"^svg[^{]*\{[^}]*\}", css, re.M))
    style = f"<style>{colours}\n{rules}\nsvg {{ background: var(--card); }}</style>"
    head, _, rest = str(drawing).partition(">")
    if "xmlns=" not in head:
        head += ' xmlns="http://www.w3.org/2000/svg"'
    return f"{head}>{style}{rest}\n"


def write_figures(path: Path, title: str, intro: str, figures: Sequence[tuple[str, Markup, str]]) -> None:
    """Write `figure_page` to a file."""
    write_text(path, figure_page(title, intro, figures))
