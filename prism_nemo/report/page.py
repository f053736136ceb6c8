"""Writes the report: reads a quickstart directory, builds every part, and renders one self-contained HTML file."""

from __future__ import annotations

import base64
import functools
import hashlib
import os
from pathlib import Path

import jinja2
from markupsafe import Markup

from prism_nemo import __version__
from prism_nemo.report import headline, insides, learning, ledger, outcome, samples
from prism_nemo.report.formatting import clean
from prism_nemo.report.read import Record, read_directory

HERE = Path(__file__).parent


def write_report(directory: Path) -> Path:
    """Writes `report.html` into a quickstart directory.

    The page needs no network and no other file. What the run did not measure is shown as "not measured".

    Args:
        directory: Holds `summary.json` and one directory with `metrics.jsonl` per stage.

    Returns:
        Path of the page.

    Raises:
        InputError: `summary.json` is missing or is not a JSON object.
    """
    record = read_directory(Path(directory))
    target = Path(directory) / "report.html"
    # Written beside and moved into place, so that a browser that reloads never sees half a page.
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    beside.write_bytes(render(record).encode("utf-8"))
    beside.replace(target)
    return target


def render(record: Record) -> str:
    """Renders the page.

    Args:
        record: What was read; takes the notes on what is missing while the parts are built.
    """
    script = (HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = _parts(record)
    return _template().render(
        **parts,
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=digest,
        version=__version__,
        # Last, when every part has noted what it missed.
        gaps=record.gaps,
        warnings=record.warnings,
    )


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        # On for every template: prompts and model output are untrusted, and `.j2` is no suffix that Jinja knows.
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        # Each value passes here once, so no control character reaches the page whatever part it is in.
        finalize=lambda value: value if isinstance(value, Markup) else clean(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2")


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
