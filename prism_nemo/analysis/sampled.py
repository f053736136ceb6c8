"""Answers that a model samples to the questions of tasks, judged: what pass rates and entropies are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prism_nemo.checkpoint.importing import on_main
from prism_nemo.config import RewardConfig, RolloutConfig
from prism_nemo.data.tokenizer import Tokenizer
from prism_nemo.errors import InputError
from prism_nemo.evaluation.statistics.intervals import clustered_interval
from prism_nemo.generation.requests import Request, Response, SamplingParams
from prism_nemo.rl.rewards.judge import GATES, Judge
from prism_nemo.rl.rewards.task import SPLITS, Problem, task_named
from prism_nemo.rl.rollout import Rollout, judge_responses, sample_responses


class Sampler:
    """Hands a list of requests on to anything with a `generate`; an evaluation's model is no `Sampler` to mypy."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def generate(self, requests: list[Request]) -> list[Response]:
        """See `prism_nemo.generation.requests.Sampler`."""
        found: list[Response] = self._model.generate(requests)
        return found


@dataclass(frozen=True)
class AnswerSettings:
    """Which questions are asked, and how answers are sampled and judged.

    Attributes:
        tasks: Procedural tasks, ``reasoning_gym:NAME`` or ``prompts:FILE``.
        split: train, validation or test; a file is one split.
        questions: At most so many of each task, the same for every model.
        samples: Answers to each (the study: 8).
        max_new_tokens: Longest answer.
        temperature: 0 for greedy.
        top_p: Mass of the nucleus.
        gate: Form that an answer must have to be right: think or none.
        seed: Of the questions and of the sampling.
    """

    tasks: tuple[str, ...] = ()
    split: str = "test"
    questions: int = 128
    samples: int = 1
    max_new_tokens: int = 48
    temperature: float = 1.0
    top_p: float = 1.0
    gate: str = "think"
    seed: int = 7


def check_answers(settings: AnswerSettings) -> None:
    """Refuse what cannot be asked.

    Raises:
        InputError: Naming the setting, or the task.
    """
    for name in ("questions", "samples"):
        if getattr(settings, name) < 1:
            raise InputError(f"{name}: {getattr(settings, name)} must be at least 1")
    if settings.split not in SPLITS:
        raise InputError(f"split '{settings.split}' is unknown; choose one of {', '.join(SPLITS)}")
    if settings.gate not in GATES:
        raise InputError(f"gate '{settings.gate}' is unknown; choose one of {', '.join(GATES)}")
    if len(set(settings.tasks)) != len(settings.tasks):
        raise InputError("tasks: one is named twice")
    SamplingParams(settings.max_new_tokens, settings.temperature, settings.top_p).check()
    if settings.temperature == 0 and settings.samples > 1:
        raise InputError(f"samples: temperature 0 gives the same answer {settings.samples} times; use 1")
    known = {name: task_named(name) for name in settings.tasks}
    Judge(RewardConfig(gate=settings.gate), known, settings.max_new_tokens).close()
    for name in known:
        questions_of(settings, name)


def questions_of(settings: AnswerSettings, task: str) -> list[Problem]:
    """The questions of a task, the same for every model.

    Raises:
        InputError: If there are none.
    """
    problems = task_named(task).distinct(settings.questions, settings.split, settings.seed)
    if not problems:
        raise InputError(f"task '{task}' has no question of split '{settings.split}'")
    return problems


def sample_answers(model: Any, tokenizer: Tokenizer, settings: AnswerSettings, task: str) -> list[list[Rollout]]:
    """Judged answers to each question of a task; every rank calls this, and one of them judges.

    Args:
        model: Has ``generate``: an engine, or an evaluation's model.
        tokenizer: Of the model.
        settings: How.
        task: One of the tasks.

    Returns:
        For each question its answers.
    """
    problems = list(enumerate(questions_of(settings, task)))
    config = RolloutConfig(
        group_size=settings.samples,
        prompts_per_step=len(problems),
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
    )
    responses = sample_responses(Sampler(model), problems, tokenizer, config, settings.seed)

    def judge() -> list[Rollout]:
        known = {task: task_named(task)}
        with Judge(RewardConfig(gate=settings.gate), known, settings.max_new_tokens, tokenizer.end) as judge:
            return judge_responses(problems, responses, judge, tokenizer)

    found = on_main(judge)
    return [found[i : i + settings.samples] for i in range(0, len(found), settings.samples)]


def correct_of(rollout: Rollout) -> float:
    """0 (wrong) to 1 (right); an answer without a verdict is wrong, and counted apart."""
    score = rollout.score
    if score.failure is not None:
        return 0.0
    return min(1.0, max(0.0, score.reward if score.correct is None else score.correct))


def pass_rates(model: Any, tokenizer: Tokenizer, settings: AnswerSettings, confidence: float) -> dict[str, Any]:
    """Mean accuracy on each task, with an interval over its questions.

    Returns:
        By task ``value``, ``low``, ``high``, ``questions`` (the mean of each) and ``failures`` (answers without a
        verdict).
    """
    rates = {}
    for task in settings.tasks:
        rates[task] = rate_of(sample_answers(model, tokenizer, settings, task), confidence)
    return rates


def rate_of(answers: Sequence[Sequence[Rollout]], confidence: float) -> dict[str, Any]:
    """See `pass_rates`."""
    correct = [[correct_of(rollout) for rollout in own] for own in answers]
    interval = clustered_interval(correct, confidence)
    return {
        "value": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "questions": [sum(own) / len(own) for own in correct],
        "failures": sum(rollout.score.failure is not None for own in answers for rollout in own),
    }
