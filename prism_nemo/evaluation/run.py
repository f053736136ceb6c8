"""Running an evaluation: what is asked, the answers, the verdicts, the scores.

An evaluation that is ended at any instant goes on with the same command and gives the same result: answers are on disk
as they come, and each answer's random numbers depend on the seed, the question and the sample alone.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_nemo.errors import InputError
from prism_nemo.evaluation.answering.answers import Cache
from prism_nemo.evaluation.answering.asking import Asked, answers_of, sampling_of
from prism_nemo.evaluation.answering.elicitation import Choice, candidates, choose, split_to_choose_on
from prism_nemo.evaluation.answering.formats import check_format
from prism_nemo.evaluation.answering.grading import Given, Written, check_verifiers, judge
from prism_nemo.evaluation.answering.leading import led
from prism_nemo.evaluation.answering.plan import Plan, comparable, identity_of, limited, plan_task
from prism_nemo.evaluation.answering.scoring import ACCURACY, averages, score_task
from prism_nemo.evaluation.answering.store import (
    ELICITATION,
    SAMPLES,
    Store,
    read_evaluation,
    read_results,
    write_evaluation,
    write_results,
)
from prism_nemo.evaluation.engines.contract import EvaluationModel
from prism_nemo.evaluation.engines.open import OpenedModel, find_model, with_model
from prism_nemo.evaluation.held_out_loss import check_held_out, held_out_sources, measure_held_out
from prism_nemo.evaluation.question import EvaluationTask
from prism_nemo.evaluation.result import Evaluation, QuestionResult, TaskScore
from prism_nemo.evaluation.settings import EvaluateConfig, check_settings
from prism_nemo.evaluation.suites.build import Suite, build_suite, check_long_context, check_suite_name
from prism_nemo.parent import end_with_parent
from prism_nemo.training.progress import Progress


def evaluate(settings: EvaluateConfig) -> Evaluation:
    """Evaluate a model; goes on with an evaluation that was interrupted, and does nothing anew that is done.

    Starts the processes that the layout needs; under torchrun every rank calls this.

    Raises:
        InputError: For what cannot be evaluated; before a model is loaded where that can be told.
        StoppedEarly: On a signal; the same command goes on.
    """
    check_settings(settings)
    check_suite_name(settings.suite)
    found = find_model(settings.model, settings.engine, settings.tokenizer, settings.parallel)
    max_length = found.max_length or found.architecture.max_position_embeddings
    if settings.suite == "retention":
        if settings.split != "test":
            raise InputError(f"--split {settings.split}: suite retention has test questions only")
        if importlib.util.find_spec("lm_eval") is None:
            raise InputError("--suite retention: needs lm-eval; pip install 'prism-nemo[eval]'")
    elif settings.suite == "longcontext":
        check_long_context(settings, found.tokenizer, max_length)
    else:
        check_suite(build_suite(settings), settings)
    result: Evaluation | None = with_model(evaluate_opened, found, settings)
    return result if result is not None else read_evaluation(Path(settings.out))


def check_suite(suite: Suite, settings: EvaluateConfig) -> None:
    """Refuse what can be refused without the model.

    Raises:
        InputError: Naming the task: without questions of the split, with a verifier that does not work here, with a
            format that does not fit, or with nothing to choose a format by.
    """
    for task in suite.tasks:
        if not any(question.split == settings.split for question in task.questions):
            where = (
                f"put them into {task.name}.{settings.split}.jsonl beside its file" if task.about else "there are none"
            )
            raise InputError(f"{task.name}: has no {settings.split} questions; {where}")
        forms = candidates(task, settings)
        for form in forms:
            check_format(form, task, None)
        if len(forms) > 1:
            split_to_choose_on(task, settings)
        check_verifiers(task, settings.rewards)
    if settings.suite == "pocket" and settings.held_out and settings.data is None:
        raise InputError("--held-out: needs --data, the folder of built data that has these sources")


def evaluate_opened(opened: OpenedModel, settings: EvaluateConfig) -> Evaluation | None:
    """What each rank does with its part of the model; the result is rank 0's."""
    # Also ranks of torchrun: one that is killed cannot tell them, and they would hold the folder until the last answer.
    end_with_parent(os.getppid())
    if settings.suite == "retention":
        from prism_nemo.evaluation.harness.run import HarnessSettings, run_harness

        return run_harness(
            opened.model,
            HarnessSettings(
                tasks=settings.tasks,
                data=Path(settings.data) if settings.data else None,
                folder=Path(settings.task_folder) if settings.task_folder else None,
                questions=settings.questions,
                chat_template="chat" in settings.formats,
                seed=settings.seed,
            ),
            Path(settings.out),
            dict(opened.about),
            Progress("evaluation", 1, enabled=int(os.environ.get("RANK", "0")) == 0).say,
        )
    return led(opened.model, lambda model: evaluate_model(model, opened.about, settings))


