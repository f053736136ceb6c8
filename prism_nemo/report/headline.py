"""The top of the page: what was done, and the three plain statements that the rest of it backs up."""

from __future__ import annotations

import math
from dataclasses import dataclass

from prism_nemo.report.formatting import NOT_MEASURED, compact, decimal, duration, percent, signed
from prism_nemo.report.read import Record, mapping, number, words
from prism_nemo.report.stages import STAGES, stage
from prism_nemo.report.view import Headline

HEADLINE_STAGES = ("base", "midtrained", "prism_rl", "base_rl")


@dataclass(frozen=True)
class Mean:
    """Unweighted mean of the accuracy over task families, and half the width of its 95 % interval if known."""

    value: float
    half: float | None


def compared_tasks(record: Record) -> list[str]:
    """Returns the task families measured in every evaluated stage of the headline, so that means can be compared."""
    evaluated = [record.tasks(key) for key in HEADLINE_STAGES if record.tasks(key)]
    if not evaluated:
        return []
    return [name for name in evaluated[0] if all(_share(tasks.get(name)) is not None for tasks in evaluated)]


def mean_accuracy(record: Record, key: str, tasks: list[str]) -> Mean | None:
    """Averages the sampled accuracy of a stage.

    The interval takes the families as independent samples: half widths add in squares.

    Args:
        record: The run.
        key: Name of the stage.
        tasks: Names of the task families to average.

    Returns:
        The mean, or None if one of the families was not measured.
    """
    found = [record.tasks(key).get(name) for name in tasks]
    values = [_share(task) for task in found]
    known = [value for value in values if value is not None]
    if not known or len(known) < len(tasks):
        return None
    halves = []
    for task in found:
        ends = mapping(task).get("ci95")
        low, high = (number(ends[0]), number(ends[1])) if isinstance(ends, list) and len(ends) == 2 else (None, None)
        halves.append((high - low) / 2 if low is not None and high is not None else None)
    measured = [half for half in halves if half is not None]
    half = math.hypot(*measured) / len(tasks) if len(measured) == len(tasks) else None
    return Mean(sum(known) / len(known), half)


def opening(record: Record) -> str:
    """Says in one sentence what was done, on what, and how long it took; leaves out what is not known."""
    model = mapping(record.summary.get("model"))
    size = number(model.get("parameters"))
    family = words(model.get("family"))
    what = " ".join(part for part in (family or "language", "model") if part)
    said = f"One {what}" + (f" of {compact(size)} parameters" if size else "")
    stages = [one.label.lower().replace("rl ", "RL ") for one in STAGES if one.key in record.present]
    said += f", {len(stages)} checkpoints ({', '.join(stages)})" if len(stages) > 1 else ""
    seconds = number(record.summary.get("seconds"))
    machine = words(record.summary.get("machine"))
    said += f", in {duration(seconds)}" if seconds is not None else ""
    return said + (f", on {machine}." if machine else ".")


def headlines(record: Record) -> list[Headline]:
    """Builds the three big statements: what mid-training did, what RL did, what it cost in retention."""
    tasks = compared_tasks(record)
    means = {key: mean_accuracy(record, key, tasks) for key in HEADLINE_STAGES}
    over = f"mean accuracy over {len(tasks)} task {'family' if len(tasks) == 1 else 'families'}"
    middle = _change("Mid-training", over, means["base"], means["midtrained"])
    after = _change("RL on top of it", over, means["midtrained"], means["prism_rl"])
    alone = means["base_rl"]
    if alone is not None:
        after += f" The same RL straight on the base reached {percent(alone.value)}."
    return [
        Headline("Mid-training", _arrow(means["base"], means["midtrained"]), middle, "s-midtrained"),
        Headline("Reinforcement learning", _arrow(means["midtrained"], means["prism_rl"]), after, "s-prism-rl"),
        _retention_headline(record),
    ]


def _retention_headline(record: Record) -> Headline:
    losses = {key: number(record.stages.get(key, {}).get("retention_loss")) for key in HEADLINE_STAGES}
    base = losses["base"]
    last = "prism_rl" if losses["prism_rl"] is not None else "midtrained"
    end = losses[last]
    if base is None or end is None:
        return Headline(
            "Retention", NOT_MEASURED, "The loss on general text was not measured before and after.", "s-base"
        )
    change = end - base
    if abs(change) < 0.0005:
        meaning = "no change that three decimals show"
    else:
        meaning = "a rise, so some of it was forgotten" if change > 0 else "a fall, so nothing was lost by this measure"
    said = f"Loss on general text went from {decimal(base)} (base) to {decimal(end)} ({stage(last).label})"
    return Headline("Retention", f"{signed(change)} nats", f"{said}: {meaning}. No interval was measured.", "s-base")


def _change(subject: str, what: str, before: Mean | None, after: Mean | None) -> str:
    if before is None or after is None:
        return f"{subject}: accuracy before and after was not measured on the same task families."
    change = after.value - before.value
    ends = f"from {percent(before.value)} to {percent(after.value)}"
    verb = "raised" if change > 0 else "lowered" if change < 0 else "kept"
    if before.half is None or after.half is None:
        return f"{subject} {verb} {what} {ends}; without intervals this may be noise."
    half = math.hypot(before.half, after.half)
    points = f"{100 * change:+.1f} ± {100 * half:.1f} points".replace("-", "−")
    if abs(change) <= half:
        return f"{subject} moved {what} {ends}: {points}, which is within the noise."
    return f"{subject} {verb} {what} {ends} ({points})."


def _arrow(before: Mean | None, after: Mean | None) -> str:
    if before is None or after is None:
        return NOT_MEASURED
    return f"{percent(before.value)} → {percent(after.value)}"


def _share(task: object) -> float | None:
    found = number(mapping(task).get("accuracy"))
    return found if found is not None and 0 <= found <= 1 else None
