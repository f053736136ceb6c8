"""A quickstart's `summary.json`: what it recorded, turned into the results that `eval`, `analyze` and `verify` write.

So one page shows both. What has no counterpart there (the mixture, the parts of the run, the expected effects, what the
models wrote) is in `quickstart_parts.py` and `samples.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_nemo.report.find import Result
from prism_nemo.report.formatting import significant
from prism_nemo.report.model import Model, real
from prism_nemo.report.read import mapping, number, objects, sequence, share, words

if TYPE_CHECKING:
    from prism_nemo.report.story import Story

COMMAND = "prism-nemo quickstart --out DIR"
SUITE = "quickstart"


@dataclass(frozen=True)
class Stage:
    """A stage of the quickstart: its key, its name on the page, the stage that it starts from, role and explanation."""

    key: str
    label: str
    parent: str
    role: str
    told: str


STAGES = (
    Stage("base", "Base", "", "pretrain", "pre-training"),
    Stage("midtrained", "Mid-trained", "base", "midtrain", "mid-training"),
    Stage("midtrained_longer", "Longer mid-training", "midtrained", "midtrain", "control: more mid-training"),
    Stage("base_rl", "RL on base", "base", "base_rl", "RL without mid-training"),
    Stage("prism_rl", "RL on mid-trained", "midtrained", "prism_rl", "RL"),
)
_WEIGHTS = ("base->midtrained", "midtrained->prism_rl", "base->base_rl")
_CKA = ("base/midtrained", "midtrained/prism_rl", "base/base_rl")


@dataclass
class Summary:
    """One quickstart.

    Attributes:
        path: Its `summary.json`.
        content: What is in there.
        models: Those of its stages that left a trace, by key.
    """

    path: Path
    content: dict[str, Any]
    models: dict[str, Model] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The quickstart's directory."""
        return self.path.parent

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """The evaluated stages by key."""
        return {key: mapping(value) for key, value in mapping(self.content.get("stages")).items()}

    def tasks(self, key: str) -> dict[str, dict[str, Any]]:
        """The evaluated task families of one stage by name."""
        found = mapping(self.stages.get(key, {}).get("tasks"))
        return {name: mapping(value) for name, value in found.items()}

    def label(self, key: str) -> str:
        """Name of a stage on the page."""
        return self.models[key].name if key in self.models else _label(key)

    def measured_everywhere(self) -> list[str]:
        """The task families measured in each stage that was evaluated, so that means can be compared."""
        evaluated = [tasks for one in STAGES if (tasks := self.tasks(one.key))]
        if not evaluated:
            return []
        return [name for name in evaluated[0] if all(_accuracy(tasks, name) is not None for tasks in evaluated)]

    def mean(self, key: str, names: list[str]) -> tuple[float, float | None] | None:
        """Unweighted mean of the accuracy over task families, and half of its 95 % interval where that is known.

        The interval takes the families as independent samples: half widths add in squares.

        Args:
            key: Of the stage.
            names: The families.

        Returns:
            None if one of the families was not measured, or there is none.
        """
        tasks = self.tasks(key)
        values = [value for name in names if (value := _accuracy(tasks, name)) is not None]
        if not values or len(values) < len(names):
            return None
        ends = [_ends(tasks[name].get("ci95")) for name in names]
        halves = [(high - low) / 2 for low, high in ends if low is not None and high is not None]
        half = math.hypot(*halves) / len(names) if len(halves) == len(names) else None
        return sum(values) / len(values), half


def add_models(summary: Summary, models: list[Model]) -> None:
    """Gives the stages' models their names, and adds those whose run directory is gone.

    Args:
        summary: Takes the models.
        models: All of the story; those of exports are not among them yet.
    """
    runs = {str(real(model.path)): model for model in models if model.run is not None}
    known = {one.key: one for one in STAGES}
    # A key comes from the file; only a plain one may become part of a path.
    for key in [*known, *(key for key in summary.stages if key not in known and _plain(key))]:
        model = runs.get(str(real(summary.folder / key)))
        one = known.get(key, Stage(key, key, "", "stage", ""))
        if model is None:
            if key not in summary.stages:
                continue
            model = Model(summary.folder / key, one.role, one.label)
            models.append(model)
        model.name, model.told = one.label, one.told
        model.origin = str(summary.folder / one.parent) if one.parent else ""
        model.text_loss = number(summary.stages.get(key, {}).get("retention_loss"))
        summary.models[key] = model


