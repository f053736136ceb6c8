"""The part about what it cost: tokens, time, use of the hardware, and every start and stop on one time line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from prism_nemo.report import charts
from prism_nemo.report.find import Run
from prism_nemo.report.formatting import NOT_MEASURED, clean, compact, duration, percent, significant, whole
from prism_nemo.report.model import Model
from prism_nemo.report.read import mapping, number, objects, words
from prism_nemo.report.story import Story
from prism_nemo.report.view import Figure, Table
from prism_nemo.status.files import read_json, read_text

_SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "data_parallel_size", "context_parallel_size")
_MOST_SLICES = 60
_LONGEST = 300  # characters of a text that a script wrote


@dataclass(frozen=True)
class Slice:
    """One start of a stage: when (seconds since the epoch), at which step, and for how long its kept work ran."""

    start: float
    step: int
    seconds: float | None


def processes(run: Run) -> int | None:
    """Number of ranks of a stage, from its layout; None where it is not recorded."""
    parallel = mapping(run.config.get("parallel"))
    sizes = [number(parallel.get(name)) for name in _SIZES]
    known = [int(size) for size in sizes if size is not None and size >= 1]
    return math.prod(known) if len(known) == len(_SIZES) else None


def on_cpu(run: Run) -> bool:
    """Whether the stage ran with the build of PyTorch that has no CUDA."""
    return words(mapping(run.lineage.get("versions")).get("torch")).endswith("+cpu")


def seconds_of(run: Run) -> float | None:
    """Training time of a stage; it goes on counting after a restart."""
    return run.newest("seconds")


def tokens_of(run: Run) -> float | None:
    """Tokens that a mid-training stage was trained on."""
    return run.newest("tokens")


def slices(run: Run) -> list[Slice]:
    """The starts of a stage that have a readable time, in order."""
    starts = []
    for start in objects(run.lineage.get("starts")):
        try:
            when = datetime.strptime(words(start.get("time")), "%Y-%m-%dT%H:%M:%S%z").timestamp()
        except ValueError:
            continue
        starts.append((when, int(number(start.get("step")) or 0)))
    steps, seconds = run.series("seconds")
    found = []
    for place, (when, step) in enumerate(starts):
        end = starts[place + 1][1] if place + 1 < len(starts) else math.inf
        inside = np.flatnonzero((steps > step) & (steps <= end) & np.isfinite(seconds))
        before = np.flatnonzero((steps <= step) & np.isfinite(seconds))
        took = float(seconds[inside[-1]] - (seconds[before[-1]] if len(before) else 0.0)) if len(inside) else None
        found.append(Slice(when, step, max(0.0, took) if took is not None else None))
    return found


def cost_table(story: Story) -> Table:
    """A row for each stage: tokens, time, speed, use of the hardware, restarts."""
    rows = []
    for model, run in story.runs:
        seconds, count = seconds_of(run), processes(run)
        hours = seconds * count / 3600 if seconds is not None and count is not None else None
        mfu = _median(run, "mfu")
        if mfu is None:
            story.missing(
                f"{model.name}: MFU", "recorded by mid-training on a GPU of prism_nemo/planning/hardware.py, not on CPU"
            )
        if tokens_of(run) is None and model.role in ("midtrain", "pretrain"):
            story.missing(f"{model.name}: tokens", "prism-nemo midtrain records them in metrics.jsonl")
        unit = "CPU process-hours" if on_cpu(run) else "GPU-hours"
        rows.append(
            (
                model.name,
                compact(tokens_of(run)) if tokens_of(run) is not None else NOT_MEASURED,
                duration(seconds),
                f"{significant(_median(run, 'tokens_per_second'))}",
                percent(mfu),
                f"{significant(hours)} {unit}" if hours is not None else NOT_MEASURED,
                str(count) if count is not None else NOT_MEASURED,
                str(max(0, len(objects(run.lineage.get("starts"))) - 1)) if run.lineage else NOT_MEASURED,
            )
        )
    columns = (
        "stage", "tokens", "training time", "tokens/s (median)", "MFU (median)", "hardware time",
        "processes", "restarts",
    )  # fmt: skip
    return Table(columns, rows, "Cost by stage")


def timeline(story: Story) -> Figure | None:
    """Draws when each slice of each stage ran; what lies between two bars of a stage is waiting or repeated work."""
    found = [(model, slices(run)) for model, run in story.runs]
    starts = [one.start for _, parts in found for one in parts]
    for model, parts in found:
        if not parts:
            story.missing(f"{model.name}: when it ran", "prism-nemo midtrain and rl record it in lineage.json")
    if not starts:
        return None
    first = min(starts)
    total = max(one.start - first + (one.seconds or 0.0) for _, parts in found for one in parts)
    size, unit = (86400, "d") if total > 3 * 86400 else (3600, "h") if total > 3 * 3600 else (60, "min")
    bars, rows = [], []
    for model, parts in found:
        for place, one in enumerate(parts):
            gap = _gap(parts, place)
            rows.append(
                (
                    f"{model.name}, start {place + 1}",
                    datetime.fromtimestamp(one.start).astimezone().isoformat(timespec="seconds"),
                    whole(one.step),
                    duration(one.seconds),
                    duration(gap) if gap is not None else "–",
                )
            )
            if place < _MOST_SLICES:
                bars.append(_slice_bar(model, place, len(parts), one, gap, first, size))
    svg = charts.horizontal_bars(
        bars,
        title="Time line",
        tick_format=lambda value: f"{value:g} {unit}",
        x_range=(0.0, max(total / size, 1e-9)),
        labels=180,
        width=1000,
    )
    caption = (
        f"From {datetime.fromtimestamp(first).astimezone().isoformat(timespec='minutes')} on. A bar is a slice's kept "
        "training time; the dashed line before a restart holds loading, waiting in the queue, evaluation, and work "
        "that a kill lost."
    )
    columns = ("slice", "start", "from step", "kept training time", "gap before it")
    return Figure("Time line", svg, caption, Table(columns, rows, "Time line"), wide=True)


def job_table(story: Story) -> Table | None:
    """A row for each stage that ran as a Slurm job: the job, its restarts, and how long it did not train in between.

    `slurm.json` is written by `slurm/stage.sh`, the numbers in `chain/` by `slurm/chain.sh`. Slurm tells neither when a
    job was queued, so waiting is at most what lies between two slices.
    """
    rows = []
    for model, run in story.runs:
        job = read_json(run.path / "slurm.json")
        if not job:
            continue
        parts = slices(run)
        gaps = [gap for place in range(len(parts)) if (gap := _gap(parts, place)) is not None]
        rows.append(
            (
                model.name,
                *(clean(words(job.get(key)), _LONGEST) or NOT_MEASURED for key in ("job", "nodes")),
                _chain(run, "restarts") or "0",
                whole(number(job.get("restarts"))),
                duration(sum(gaps)) if gaps else "–",
                _chain(run, "stalled") or "0",
                _chain(run, "bad_nodes") or "–",
                clean(words(job.get("log")), _LONGEST) or NOT_MEASURED,
            )
        )
    columns = (
        "stage", "newest job", "nodes", "restarts: chain", "restarts: Slurm", "between slices", "stalled slices",
        "nodes left out", "log",
    )  # fmt: skip
    return Table(columns, rows, "Slurm jobs") if rows else None


def _chain(run: Run, name: str) -> str:
    try:
        return clean(read_text(run.path / "chain" / name).strip(), _LONGEST)
    except OSError:
        return ""


def _slice_bar(
    model: Model, place: int, count: int, one: Slice, gap: float | None, first: float, size: float
) -> charts.Bar:
    label = model.name if count == 1 else f"{model.name} {place + 1}"
    length = one.seconds / size if one.seconds is not None else None
    start = (one.start - first) / size
    note = f"restart {place} at step {one.step:,}" if place else ""
    if gap is not None:
        note += f", {duration(gap)} after the last step that was kept"
    lead = 0.0 if gap is None else gap / size
    return charts.Bar(label, model.style, length, duration(one.seconds), start=start, note=note, lead=lead)


def _gap(parts: list[Slice], place: int) -> float | None:
    if place == 0 or parts[place - 1].seconds is None:
        return None
    return max(0.0, parts[place].start - parts[place - 1].start - (parts[place - 1].seconds or 0.0))


def _median(run: Run, key: str) -> float | None:
    values = run.series(key)[1]
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else None
