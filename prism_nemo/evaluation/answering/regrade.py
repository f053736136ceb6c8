"""Judging the stored answers of an evaluation again: other verifiers, or corrected answers; no model is needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prism_nemo.config import ParallelConfig, RewardConfig
from prism_nemo.errors import InputError
from prism_nemo.evaluation.answering.formats import shown_question
from prism_nemo.evaluation.answering.grading import Given, Written, check_verifiers, judge
from prism_nemo.evaluation.answering.scoring import averages, score_task
from prism_nemo.evaluation.answering.store import (
    JUDGING,
    SAMPLES,
    SETTINGS,
    locked,
    read_evaluation,
    read_results,
    read_settings,
    write_evaluation,
    write_results,
)
from prism_nemo.evaluation.question import EvaluationTask, Question
from prism_nemo.evaluation.result import Evaluation, QuestionResult
from prism_nemo.evaluation.settings import EvaluateConfig, check_settings
from prism_nemo.evaluation.suites.build import build_suite, questions_hash
from prism_nemo.rl.rewards.judge import how_judged
from prism_nemo.run import write_json

REGRADED = "answers were judged again after the evaluation"


def regrade(out: Path, rewards: RewardConfig | None = None) -> Evaluation:
    """Judge the stored answers of an evaluation again, without the model: with other verifiers, or corrected answers.

    Questions are read where they were read from. Those whose text has changed are refused, as their answers answer
    something else; a right answer may have changed. The choice of a prompt format is not made again.

    Args:
        out: Folder of a finished evaluation.
        rewards: How to judge, from now on; as before if not given.

    Raises:
        InputError: If the folder or its questions cannot be used.
    """
    before, kept = read_evaluation(out), read_settings(out)
    settings = _settings_of(kept["request"])
    if rewards is not None:
        settings = dataclasses.replace(settings, rewards=rewards)
    check_settings(settings)
    if settings.suite == "longcontext":
        raise InputError(f"{out}: texts of suite longcontext are made for a model; run `prism-nemo eval` again instead")
    suite = build_suite(settings)
    lock = locked(out)
    try:
        scores, results = dict(before.tasks), {}
        identity = kept["identity"]
        for task in suite.tasks:
            old = before.tasks[task.name]
            path = out / SAMPLES / f"{task.name}.jsonl"
            stored = read_results(path)
            questions = _same_questions(task, stored, path)
            given = [
                [Given(q.problem, r.prompt, Written(a.text, a.tokens, a.finished)) for a in r.answers]
                for q, r in zip(questions, stored, strict=True)
            ]
            check_verifiers(task, settings.rewards)
            found = judge(task, questions, [r.prompt for r in stored], given, settings.rewards)
            kept_details = ("format", "formats", "chosen_on", "sampling")
            told: dict[str, Any] = {key: old.details[key] for key in kept_details if key in old.details}
            scores[task.name] = score_task(task, questions, found, {**told, "source": task.about})
            results[task.name] = found
            identity["tasks"][task.name]["questions"] = questions_hash(questions)
            write_results(path, found)
        marks = [*before.marks, *([] if REGRADED in before.marks else [REGRADED])]
        judging = {JUDGING: how_judged(settings.rewards)}
        evaluation = dataclasses.replace(
            before, settings=before.settings | judging, tasks=scores, averages=averages(scores, results), marks=marks
        )
        request = kept["request"] | {"rewards": dataclasses.asdict(settings.rewards)}
        write_json(out / SETTINGS, {**kept, "request": request, "identity": identity | judging})
        write_evaluation(out, evaluation)
    finally:
        lock.release()
    return evaluation


def _same_questions(task: EvaluationTask, stored: Sequence[QuestionResult], path: Path) -> list[Question]:
    """The questions of stored answers, in their order."""
    known = {question.id: question for question in task.questions}
    found = []
    for result in stored:
        question = known.get(result.id)
        if question is None:
            raise InputError(f"{path}: question '{result.id}' is not in the task any more; evaluate again")
        # Templates of chats strip what they are given.
        if (question.problem.text or shown_question(question.problem)).strip() not in result.prompt:
            raise InputError(
                f"{path}: question '{result.id}' reads otherwise now than when it was asked; evaluate again"
            )
        found.append(question)
    return found


def _settings_of(request: Mapping[str, Any]) -> EvaluateConfig:
    """Settings as `_request` wrote them."""
    told = dict(request)
    if told.get("suite") == "retention":
        raise InputError("answers of suite retention are judged by lm-eval, as they come; run `prism-nemo eval` again")
    try:
        for name in ("tasks", "formats", "held_out", "lengths"):
            told[name] = tuple(told[name])
        told["rewards"], told["parallel"] = RewardConfig(**told["rewards"]), ParallelConfig(**told["parallel"])
        return EvaluateConfig(**told)
    except (TypeError, KeyError) as error:
        raise InputError(f"{SETTINGS}: was written by another version: {error}") from None
