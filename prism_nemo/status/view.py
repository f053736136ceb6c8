"""Runs as a table, within 120 columns; what is wrong stands below it, one line each."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from prism_nemo.status.run_status import RunStatus
from prism_nemo.status.slurm import Job
from prism_nemo.training.progress import duration

MIN_WIDTH = 120
_STYLES = {"running": "green", "waiting": "yellow", "finished": "dim", "killed": "red", "failed": "red"}


def status_view(statuses: Sequence[RunStatus], jobs: Sequence[Job] = ()) -> RenderableType:
    """A row for each run.

    Args:
        statuses: Of `collect`.
        jobs: Of `other_jobs`: jobs that have no run yet.
    """
    parts: list[RenderableType] = [_runs(statuses)] if statuses else [Text("no runs here yet")]
    shared = _shared(statuses)
    for status in statuses:
        parts += [Text(f"{_name(status, shared)}: {problem}", "red") for problem in status.problems]
    if jobs:
        parts += [Text("\nJobs that belong to none of these runs", "bold"), _jobs(jobs)]
    return Group(*parts)


def _shared(statuses: Sequence[RunStatus]) -> str:
    """The folder that all runs are in: its name in every row would say nothing."""
    parents = [os.path.dirname(status.run) for status in statuses]
    return os.path.commonpath(parents) if parents and all(parents) else ""


def _name(status: RunStatus, shared: str) -> str:
    return os.path.relpath(status.run, shared) if shared else status.run


def _runs(statuses: Sequence[RunStatus]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("run", "stage", "state", "step", "", "tokens/s", "left", "checkpoint", "starts", "job", "next"):
        table.add_column(column, justify="right" if column in ("step", "tokens/s", "left", "starts") else "left")
    shared = _shared(statuses)
    for status in statuses:
        steps = f"/{status.steps}" if status.steps is not None else ""
        value = f"{status.measure} {status.value:.3f}" if status.value is not None else ""
        table.add_row(
            Text(_name(status, shared), overflow="fold"),
            status.stage,
            Text(status.state, _STYLES.get(status.state, "")),
            f"{status.step}{steps}",
            value,
            f"{status.tokens_per_second:,.0f}" if status.tokens_per_second is not None else "",
            duration(status.seconds_left) if status.seconds_left is not None else "",
            f"step {status.checkpoint_step}" if status.checkpoint_step is not None else "none",
            str(status.restarts + 1) if status.stage else "0",
            _job(status.job),
            ", ".join(job.id for job in status.next_jobs),
        )
    return table


def _job(job: Job | None) -> str:
    if job is None:
        return ""
    left = f", limit in {duration(job.seconds_left)}" if job.seconds_left is not None and job.state == "RUNNING" else ""
    return f"{job.id} {job.state}{left}"


def _jobs(jobs: Sequence[Job]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for job in jobs:
        waits = f"after {', '.join(job.after)}" if job.after else job.reason
        table.add_row(job.id, job.name, job.state, waits)
    return table