def evaluate_model(
    model: EvaluationModel, about: Mapping[str, Any], settings: EvaluateConfig, suite: Suite | None = None
) -> Evaluation:
    """Evaluate a model that is loaded; one process calls this.

    Args:
        model: See `prism_nemo.evaluation.answering.leading` for one that several ranks hold.
        about: ``hash`` of its weights, and ``path``, ``kind`` and ``name``.
        settings: What is asked.
        suite: Its tasks; built from the settings if not given.

    Raises:
        InputError: Before anything is generated.
        PrismError: If answers cannot be written down or judged; the same command goes on.
    """
    check_settings(settings)
    suite = suite or build_suite(settings, model.tokenizer, model.max_length)
    check_suite(suite, settings)
    plans = [plan_task(model, str(about["hash"]), task, settings) for task in suite.tasks]
    sources = _sources(model, settings)
    say = Progress("evaluation", 1).say
    identity = identity_of(model, about, suite, plans, sources, settings)
    with Store(Path(settings.out), identity, _request(settings)) as store:
        run = _Run(model, store, Cache(Path(settings.cache) if settings.cache else None), settings, say)
        scores: dict[str, TaskScore] = {}
        results: dict[str, list[QuestionResult]] = {}
        marks = list(suite.marks)
        for plan in plans:
            choice = run.chosen(plan)
            asked = plan.final[choice.form.name]
            found = run.results(plan.task, asked, store.out / SAMPLES / f"{plan.task.name}.jsonl")
            told = {**choice.details, "sampling": sampling_of(asked, plan.task.sampling), "source": plan.task.about}
            scores[plan.task.name] = score_task(plan.task, asked.questions, found, told)
            results[plan.task.name] = found
            marks += [choice.mark] if choice.mark else []
            marks += limited(plan.task, asked)
            say(_line(plan.task.name, scores[plan.task.name]))
        for name, loss in _losses(model, store.out, sources, settings).items():
            scores[name] = loss
            say(_line(name, loss))
        evaluation = Evaluation(
            suite.name,
            settings.split,
            dict(about),
            comparable(identity),
            scores,
            averages(scores, results),
            marks,
        )
        write_evaluation(store.out, evaluation)
    return evaluation


@dataclass
class _Run:
    """An evaluation that is going on."""

    model: EvaluationModel
    store: Store
    cache: Cache
    settings: EvaluateConfig
    say: Callable[[str], None]

    def chosen(self, plan: Plan) -> Choice:
        """The format that a task is asked in."""
        if len(plan.forms) == 1:
            return Choice(plan.forms[0], {"format": plan.forms[0].name})
        scores = {}
        for name, asked in plan.trial.items():
            found = self.results(plan.task, asked, self.store.out / ELICITATION / f"{asked.name}.jsonl")
            scores[name] = score_task(plan.task, asked.questions, found, {})
            self.say(_line(asked.name, scores[name]))
        return choose(plan.task, scores, next(iter(plan.trial.values())).questions[0].split)

    def results(self, task: EvaluationTask, asked: Asked, path: Path) -> list[QuestionResult]:
        """The judged answers: those on disk, or else answered and judged now."""
        # A format that was chosen on the split that is scored has been asked already.
        for known in (path, self.store.out / ELICITATION / f"{asked.name}.jsonl"):
            if known.is_file():
                found = read_results(known)
                if _places(found) != list(asked.requests):
                    raise InputError(f"{known}: does not have the questions that are asked; remove it and run again")
                if known != path:
                    write_results(path, found)
                return found
        log = self.store.log(asked.name, asked.key, self.say)
        answers = answers_of(self.model, asked, log, self.cache, self.settings.batch, self.say)
        given = _given(asked, answers)
        results = judge(task, asked.questions, asked.prompts, given, self.settings.rewards)
        write_results(path, results)
        log.remove()
        return results


def _given(asked: Asked, answers: Mapping[tuple[str, int], Written]) -> list[list[Given]]:
    """By question, the answers to it."""
    by_question: dict[str, list[Written]] = {question.id: [] for question in asked.questions}
    for (id, _), written in answers.items():
        by_question[id].append(written)
    return [
        [Given(question.problem, prompt, written) for written in by_question[question.id]]
        for question, prompt in zip(asked.questions, asked.prompts, strict=True)
    ]


def _places(results: Sequence[QuestionResult]) -> list[tuple[str, int]]:
    return [(result.id, sample) for result in results for sample in range(len(result.answers))]


def _sources(model: EvaluationModel, settings: EvaluateConfig) -> list[str]:
    """Held-out sources whose loss belongs to the suite."""
    if settings.suite != "pocket" or settings.data is None:
        return []
    names = list(settings.held_out) or held_out_sources(settings.data)
    check_held_out(settings.data, names, settings.held_out_rows, settings.seq_length, model.max_length, model.tokenizer)
    return names


def _losses(
    model: EvaluationModel, out: Path, sources: Sequence[str], settings: EvaluateConfig
) -> dict[str, TaskScore]:
    """Losses on held-out text; they take seconds, so what was interrupted is measured again."""
    scores = {}
    if sources and settings.data is not None:
        found = measure_held_out(model, settings.data, sources, settings.held_out_rows, settings.seq_length)
        for name, loss in found.items():
            write_results(out / SAMPLES / f"{name}.jsonl", loss.rows)
            scores[name] = loss.score
    return scores


def _request(settings: EvaluateConfig) -> dict[str, Any]:
    """The settings with absolute paths: answers may be judged again from another folder."""
    told = dataclasses.asdict(settings)
    for name in ("data", "suite", "text"):
        if told[name] is not None and Path(told[name]).exists():
            told[name] = str(Path(told[name]).absolute())
    return told


def _line(name: str, score: TaskScore) -> str:
    number = "{:.4f}" if score.metric != ACCURACY else "{:.1%}"
    low, middle, high = (number.format(value) for value in (score.low, score.estimate, score.high))
    return f"{name}: {score.metric} {middle} [{low}, {high}], {score.questions} questions"
