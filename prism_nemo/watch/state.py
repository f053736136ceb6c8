"""What is known of a running stage, as JSON has it: numbers, curves, events, the latest rollouts."""

from __future__ import annotations

import math
import os
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from prism_nemo.errors import InputError, PrismError
from prism_nemo.metrics_file import MetricsFile
from prism_nemo.report.formatting import clean
from prism_nemo.report.read import number
from prism_nemo.rl.store import FOLDER, read_rollouts, recorded_steps
from prism_nemo.status.collect import collect
from prism_nemo.status.files import read_json
from prism_nemo.status.run_status import RunStatus
from prism_nemo.status.slurm import Job, queue
from prism_nemo.watch.thin import newest, thin

LONGEST = 2000  # characters of a prompt or an answer
MOST_ROLLOUTS, MOST_EVENTS, MOST_SERIES, MOST_RUNS = 6, 40, 12, 200
_QUEUE_SECONDS = 30.0
_LARGEST = 16 << 20  # bytes of a step's rollouts that are read


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        title: Above it.
        unit: Of its values.
        names: Metrics that are drawn.
        prefix: Metrics that begin so are drawn as well, such as ``loss/`` for the loss of each source.
        inside: A metric whose names inside are drawn as well, such as the reward of each task.
    """

    title: str
    unit: str
    names: tuple[str, ...]
    prefix: str | None = None
    inside: str | None = None


CHARTS = (
    Chart("Loss", "nats per token", ("loss", "validation_loss"), "loss/"),
    Chart("Reward", "mean of a step", ("reward",), None, "reward_by_task"),
    Chart("Response length", "tokens", ("response_length",)),
    Chart("Entropy of the policy", "nats per token", ("entropy",)),
    Chart("Gap between sampler and trainer", "log-probability", ("logprob_gap",)),
    Chart("Live groups", "share of prompts", ("live_groups",)),
    Chart("Evaluation: accuracy", "share", (), "eval/accuracy/"),
    Chart("Evaluation: loss", "nats per token", (), "eval/loss/"),
    Chart("Gradient norm", "before clipping", ("grad_norm",)),
    Chart("Learning rate", "", ("lr",)),
    Chart("Speed", "tokens per second", ("tokens_per_second",)),
    Chart("Model FLOPs utilisation", "share of the peak", ("mfu",)),
    Chart("Memory", "GB", ("memory_gb",)),
    Chart("Skipped steps", "since the start", ("skipped_steps",)),
)


class Watched:
    """A run, or a folder of runs, that is looked at again and again.

    Args:
        folder: Run directory, or a folder with such in it. It may still be empty.

    Raises:
        InputError: If it is no folder.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; name a run directory, or a folder of run directories")
        self.folder = folder
        self._metrics: dict[str, MetricsFile] = {}
        self._answers: dict[str, tuple[object, list[dict[str, Any]], list[str]]] = {}
        self._jobs: tuple[float, list[Job] | None] | None = None

    def _queue(self) -> list[Job] | None:
        """The user's jobs; Slurm is asked at most twice a minute, as its administrators ask."""
        if self._jobs is None or time.monotonic() - self._jobs[0] > _QUEUE_SECONDS:
            self._jobs = (time.monotonic(), queue())
        return self._jobs[1]

    def look(self, chosen: str | None = None) -> dict[str, Any]:
        """Everything that is shown now.

        Args:
            chosen: Name of a run below the folder, as an earlier look gave it; None takes the one that runs, or else
                the one that logged last.

        Returns:
            Values that JSON has, all text cleaned and cut. ``problem`` says why nothing can be shown.
        """
        if not self.folder.is_dir():
            return {"runs": [], "run": None, "problem": f"{clean(str(self.folder), 300)} is no longer there"}
        try:
            return _finite(self._look(chosen))
        except Exception as error:  # whatever a directory holds: the page says it, and goes on
            return {"runs": [], "run": None, "problem": clean(f"{type(error).__name__}: {error}", 500)}

    def _look(self, chosen: str | None) -> dict[str, Any]:
        inside = self.folder.resolve()
        # A link may lead anywhere; only what lies below the folder is shown.
        runs = [run for run in collect([self.folder], self._queue) if Path(run.run).resolve().is_relative_to(inside)][
            :MOST_RUNS
        ]
        if not runs:
            return {"runs": [], "run": None, "problem": None}
        names = {self._name(run): run for run in runs}
        run = names.get(chosen or "") or max(runs, key=lambda one: (one.state == "running", one.updated or ""))
        listed = [
            {"name": clean(name, 300), "state": one.state, "stage": clean(one.stage, 40)} for name, one in names.items()
        ]
        return {"runs": listed, "run": self._run(run), "problem": None}

    def _name(self, run: RunStatus) -> str:
        return os.path.relpath(run.run, self.folder)

    def _run(self, run: RunStatus) -> dict[str, Any]:
        path = Path(run.run)
        metrics = self._metrics.setdefault(run.run, MetricsFile(path / "metrics.jsonl"))
        problems = list(run.problems)
        try:
            metrics.refresh()
        except (PrismError, OSError) as error:
            problems.append(str(error))
        if metrics.unreadable:
            problems.append(f"{metrics.unreadable} lines of metrics.jsonl cannot be read")
        rollouts, trouble = self._newest_rollouts(path)
        return {
            "name": clean(self._name(run), 300),
            "stage": clean(run.stage, 40),
            "state": run.state,
            "step": run.step,
            "steps": run.steps,
            "seconds_left": run.seconds_left,
            "tokens_per_second": run.tokens_per_second,
            "mfu": newest(metrics.series("mfu")[1]),
            "memory_gb": newest(metrics.series("memory_gb")[1]),
            "skipped_steps": newest(metrics.series("skipped_steps")[1]),
            "checkpoint_step": run.checkpoint_step,
            "restarts": run.restarts,
            "updated": run.updated,
            "job": clean(f"{run.job.id} {run.job.state}", 80) if run.job is not None else None,
            "problems": [clean(problem, 500) for problem in [*problems, *trouble]],
            "charts": _charts(metrics),
            "events": _events(path),
            "rollouts": rollouts,
        }

    def _newest_rollouts(self, run: Path) -> tuple[list[dict[str, Any]], list[str]]:
        """Those of the last step; read when there are others than at the look before."""
        files = _newest_files(run)
        mark = [(path.name, path.lstat().st_mtime_ns, path.lstat().st_size) for path in files]
        known = self._answers.get(str(run))
        if known is None or known[0] != mark:
            known = (mark, *_rollouts(run, files))
            self._answers[str(run)] = known
        return known[1], known[2]


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _charts(metrics: MetricsFile) -> list[dict[str, Any]]:
    found = []
    for chart in CHARTS:
        wanted: list[tuple[str, tuple[str, str | None]]] = [(name, (name, None)) for name in chart.names]
        if chart.prefix is not None:
            wanted += [(name.removeprefix(chart.prefix), (name, None)) for name in metrics.names(chart.prefix)]
        if chart.inside is not None:
            wanted += [(name, (chart.inside, name)) for name in metrics.inner_names(chart.inside)]
        series = []
        for label, place in wanted[:MOST_SERIES]:
            steps, values = metrics.series(*place)
            if len(steps):
                series.append({"label": clean(label, 60), "points": thin(steps, values), "newest": newest(values)})
        if series:
            found.append({"title": chart.title, "unit": chart.unit, "series": series})
    return found


