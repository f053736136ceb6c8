"""The part about trust: what was verified, what happened on the way, and what it takes to do it again."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from prism_nemo.report.formatting import NOT_MEASURED, significant
from prism_nemo.report.read import mapping, number, objects, sequence, words
from prism_nemo.report.story import Story
from prism_nemo.report.view import Table, Verdict

# What RL itself refuses to go on with in bf16 (`prism_nemo.rl.parity`), the widest of its limits.
_PARITY = 5e-2


def verdicts(story: Story) -> list[Verdict]:
    """What was checked of the conversion and of the sampler."""
    found = []
    for result in story.found.of("card"):
        found += _card(result.content)
    for result in story.found.of("verification"):
        found.append(_verification(result.path.parent.name, result.content))
    if not found:
        story.missing(
            "Whether the conversion computes the same function",
            "prism-nemo verify HF_DIR CHECKPOINT --card FOLDER/card.yaml",
        )
    for model, run in story.runs:
        if model.role not in ("base_rl", "prism_rl"):
            continue
        gaps = run.series("logprob_gap")[1]
        finite = np.abs(gaps[np.isfinite(gaps)])
        if not len(finite):
            story.missing(f"{model.name}: gap between sampler and trainer", "logprob_gap in its metrics.jsonl")
            continue
        largest = float(finite.max())
        state = "yes" if largest <= _PARITY else "no"
        claim = f"{model.name}: what was sampled is what was trained"
        limit = f"limit {_PARITY:g}"
        detail = f"log-probabilities differ by at most {significant(largest)} nats over {len(finite):,} steps ({limit})"
        found.append(Verdict(state, "passed" if state == "yes" else "failed", claim, detail))
    return found


def events(story: Story) -> list[str]:
    """What happened on the way: steps undone, damaged checkpoints, changed mixtures, starts after a kill."""
    said = []
    for model, run in story.runs:
        for event in objects(run.lineage.get("events")):
            name = words(event.get("event"))
            if name not in ("started from", "data", "parity"):
                about = ", ".join(f"{key} {_short(value)}" for key, value in event.items() if key != "event")
                said.append(f"{model.name}: {name} ({about})" if about else f"{model.name}: {name}")
        skipped = run.series("skipped_steps")[1]
        if len(skipped) and math.isfinite(skipped[-1]) and skipped[-1] > 0:
            said.append(f"{model.name}: {skipped[-1]:,.0f} steps were skipped because a gradient was not finite")
    return said


def repeat(story: Story) -> list[Table]:
    """Seeds and commands of each stage, and the versions, with what differs between stages."""
    rows, versions = [], {}
    for model, run in story.runs:
        starts = objects(run.lineage.get("starts"))
        command = " ".join(words(part) for part in sequence(starts[0].get("command"))) if starts else ""
        seed = run.config.get("seed")
        rows.append((model.name, NOT_MEASURED if seed is None else words(seed), command or NOT_MEASURED))
        if seed is None:
            story.missing(f"{model.name}: seed", "config.yaml of its run directory")
        versions[model.name] = mapping(run.lineage.get("versions"))
        if not versions[model.name]:
            story.missing(f"{model.name}: versions of the software", "lineage.json of its run directory")
    names = list(dict.fromkeys(name for found in versions.values() for name in found))
    different = []
    for name in names:
        values = dict.fromkeys(words(found.get(name)) for found in versions.values() if found)
        if len(values) > 1:
            story.warnings.append(f"The stages ran with different versions of {name}: {', '.join(values)}.")
        different.append((name, ", ".join(values)))
    if not any("commit" in found for found in versions.values()):
        story.missing("The commit of the code", "lineage.json holds versions, not commits")
    tables = [Table(("stage", "seed", "first command"), rows, "Seeds and commands")] if rows else []
    return tables + ([Table(("package", "version"), different, "Versions")] if different else [])


def _card(card: dict[str, Any]) -> list[Verdict]:
    found = []
    model = words(card.get("model"))
    for section, state, label in (
        ("verified", "yes", "verified"),
        ("failed", "no", "failed"),
        ("not_verified", "unknown", "not verified"),
    ):
        for check, about in mapping(card.get(section)).items():
            entry = mapping(about)
            detail = f"{words(entry.get('command'))}, {words(entry.get('date'))}" if entry else words(about)
            found.append(Verdict(state, label, f"{model}: {words(check)}", detail))
    return found


def _verification(name: str, content: dict[str, Any]) -> Verdict:
    gap, limit = number(content.get("max_abs_logit_diff")), number(content.get("tolerance"))
    state = "unknown" if gap is None or limit is None else "yes" if gap <= limit else "no"
    if content.get("different_tensors") or content.get("passed") is False:
        state = "no"
    label = {"yes": "passed", "no": "failed", "unknown": NOT_MEASURED}[state]
    return Verdict(
        state,
        label,
        f"Conversion: {name}",
        f"largest logit difference {significant(gap)}, tolerance {significant(limit)}",
    )


def _short(value: object) -> str:
    shown = words(value)
    return shown if len(shown) <= 80 else shown[:79] + "…"
