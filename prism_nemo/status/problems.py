"""What is wrong with a run, in words, each with what to do."""

from __future__ import annotations

import os
import shutil
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from prism_nemo.status.files import read_text
from prism_nemo.status.run_status import RunStatus

# Seconds by which clocks may differ before it is said: a file server's resolution and a slow write are less.
_SKEW = 5.0
# A run that logs is silent for a step; one that is silent for so many of its steps hangs or is gone.
_SILENT_STEPS = 20
_SILENT_LEAST = 900.0


def lock_problems(status: RunStatus, held: bool | None, process: dict[str, Any] | None) -> list[str]:
    """A lock that was left behind.

    Args:
        status: Of the run.
        held: Whether a process holds it; None where that cannot be known.
        process: That is named in it.
    """
    if process is None or held or status.state in ("finished", "running"):
        return []
    who = f"process {process.get('pid')} on {process.get('host')}"
    if held is None:
        return [f"stale lock? it names {who}, and this file system cannot tell whether that is still there"]
    return [f"stale lock: {who} was killed without letting go; the same command takes over and goes on"]


def clock_problems(run: Path, starts: list[dict[str, Any]], status: RunStatus, now: float) -> list[str]:
    """Times of starts come from the nodes' clocks, times of files from the file server's."""
    found = []
    times = [_seconds(str(start.get("time", ""))) for start in starts]
    for number, (before, after) in enumerate(pairwise(times), 1):
        if before is not None and after is not None and after < before - _SKEW:
            found.append(
                f"clocks differ: start {number + 1} is dated {before - after:.0f} s before start {number}; look at the "
                "time service of the nodes (chronyc tracking)"
            )
    try:
        written = (run / "metrics.jsonl").stat().st_mtime
    except OSError:
        return found
    if written > now + _SKEW:
        found.append(f"clocks differ: the metrics were written {written - now:.0f} s in the future of this machine")
    last = times[-1] if times else None
    logged = status.step > int(starts[-1].get("step", 0)) if starts else False
    if last is not None and logged and last > written + _SKEW:
        found.append(
            f"clocks differ: the newest metrics are {last - written:.0f} s older than the start that wrote them; the "
            "node's clock is ahead of the file server's"
        )
    return found


def _seconds(text: str) -> float | None:
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except ValueError:
        return None


def chain_problems(run: Path) -> list[str]:
    """What slurm/chain.sh wrote down."""
    found = []
    try:
        stalled = int(read_text(run / "chain/stalled"))
    except (OSError, ValueError):
        stalled = 0
    if stalled:
        found.append(f"no new checkpoint in the last {stalled} slice(s) of the chain; look into the job's log")
    try:
        nodes = read_text(run / "chain/bad_nodes").strip()
    except OSError:
        nodes = ""
    if nodes:
        found.append(f"nodes left out since their health check failed: {nodes}")
    return found


def silence(run: Path, status: RunStatus, pace: float | None, now: float) -> list[str]:
    """A run that holds its lock and logs nothing; `pace` is in seconds a step."""
    if status.state != "running":
        return []
    try:
        silent = now - (run / "metrics.jsonl").stat().st_mtime
    except OSError:
        return []
    if silent <= max(_SILENT_LEAST, _SILENT_STEPS * (pace or 0.0)):
        return []
    return [f"no metrics for {silent / 60:.0f} minutes; it hangs, saves, evaluates, or its time limit is near"]


def disk_problems(run: Path, status: RunStatus) -> list[str]:
    """A folder in which the next checkpoint cannot be written."""
    if status.state == "finished":
        return []
    if not os.access(run, os.W_OK):
        return ["the directory cannot be written from here: read-only, or another user's"]
    if status.checkpoint is None:
        return []
    size = sum(path.stat().st_size for path in Path(status.checkpoint).iterdir() if path.is_file())
    free = shutil.disk_usage(run).free
    if free >= size:
        return []
    return [f"{free / 1e9:.1f} GB free, and a checkpoint takes {size / 1e9:.1f}: the next save will fail"]
