"""The parts that let a reader check: what the run cost, which claims hold, which checks passed, and what is missing."""

from __future__ import annotations

import math
from dataclasses import replace

from markupsafe import Markup

from prism_nemo.report import charts
from prism_nemo.report.formatting import (
    NOT_MEASURED,
    compact,
    duration,
    gigabytes,
    significant,
    whole,
)
from prism_nemo.report.read import Record, mapping, number, objects, sequence, words
from prism_nemo.report.stages import RL_KEYS, stage
from prism_nemo.report.view import Figure, Table, Verdict

STATES = {True: "yes", False: "no"}


def cost_facts(record: Record) -> list[tuple[str, str]]:
    """Returns the totals: time, tokens trained on, memory, machine."""
    parts = objects(record.summary.get("timeline"))
    tokens = [found for part in parts if (found := number(part.get("tokens"))) is not None]
    return [
        ("wall clock", duration(record.number(record.summary.get("seconds"), "Total time"))),
        ("tokens over all parts", compact(sum(tokens)) if tokens else NOT_MEASURED),
        ("peak memory", gigabytes(record.number(record.summary.get("peak_rss_gb"), "Peak memory"))),
        ("machine", words(record.summary.get("machine")) or NOT_MEASURED),
    ]


def timeline_figure(record: Record) -> Figure:
    """Draws when each part ran and for how long."""
    parts = objects(record.summary.get("timeline"))
    if not parts:
        record.missing("The time line")
    bars, rows = [], []
    for part in parts:
        key = words(part.get("stage"))
        one = stage(key)
        start, seconds = number(part.get("start")), number(part.get("seconds"))
        tokens = number(part.get("tokens"))
        speed = tokens / seconds if tokens is not None and seconds else None
        note = ", ".join(
            text
            for text in (
                words(part.get("layout")),
                f"{compact(tokens)} tokens" if tokens is not None else "",
                f"{compact(speed)} tokens/s" if speed is not None else "",
                words(part.get("note")),
            )
            if text
        )
        # Without its start a bar would have to be put somewhere, and any place would claim something.
        length = seconds if start is not None else None
        bars.append(charts.Bar(one.label, one.style, length, duration(seconds), start=start or 0.0, note=note))
        rows.append(
            (
                one.label,
                duration(start),
                duration(seconds),
                words(part.get("layout")) or "–",
                whole(tokens) if tokens is not None else "–",
                whole(speed) if speed is not None else "–",
                words(part.get("note")) or "–",
            )
        )
    svg = _timeline(bars, number(record.summary.get("seconds")) or 0.0)
    columns = ("part", "start", "took", "layout", "tokens", "tokens/s", "note")
    caption = "Start and length of each part. Tokens per second count the whole time of the part, start-up included."
    return Figure("Time line", svg, caption, Table(columns, rows, "Time line"), wide=True)


def claims(record: Record) -> list[Verdict]:
    """Returns the claims that the run was expected to support, with what it says about each."""
    found = []
    for entry in objects(record.summary.get("expected")):
        state = STATES.get(entry["holds"], "unknown") if isinstance(entry.get("holds"), bool) else "unknown"
        label = {"yes": "holds", "no": "does not hold", "unknown": NOT_MEASURED}[state]
        found.append(Verdict(state, label, words(entry.get("claim")), words(entry.get("detail"))))
    if not found:
        record.missing("Expected claims")
    return found


def conversions(record: Record) -> list[Verdict]:
    """Returns the conversion checks and that of the exported checkpoint.

    A check counts as passed only if it says so and its difference is within its tolerance: a flag that contradicts its
    own numbers is shown as failed, with a warning.
    """
    found = []
    for entry in objects(record.summary.get("conversion")):
        name = words(entry.get("check"))
        gap, limit = number(entry.get("max_abs_logit_diff")), number(entry.get("tolerance"))
        passed = entry.get("passed")
        state = STATES.get(passed, "unknown") if isinstance(passed, bool) else "unknown"
        if state == "yes" and gap is not None and limit is not None and gap > limit:
            record.warn(f"Conversion check “{name}” is marked as passed, but its difference exceeds its tolerance.")
            state = "no"
        label = {"yes": "passed", "no": "failed", "unknown": NOT_MEASURED}[state]
        detail = f"largest logit difference {significant(gap)}, tolerance {significant(limit)}"
        found.append(Verdict(state, label, name, detail))
    if not found:
        record.missing("Conversion checks")
    return [*found, _export(record)]


def rollout_check(record: Record) -> list[str]:
    """Says for each RL run how far the log-probabilities of the sampler and the trainer were apart at most."""
    said = []
    for key in RL_KEYS:
        gaps = record.metrics[key].series("logprob_gap")[1] if key in record.metrics else []
        finite = [abs(gap) for gap in gaps if math.isfinite(gap)]
        if key in record.metrics and not finite:
            record.missing(f"{stage(key).label}: gap between sampler and trainer")
        elif finite:
            said.append(f"{stage(key).label}: at most {significant(max(finite))} over {len(finite)} steps")
    return said


def facts(record: Record) -> list[tuple[str, str]]:
    """Returns what it takes to repeat the run: command, seed, model and versions."""
    summary = record.summary
    model = mapping(summary.get("model"))
    shown = [
        ("command", words(summary.get("command")) or NOT_MEASURED),
        ("seed", words(summary.get("seed")) or NOT_MEASURED),
    ]
    shown += [(f"model: {name.replace('_', ' ')}", _plain(value)) for name, value in model.items()]
    versions = mapping(summary.get("versions"))
    if not versions:
        record.missing("Versions of the software")
    return shown + [(name, _plain(value)) for name, value in versions.items()]


def _export(record: Record) -> Verdict:
    export = mapping(record.summary.get("hf_export"))
    name = "Export to Hugging Face loads in transformers"
    if not export:
        record.missing("The exported Hugging Face checkpoint")
        return Verdict("unknown", NOT_MEASURED, name, "no export was recorded")
    loads = export.get("loads_in_transformers")
    state = STATES.get(loads, "unknown") if isinstance(loads, bool) else "unknown"
    label = {"yes": "passed", "no": "failed", "unknown": NOT_MEASURED}[state]
    gap = significant(number(export.get("max_abs_logit_diff")))
    return Verdict(
        state, label, name, f"largest logit difference {gap}; {words(export.get('path')) or 'path not recorded'}"
    )


def _plain(value: object) -> str:
    if isinstance(value, bool) or number(value) is None:
        return ", ".join(words(part) for part in sequence(value)) if isinstance(value, list) else words(value)
    exact = number(value)
    return whole(exact) if isinstance(value, int) and abs(value) >= 10_000 else significant(exact)


def _timeline(bars: list[charts.Bar], seconds: float) -> Markup:
    total = max([seconds, *(bar.start + bar.value for bar in bars if bar.value is not None)])
    # An axis of 10,000 seconds has ticks that nobody can place.
    size, name = (3600, "h") if total > 3 * 3600 else (60, "min") if total > 180 else (1, "s")
    scaled = [
        replace(bar, start=bar.start / size, value=None if bar.value is None else bar.value / size) for bar in bars
    ]
    return charts.horizontal_bars(
        scaled,
        title="Time line",
        tick_format=lambda value: f"{value:g} {name}",
        x_range=(0.0, total / size) if total > 0 else None,
        labels=160,
        width=1000,
    )
