"""The part about trust: what was verified, what happened on the way, and what it takes to do it again."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from prism_nemo.report.find import Result
from prism_nemo.report.formatting import NOT_MEASURED, significant
from prism_nemo.report.read import mapping, number, objects, sequence, words
from prism_nemo.report.story import Story
from prism_nemo.report.view import Table, Verdict
from prism_nemo.status.problems import chain_problems

# What RL itself refuses to go on with in bf16 (`prism_nemo.rl.parity`), the widest of its limits.
_PARITY = 5e-2


def verdicts(story: Story) -> list[Verdict]:
    """What was checked of the conversion and of the sampler."""
    found = []
    for result in story.found.of("card"):
        found += _card(result.content)
    for result in story.found.of("verification"):
        found.append(_verification(story, result))
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
        said += [f"{model.name}: {_short(problem)}" for problem in chain_problems(run.path)]
        skipped = run.series("skipped_steps")[1]
        if len(skipped) and math.isfinite(skipped[-1]) and skipped[-1] > 0:
            said.append(f"{model.name}: {skipped[-1]:,.0f} steps were skipped because a gradient was not finite")
    return said


def repeat(story: Story) -> list[Table]:
    """Seeds and commands of each stage, and the versions, with what differs between stages."""
    rows, versions, all_commits = [], {}, []
    for model, run in story.runs:
        starts = objects(run.lineage.get("starts"))
        command = " ".join(words(part) for part in sequence(starts[0].get("command"))) if starts else ""
        seed = run.config.get("seed")
        commits = list(dict.fromkeys(words(start["commit"]) for start in starts if start.get("commit")))
        all_commits.append(commits)
        if len(commits) > 1:
            story.warnings.append(f"{model.name} went on with other code than it began with: {', '.join(commits)}.")
        rows.append((
            model.name, NOT_MEASURED if seed is None else words(seed), ", ".join(commits) or NOT_MEASURED,
            command or NOT_MEASURED,
        ))  # fmt: skip
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
    if not any(all_commits):
        story.missing("The commit of the code", "lineage.json names it where the code is a git working tree")
    tables = (
        [Table(("stage", "seed", "commit of the code", "first command"), rows, "Seeds and commands")] if rows else []
    )
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


def _verification(story: Story, result: Result) -> Verdict:
    """A check counts as passed only if its difference is within its tolerance, whatever its flag says."""
    content = result.content
    name = words(content.get("name")) or f"Conversion: {result.path.parent.name}"
    gap, limit, flag = (content.get(key) for key in ("max_abs_logit_diff", "tolerance", "passed"))
    gap, limit = number(gap), number(limit)
    within = None if gap is None or limit is None else gap <= limit
    passed = flag if "passed" in content else within
    if passed is True and within is False:
        story.warnings.append(f"Check “{name}” is marked as passed, but its difference exceeds its tolerance.")
    if content.get("different_tensors") or within is False:
        passed = False
    state = "unknown" if not isinstance(passed, bool) else "yes" if passed else "no"
    label = {"yes": "passed", "no": "failed", "unknown": NOT_MEASURED}[state]
    said = []
    if gap is not None or limit is not None or state == "unknown":
        said = [f"largest logit difference {significant(gap)}, tolerance {significant(limit)}"]
    return Verdict(state, label, name, "; ".join([*said, *filter(None, [words(content.get("note"))])]))


def _short(value: object) -> str:
    shown = words(value)
    return shown if len(shown) <= 80 else shown[:79] + "…"
