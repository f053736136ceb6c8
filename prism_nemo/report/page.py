"""Writes the report: reads the directories, builds every part, and renders one self-contained HTML file."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from prism_nemo import __version__
from prism_nemo.checkpoint.atomic import write_text
from prism_nemo.errors import InputError
from prism_nemo.report import headline, insides, learning, ledger, outcome, samples, story_page
from prism_nemo.report.formatting import clean
from prism_nemo.report.read import Record, read_directory
from prism_nemo.report.story import Story
from prism_nemo.report.story_page import read_story

HERE = Path(__file__).parent


def write_report(directories: Path | Sequence[Path], out: Path | None = None) -> Path:
    """Writes the page of a quickstart, or of any runs and results.

    The page needs no network and no other file. What was not measured is shown as "not measured".

    Args:
        directories: One quickstart's folder (with `summary.json`), or run directories, results of `eval`, `retention`
            and `analyze`, and folders that hold such.
        out: The file; `report.html` in the first directory if not given.

    Returns:
        Path of the page.

    Raises:
        InputError: If a directory does not exist, none holds anything that a report can be made of, `summary.json` is
            not a JSON object, or the file cannot be written.
    """
    named = [directories] if isinstance(directories, str | Path) else list(directories)
    if not named:
        raise InputError("report: name at least one run directory")
    folders = [Path(directory) for directory in named]
    if len(folders) == 1 and (folders[0] / "summary.json").exists():
        page = render(read_directory(folders[0]))
    else:
        page = render_story(read_story(folders))
    target = Path(out) if out is not None else folders[0] / "report.html"
    try:
        write_text(target, page)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror or error}); give another file") from error
    return target


def render(record: Record) -> str:
    """Renders the page of a quickstart.

    Args:
        record: What was read; takes the notes on what is missing while the parts are built.
    """
    parts = _parts(record)
    # The gaps last, when every part has noted what it missed.
    return _render("page.html.j2", {**parts, "gaps": record.gaps, "warnings": record.warnings})


def render_story(story: Story) -> str:
    """Renders the page of any runs.

    Args:
        story: What was read; takes the notes on what is missing while the parts are built.
    """
    parts = story_page.parts(story)
    return _render("runs.html.j2", {**parts, "gaps": story.gaps, "warnings": list(dict.fromkeys(story.warnings))})


def _render(template: str, parts: dict[str, Any]) -> str:
    script = (HERE / "page.js").read_text(encoding="utf-8")
    return (
        _environment()
        .get_template(template)
        .render(
            **parts,
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


def _parts(record: Record) -> dict[str, object]:
    accuracy, accuracy_table = outcome.accuracy_figures(record)
    rl_overall, rl_tasks, rl_table = learning.rl_figures(record)
    return {
        "opening": headline.opening(record),
        "headlines": headline.headlines(record),
        "lineage": outcome.lineage_figure(record),
        "mixtures": learning.mixture_figures(record),
        "accuracy": accuracy,
        "accuracy_table": accuracy_table,
        "retention": outcome.retention_figures(record),
        "loss": learning.loss_figure(record),
        "rl_overall": rl_overall,
        "rl_tasks": rl_tasks,
        "rl_table": rl_table,
        "weights": insides.weight_figures(record),
        "cka": insides.cka_figure(record),
        "samples": samples.collect(record),
        "cost": ledger.cost_facts(record),
        "timeline": ledger.timeline_figure(record),
        "claims": ledger.claims(record),
        "conversions": ledger.conversions(record),
        "rollout_check": ledger.rollout_check(record),
        "facts": ledger.facts(record),
    }