def add_export(summary: Summary, exports: list[Path], models: list[Model]) -> None:
    """Adds the exported model that was checked: the one at the end of the pipeline."""
    export = mapping(summary.content.get("hf_export"))
    if not export:
        return
    recorded = words(export.get("path")).replace("\0", "")
    there = next((path for path in exports if recorded and path.parts[-2:] == Path(recorded).parts[-2:]), None)
    loads, gap = export.get("loads_in_transformers"), number(export.get("max_abs_logit_diff"))
    state = "loads in transformers" if loads is True else "does not load" if loads is False else "loading not measured"
    model = Model(
        there or Path(recorded or summary.folder / "hf"),
        "hf",
        "HF checkpoint",
        lines=(state, f"logit gap {significant(gap)}"),
    )
    model.origin = str(summary.folder / "prism_rl")
    models.append(model)


def add_results(story: Story, summary: Summary) -> None:
    """Adds scores, weights, representations and checks to the story, and notes what is missing."""
    for key in summary.stages:
        if key in summary.models and summary.tasks(key):
            summary.models[key].evaluations.append((None, _evaluation(story, summary, key)))
        elif key not in summary.models:
            story.warnings.append(f"{summary.path.name}: the stage {key} is not shown; its name is no folder's name.")
    for one in STAGES:
        if one.key not in summary.models:
            story.missing(f"{one.label}: the whole stage", COMMAND)
    for kind, content in (("weights", _weights(story, summary)), ("cka", _cka(story, summary))):
        if content is not None:
            story.found.results.append(Result(kind, summary.path, content))
    checks = objects(summary.content.get("conversion"))
    if not checks:
        story.missing("Conversion checks", COMMAND)
    for check in checks:
        content = {**check, "name": words(check.get("check")), "passed": check.get("passed")}
        story.found.results.append(Result("verification", summary.path, content))
    export = mapping(summary.content.get("hf_export"))
    if not export:
        story.missing("The exported Hugging Face checkpoint", COMMAND)
        return
    content = {
        **export,
        "name": "Export to Hugging Face loads in transformers",
        "passed": export.get("loads_in_transformers"),
        "note": words(export.get("path")) or "path not recorded",
    }
    story.found.results.append(Result("verification", summary.path, content))


def _evaluation(story: Story, summary: Summary, key: str) -> dict[str, Any]:
    label, tasks = summary.label(key), {}
    domains = _domains(summary)
    for name, task in summary.tasks(key).items():
        low, high = _interval(story, task.get("ci95"), f"{label}: interval of the accuracy on {name}")
        greedy = _interval(story, task.get("greedy_ci95"), f"{label}: greedy interval on {name}")
        tasks[name] = {
            "domain": domains.get(name, ""),
            "metric": "accuracy of sampled answers",
            "estimate": _share(story, task.get("accuracy"), f"{label}: accuracy on {name}"),
            "low": low,
            "high": high,
            "questions": task.get("n"),
            "greedy": _share(story, task.get("greedy_accuracy"), f"{label}: greedy accuracy on {name}"),
            "greedy_low": greedy[0],
            "greedy_high": greedy[1],
            "format_rate": _share(story, task.get("format_rate"), f"{label}: format rate on {name}"),
            "mean_response_tokens": number(task.get("mean_response_tokens")),
        }
        if tasks[name]["mean_response_tokens"] is None:
            story.missing(f"{label}: response tokens on {name}", COMMAND)
    names = summary.measured_everywhere()
    mean = summary.mean(key, names)
    average: dict[str, Any] = {"of": {"": names}}
    if mean is not None:
        value, half = mean
        ends = {} if half is None else {"low": max(0.0, value - half), "high": min(1.0, value + half)}
        average |= {"estimate": value, **ends}
    asked = {name: {"questions": task.get("n")} for name, task in summary.tasks(key).items()}
    return {
        "suite": SUITE, "split": "test", "settings": {"tasks": asked}, "tasks": tasks,
        "averages": {"plain_mean": average},
    }  # fmt: skip


