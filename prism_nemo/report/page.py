"""Writes the report: reads the directories, builds every part, and renders one self-contained HTML file."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from prism_nemo import __version__
from prism_nemo.checkpoint.atomic import write_text
from prism_nemo.errors import InputError
from prism_nemo.report import story_page
from prism_nemo.report.formatting import clean
from prism_nemo.report.story import Story
from prism_nemo.report.story_page import read_story

HERE = Path(__file__).parent


def write_report(directories: Path | Sequence[Path], out: Path | None = None) -> Path:
    """Writes the page of runs and results.

    The page needs no network and no other file. What was not measured is shown as "not measured".

    Args:
        directories: Run directories, results of `eval`, `retention` and `analyze`, a quickstart's folder, or folders
            that hold such.
        out: The file; `report.html` in the first directory if not given.

    Returns:
        Path of the page.

    Raises:
        InputError: If a directory does not exist, none holds anything that a report can be made of, or the file cannot
            be written.
    """
    named = [directories] if isinstance(directories, str | Path) else list(directories)
    if not named:
        raise InputError("report: name at least one run directory")
    folders = [Path(directory) for directory in named]
    page = render(read_story(folders))
    target = Path(out) if out is not None else folders[0] / "report.html"
    try:
        write_text(target, page)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror or error}); give another file") from error
    return target


def render(story: Story) -> str:
    """Renders the page.

    Args:
        story: What was read; takes the notes on what is missing while the parts are built.
    """
    script = (HERE / "page.js").read_text(encoding="utf-8")
    parts = story_page.parts(story)
    # The gaps last, when every part has noted what it missed.
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            **parts,
            gaps=story_page.grouped(story.gaps),
            warnings=list(dict.fromkeys(story.warnings)),
            style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            version=__version__,
        )
    )


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        # On for every template: prompts and model output are untrusted, and `.j2` is no suffix that Jinja knows.
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        # Each value passes here once, so no control character reaches the page whatever part it is in.
        finalize=lambda value: value if isinstance(value, Markup) else clean(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
    )