def _small(path: Path) -> bool:
    """Whether this is a regular file, and not a link, that may be read: a named pipe would never end."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size <= _LARGEST


def _events(run: Path) -> list[str]:
    events = read_json(run / "lineage.json").get("events")
    lines = []
    for event in events if isinstance(events, list) else []:
        if isinstance(event, dict):
            about = ", ".join(f"{key} {value}" for key, value in event.items() if key != "event" and _short(value))
            lines.append(clean(f"{event.get('event')}: {about}" if about else str(event.get("event")), 300))
    return lines[-MOST_EVENTS:]


def _short(value: Any) -> bool:
    """Neither hashes nor lists of them."""
    return isinstance(value, int | float | str) and not (isinstance(value, str) and len(value) == 64)


def _newest_files(run: Path) -> list[Path]:
    folder = run / FOLDER
    if folder.is_symlink() or not folder.is_dir():
        return []
    steps = recorded_steps(run)
    files = sorted(folder.glob(f"step_{steps[-1]:08d}.*.zst")) if steps else []
    return files if all(map(_small, files)) else []


def _unpacked(file: Path) -> int:
    """Bytes that a file of rollouts unpacks to, as its frame says, which is what would be allocated."""
    with file.open("rb") as opened:
        return zstandard.get_frame_parameters(opened.read(64)).content_size


def _rollouts(run: Path, files: list[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    if not files:
        return [], []
    try:
        if sum(map(_unpacked, files)) > _LARGEST:
            return [], [f"the latest rollouts are larger than {_LARGEST:,} bytes; see: prism-nemo rollouts show"]
        lines = read_rollouts(run, recorded_steps(run)[-1])
    except (PrismError, OSError, KeyError, TypeError, RecursionError, zstandard.ZstdError) as error:
        return [], [f"the latest rollouts cannot be read: {error}"]
    # Evenly over the step's prompts, so that every task has a chance.
    stride = max(1, len(lines) // MOST_ROLLOUTS)
    return [_rollout(line) for line in lines[::stride][:MOST_ROLLOUTS]], []


def _rollout(line: dict[str, Any]) -> dict[str, Any]:
    reward = line.get("reward")
    return {
        "step": line.get("step") if isinstance(line.get("step"), int) else None,
        "task": clean(str(line.get("task", "")), 60),
        "prompt": clean(str(line.get("prompt", "")), LONGEST),
        "answer": clean(str(line.get("answer", "")), 200),
        "response": clean(str(line.get("response", "")), LONGEST),
        "reward": number(reward),
        "failure": clean(str(line["failure"]), 200) if line.get("failure") else None,
    }
