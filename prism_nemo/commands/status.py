"""`prism-nemo status`: where runs stand."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from prism_nemo.commands.printing import Json, show_rich


def status(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Run directories, or folders of them; default runs.")
    ] = None,
    as_json: Json = False,
) -> None:
    """What runs, step, loss, speed, time left, last checkpoint, restarts, next job; from the directories and Slurm."""
    from prism_nemo.status.collect import collect, other_jobs
    from prism_nemo.status.view import MIN_WIDTH, status_view

    found = collect(runs or ())
    jobs = other_jobs(found)
    if as_json:
        told = {"runs": [one.to_dict() for one in found], "other_jobs": [asdict(job) for job in jobs]}
        typer.echo(json.dumps(told))
    else:
        show_rich(status_view(found, jobs), MIN_WIDTH)
