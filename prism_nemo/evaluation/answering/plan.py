"""What an evaluation will ask, all of it known before anything is asked, and what makes it this evaluation."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prism_nemo.evaluation.answering.asking import Asked, put
from prism_nemo.evaluation.answering.elicitation import candidates, split_to_choose_on, trial_sampling
from prism_nemo.evaluation.answering.formats import PromptFormat, check_format
from prism_nemo.evaluation.answering.store import JUDGING
from prism_nemo.evaluation.engines.contract import EvaluationModel
from prism_nemo.evaluation.question import EvaluationTask
from prism_nemo.evaluation.settings import EvaluateConfig
from prism_nemo.evaluation.suites.build import Suite, asked_of, questions_hash
from prism_nemo.rl.rewards.judge import how_judged

# What says nothing of the result: where files are, how much is done at a time, on how many ranks.
_NOT_IDENTITY = {
    *("model", "out", "data", "batch", "cache", "tokenizer", "parallel"),
    *("suite", "rewards", "text", "task_folder"),
}


@dataclass
class Plan:
    """A task, the formats that it is tried with, and what is asked in each.

    Attributes:
        task: The task.
        forms: One, or those to choose among.
        trial: By format, what the choice is made by; empty where there is one.
        final: By format, what the score is made of.
    """

    task: EvaluationTask
    forms: list[PromptFormat]
    trial: dict[str, Asked]
    final: dict[str, Asked]


def plan_task(model: EvaluationModel, weights: str, task: EvaluationTask, settings: EvaluateConfig) -> Plan:
    """All prompts of a task are made before any is asked, so that one that does not fit is refused at the start."""
    folder = model.tokenizer.path.parent
    forms = candidates(task, settings)
    for form in forms:
        check_format(form, task, folder)
    final = {
        form.name: put(
            model, weights, task, form, asked_of(task, settings.split, settings.questions), task.sampling, settings
        )
        for form in forms
    }
    if len(forms) == 1:
        return Plan(task, forms, {}, final)
    split = split_to_choose_on(task, settings)
    if split == settings.split:
        return Plan(task, forms, final, final)
    questions, sampling = asked_of(task, split, settings.questions), trial_sampling(task.sampling)
    trial = {form.name: put(model, weights, task, form, questions, sampling, settings) for form in forms}
    return Plan(task, forms, trial, final)


def limited(task: EvaluationTask, asked: Asked) -> list[str]:
    """A mark if the model's length cut the longest answer."""
    shortest = min(asked.limits)
    if shortest >= task.sampling.max_new_tokens:
        return []
    return [
        f"{task.name}: answers had {shortest} to {max(asked.limits)} tokens and not {task.sampling.max_new_tokens}: "
        "the model reads no more"
    ]


def identity_of(
    model: EvaluationModel,
    about: Mapping[str, Any],
    suite: Suite,
    plans: Sequence[Plan],
    sources: Sequence[str],
    settings: EvaluateConfig,
) -> dict[str, Any]:
    """What decides the result: two runs in one folder must have all of it in common."""
    told = {name: value for name, value in dataclasses.asdict(settings).items() if name not in _NOT_IDENTITY}
    tasks = {
        plan.task.name: {
            "questions": questions_hash(next(iter(plan.final.values())).questions),
            "answers": {name: asked.key for name, asked in plan.final.items()},
            "trials": {name: asked.key for name, asked in plan.trial.items()},
            "formats": [form.name for form in plan.forms],
        }
        for plan in plans
    }
    found: dict[str, Any] = json.loads(
        json.dumps(
            {
                "model": about["hash"],
                "suite": suite.name,
                "tokenizer": model.tokenizer.sha256,
                **told,
                "engine": model.engine,
                "tasks": tasks,
                "held_out": list(sources),
                JUDGING: how_judged(settings.rewards),
            }
        )
    )
    return found


def comparable(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an identity that two models' evaluations must have in common to be compared."""
    tasks = {
        name: {key: value for key, value in task.items() if key not in ("answers", "trials")}
        for name, task in identity["tasks"].items()
    }
    return {**{key: value for key, value in identity.items() if key != "model"}, "tasks": tasks}
