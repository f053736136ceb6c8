"""Whether two evaluations asked the same questions in the same way, and what differs if not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from prism_nemo.errors import InputError
from prism_nemo.evaluation.comparing.folder import EvaluationFolder

PROMPTS, TASKS = "prompts", "tasks"
_SHOWN = 12


def check_same(base: EvaluationFolder, model: EvaluationFolder, may_differ: Sequence[str] = ()) -> list[str]:
    """Refuse a comparison of unlike evaluations.

    Args:
        base: One evaluation.
        model: The other.
        may_differ: Dotted names of settings (``sampling`` covers ``sampling.seed``), ``prompts``, ``tasks``.

    Returns:
        What differs and was allowed to, for a mark on the report.

    Raises:
        InputError: With all that differs, up to a dozen.
    """
    refused: list[str] = []
    allowed: list[str] = []
    for key, what in _differences(base, model):
        covered = any(key == name or key.startswith(f"{name}.") for name in may_differ)
        (allowed if covered else refused).append(what)
    if refused:
        more = f"\n  and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
        listed = "".join(f"\n  {what}" for what in refused[:_SHOWN])
        raise InputError(
            f"{base.path} and {model.path} cannot be compared question by question; these differ:{listed}{more}\n"
            "Evaluate both in the same way; or, for a setting, prompts or tasks, let it differ by name and have the "
            "report marked."
        )
    return [f"{model.name} and {base.name} differ: {what}" for what in allowed]


def _differences(base: EvaluationFolder, model: EvaluationFolder) -> Iterator[tuple[str, str]]:
    """A key that may be allowed (empty for what never may), and the difference in words."""
    a, b = base.evaluation, model.evaluation
    for name in ("suite", "split"):
        first, second = getattr(a, name), getattr(b, name)
        if first != second:
            yield "", f"{name}: {first} and {second}"
    settings = _flat(a.settings), _flat(b.settings)
    for key in sorted(settings[0].keys() | settings[1].keys()):
        values = [part.get(key, "not set") for part in settings]
        if values[0] != values[1]:
            yield key, f"setting {key}: {values[0]} and {values[1]}"
    for task in sorted(a.tasks.keys() ^ b.tasks.keys()):
        yield TASKS, f"task {task}: only in {(base if task in a.tasks else model).path}"
    for task in sorted(a.tasks.keys() & b.tasks.keys()):
        yield from _in_task(base, model, task)


def _in_task(base: EvaluationFolder, model: EvaluationFolder, task: str) -> Iterator[tuple[str, str]]:
    first, second = base.evaluation.tasks[task], model.evaluation.tasks[task]
    for name in ("metric", "domain", "samples", "higher_is_better"):
        values = getattr(first, name), getattr(second, name)
        if values[0] != values[1]:
            yield "", f"task {task}: {name} {values[0]} and {values[1]}"
    before, after = ({q.id: q for q in folder.questions[task]} for folder in (base, model))
    apart = sorted(before.keys() ^ after.keys())
    if apart:
        yield "", f"task {task}: {len(apart)} questions are in one of them only, such as {apart[0]}"
        return
    for key, name, of in (("", "right answer", "gold"), (PROMPTS, "prompt", "prompt")):
        changed = [i for i in before if getattr(before[i], of) != getattr(after[i], of)]
        if changed:
            yield key, f"task {task}: the {name} of {len(changed)} questions, such as {changed[0]}"
    uneven = [i for i in before if len(before[i].answers) != len(after[i].answers)]
    if uneven:
        yield "", f"task {task}: the number of answers to {len(uneven)} questions, such as {uneven[0]}"
    weighed = [i for i in before if before[i].metrics.get("tokens") != after[i].metrics.get("tokens")]
    if weighed and not first.higher_is_better:
        yield "", f"task {task}: the number of tokens of {len(weighed)} rows, such as {weighed[0]}"


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
