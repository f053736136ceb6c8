"""Where runs stand: one `RunStatus` for each run directory, with what is wrong with it in words."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from prism_nemo.config import load_yaml
from prism_nemo.errors import InputError
from prism_nemo.run import CONFIG
from prism_nemo.status.files import holder, last_lines, newest_checkpoint, read_json
from prism_nemo.status.problems import chain_problems, clock_problems, disk_problems, lock_problems, silence
from prism_nemo.status.run_status import RunStatus
from prism_nemo.status.slurm import Job, look_up, queue

DEFAULT_FOLDER = Path("runs")
# Depth below a named folder in which run directories are looked for.
_DEPTH = 3


def collect(paths: Iterable[Path] = (), queued: Callable[[], list[Job] | None] = queue) -> list[RunStatus]:
    """The state of runs, in the order of their names.

    Args:
        paths: Run directories, or folders with such in them; `DEFAULT_FOLDER` if none is named.
        queued: Gives the user's jobs, None where there is no Slurm.

    Raises:
        InputError: If a path is no folder.
    """
    found: list[Path] = []
    for path in list(paths) or [DEFAULT_FOLDER]:
        if not path.is_dir():
            raise InputError(f"{path}: no such folder; name a run directory, or a folder of run directories")
        found += _runs_in(path)
    jobs = queued()
    return [_understood(run, jobs, time.time()) for run in dict.fromkeys(found)]


def _understood(run: Path, jobs: list[Job] | None, now: float) -> RunStatus:
    """The state of a run; one whose files hold something else than a stage writes does not hide the others."""
    try:
        return _status(run, jobs, now)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, OverflowError, OSError) as error:
        return RunStatus(str(run), problems=[f"its files cannot be understood ({type(error).__name__}: {error})"])


def other_jobs(statuses: list[RunStatus]) -> list[Job]:
    """The user's jobs that belong to none of these runs: their first start is still to come."""
    known = {status.job.id for status in statuses if status.job is not None}
    return [job for job in queue() or [] if job.id not in known]


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in ("lineage.json", "slurm.json", "metrics.jsonl"))


def _runs_in(path: Path, depth: int = _DEPTH) -> list[Path]:
    if _is_run(path):
        return [path]
    if depth == 0:
        return []
    try:
        folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []
    return [run for folder in folders for run in _runs_in(folder, depth - 1)]


def _status(run: Path, jobs: list[Job] | None, now: float) -> RunStatus:
    lineage, slurm = read_json(run / "lineage.json"), read_json(run / "slurm.json")
    started = lineage.get("starts")
    starts = [start for start in started if isinstance(start, dict)] if isinstance(started, list) else []
    lines = last_lines(run / "metrics.jsonl")
    newest = newest_checkpoint(run)
    measure = "reward" if lineage.get("stage") == "rl" else "loss"
    config, unreadable = _config(run)
    steps = config.get("train_steps")
    status = RunStatus(
        str(run),
        stage=str(lineage.get("stage", "")),
        step=max([line["step"] for line in lines[-1:]] + [newest[1] if newest else 0]),
        steps=steps if isinstance(steps, int) else None,
        measure=measure,
        value=_newest(lines, measure),
        tokens_per_second=_newest(lines, "tokens_per_second"),
        checkpoint=str(newest[0]) if newest else None,
        checkpoint_step=newest[1] if newest else None,
        updated=_time_of(run / "metrics.jsonl"),
        restarts=max(0, len(starts) - 1),
        log=slurm.get("log"),
    )
    pace = _pace(lines)
    if status.steps is not None and pace is not None and status.step < status.steps:
        status = replace(status, seconds_left=(status.steps - status.step) * pace)
    job, next_jobs = _jobs(str(slurm.get("job", "")), jobs)
    held, process = holder(run)
    status = replace(status, job=job, next_jobs=next_jobs)
    status = replace(status, state=_state(status, held, process, run))
    problems = [unreadable] if unreadable else []
    problems += lock_problems(status, held, process) + clock_problems(run, starts, status, now)
    problems += chain_problems(run) + silence(run, status, pace, now) + disk_problems(run, status)
    return replace(status, problems=problems)


def _config(run: Path) -> tuple[dict[str, Any], str | None]:
    if not (run / CONFIG).is_file():
        return {}, None
    try:
        return load_yaml(run / CONFIG), None
    except InputError as error:
        return {}, str(error)


def _newest(lines: list[dict[str, Any]], name: str) -> float | None:
    values = [line[name] for line in lines if _is_number(line.get(name))]
    return float(values[-1]) if values else None


def _is_number(value: object) -> bool:
    """Whether a value of JSON is a number that can be computed with: its integers may have any length."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _pace(lines: list[dict[str, Any]]) -> float | None:
    """Seconds of a step, over the newest logged steps; `seconds` counts training only, and goes on after a restart."""
    timed = [line for line in lines if _is_number(line.get("seconds"))][-20:]
    if len(timed) < 2:
        return timed[0]["seconds"] / timed[0]["step"] if timed and timed[0]["step"] > 0 else None
    steps = timed[-1]["step"] - timed[0]["step"]
    seconds = timed[-1]["seconds"] - timed[0]["seconds"]
    return seconds / steps if steps > 0 and seconds >= 0 else None


def _time_of(path: Path) -> str | None:
    try:
        return datetime.fromtimestamp(path.stat().st_mtime).astimezone().isoformat(timespec="seconds")
    except OSError:
        return None


def _jobs(number: str, jobs: list[Job] | None) -> tuple[Job | None, list[Job]]:
    if not number or jobs is None:
        return None, []
    mine = next((job for job in jobs if job.id == number), None) or look_up(number)
    return mine, [job for job in jobs if number in job.after]


def _state(status: RunStatus, held: bool | None, process: dict[str, Any] | None, run: Path) -> str:
    if held:
        return "running"
    if status.steps is not None and (status.checkpoint_step or 0) >= status.steps:
        return "finished"
    job = status.job
    if job is not None and job.state in ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED"):
        return "waiting"
    if job is not None and job.state in ("RUNNING", "COMPLETING") and held is not False:
        return "running"
    if job is not None and job.state in ("FAILED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "CANCELLED"):
        return "failed"
    if held is None:
        return "unknown"
    if process is not None:
        return "killed"
    return "stopped" if status.checkpoint is not None else "unknown"