def _weights(story: Story, summary: Summary) -> dict[str, Any] | None:
    found = mapping(summary.content.get("weights"))
    _note_missing(story, summary, found, _WEIGHTS, "->", "Weight change")
    transitions = []
    for name in _ordered(found, _WEIGHTS):
        change, (before, after) = mapping(found[name]), _pair(name, "->")
        whole = {key: change.get(key) for key in ("changed_fraction_1pct", "relative_l2")}
        transitions.append(
            {
                **whole,
                "name": f"{summary.label(before)} → {summary.label(after)}" if after else name,
                "by_subcomponent": mapping(change.get("by_subcomponent")) or mapping(change.get("by_component")),
                "by_layer": mapping(change.get("by_layer")),
            }
        )
    return {"transitions": transitions, "overlaps": []} if transitions else None


def _cka(story: Story, summary: Summary) -> dict[str, Any] | None:
    found = mapping(summary.content.get("cka"))
    _note_missing(story, summary, found, _CKA, "/", "CKA")
    rows = []
    for name in _ordered(found, _CKA):
        before, after = _pair(name, "/")
        label = f"{summary.label(before)} → {summary.label(after)}" if after else name
        for layer, value in enumerate(sequence(mapping(found[name]).get("by_layer"))):
            rows.append({"pair": label, "input": "general text", "pooling": "mean", "treatment": "raw",
                         "measure": "linear", "layer": layer, "value": value})  # fmt: skip
    return {"models": [], "rows": rows, "maps": []} if rows else None


def _note_missing(
    story: Story, summary: Summary, found: dict[str, Any], expected: Iterable[str], between: str, what: str
) -> None:
    for name in expected:
        if name not in found:
            before, after = _pair(name, between)
            story.missing(f"{what} {summary.label(before)} → {summary.label(after)}", COMMAND)


def _ordered(found: dict[str, Any], first: tuple[str, ...]) -> list[str]:
    return [name for name in first if name in found] + [name for name in found if name not in first]


def _pair(name: str, between: str) -> tuple[str, str]:
    before, _, after = name.partition(between)
    return before, after


def _domains(summary: Summary) -> dict[str, str]:
    """Domains of the sources that the tasks' documents came from; a task has the name of its source."""
    mixtures = mapping(summary.content.get("mixtures")).values()
    return {words(entry.get("source")): words(entry.get("domain")) for one in mixtures for entry in objects(one)}


def _share(story: Story, value: object, what: str) -> float | None:
    found = share(value)
    if found is None:
        story.missing(what, COMMAND)
        if (outside := number(value)) is not None:
            story.warnings.append(
                f"{what} is {outside:g}, which is not a share between 0 and 1; it is shown as not measured."
            )
    return found


def _interval(story: Story, value: object, what: str) -> tuple[float | None, float | None]:
    low, high = _ends(value)
    if low is None or high is None or not 0 <= low <= high <= 1:
        story.missing(what, COMMAND)
        return None, None
    return low, high


def _ends(value: object) -> tuple[float | None, float | None]:
    ends = sequence(value)
    return (number(ends[0]), number(ends[1])) if len(ends) == 2 else (None, None)


def _accuracy(tasks: dict[str, dict[str, Any]], name: str) -> float | None:
    return share(tasks.get(name, {}).get("accuracy"))


def _label(key: str) -> str:
    return next((one.label for one in STAGES if one.key == key), key)


def _plain(key: str) -> bool:
    return key.replace("_", "").replace("-", "").isalnum()
