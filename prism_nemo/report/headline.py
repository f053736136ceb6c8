"""The top of a quickstart's page: what was done, and the three plain statements that the rest of it backs up."""

from __future__ import annotations

import math

from prism_nemo.report.formatting import NOT_MEASURED, compact, decimal, duration, percent, signed
from prism_nemo.report.read import mapping, number, words
from prism_nemo.report.summary import Summary
from prism_nemo.report.view import Headline

# A mean accuracy and half the width of its 95 % interval, if that is known.
_Mean = tuple[float, float | None]


def opening(summary: Summary) -> str:
    """Says in one sentence what was done, on what, and how long it took; leaves out what is not known."""
    model = mapping(summary.content.get("model"))
    size, family = number(model.get("parameters")), words(model.get("family"))
    said = f"One {family or 'language'} model" + (f" of {compact(size)} parameters" if size else "")
    names = [model.name.lower().replace("rl ", "RL ") for model in summary.models.values()]
    said += f", {len(names)} checkpoints ({', '.join(names)})" if len(names) > 1 else ""
    seconds = number(summary.content.get("seconds"))
    machine = words(summary.content.get("machine"))
    said += f", in {duration(seconds)}" if seconds is not None else ""
    return said + (f", on {machine}." if machine else ".")


def headlines(summary: Summary) -> list[Headline]:
    """Builds the three big statements: what mid-training did, what RL did, what it cost in retention."""
    tasks = summary.measured_everywhere()
    base, mid, rl, alone = (summary.mean(key, tasks) for key in ("base", "midtrained", "prism_rl", "base_rl"))
    over = f"mean accuracy over {len(tasks)} task {'family' if len(tasks) == 1 else 'families'}"
    after = _change("RL on top of it", over, mid, rl)
    if alone is not None:
        after += f" The same RL straight on the base reached {percent(alone[0])}."
    return [
        Headline("Mid-training", _arrow(base, mid), _change("Mid-training", over, base, mid), "s-midtrained"),
        Headline("Reinforcement learning", _arrow(mid, rl), after, "s-prism-rl"),
        _retention(summary),
    ]


def _retention(summary: Summary) -> Headline:
    losses = {key: model.text_loss for key, model in summary.models.items()}
    last = "prism_rl" if losses.get("prism_rl") is not None else "midtrained"
    base, end = losses.get("base"), losses.get(last)
    if base is None or end is None:
        said = "The loss on general text was not measured before and after."
        return Headline("Retention", NOT_MEASURED, said, "s-base")
    change = end - base
    if abs(change) < 0.0005:
        meaning = "no change that three decimals show"
    else:
        meaning = "a rise, so some of it was forgotten" if change > 0 else "a fall, so nothing was lost by this measure"
    said = f"Loss on general text went from {decimal(base)} (base) to {decimal(end)} ({summary.label(last)})"
    return Headline("Retention", f"{signed(change)} nats", f"{said}: {meaning}. No interval was measured.", "s-base")


def _change(subject: str, what: str, before: _Mean | None, after: _Mean | None) -> str:
    if before is None or after is None:
        return f"{subject}: accuracy before and after was not measured on the same task families."
    change = after[0] - before[0]
    ends = f"from {percent(before[0])} to {percent(after[0])}"
    verb = "raised" if change > 0 else "lowered" if change < 0 else "kept"
    if before[1] is None or after[1] is None:
        return f"{subject} {verb} {what} {ends}; without intervals this may be noise."
    half = math.hypot(before[1], after[1])
    points = f"{100 * change:+.1f} ± {100 * half:.1f} points".replace("-", "−")
    if abs(change) <= half:
        return f"{subject} moved {what} {ends}: {points}, which is within the noise."
    return f"{subject} {verb} {what} {ends} ({points})."


def _arrow(before: _Mean | None, after: _Mean | None) -> str:
    if before is None or after is None:
        return NOT_MEASURED
    return f"{percent(before[0])} → {percent(after[0])}"
