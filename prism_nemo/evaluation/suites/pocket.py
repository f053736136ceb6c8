"""The pocket suite: procedural questions made here, and the loss on held-out text; no file and no network needed."""

from __future__ import annotations

from prism_nemo.errors import InputError
from prism_nemo.evaluation.question import AskedSampling, EvaluationTask, Question
from prism_nemo.evaluation.settings import EvaluateConfig
from prism_nemo.evaluation.suites.question_file import question_id
from prism_nemo.rl.prompt_file import PREFIX
from prism_nemo.rl.rewards.task import Task, task_named

TASKS = ("arithmetic", "lists", "formulas")
QUESTIONS = 512
SAMPLING = AskedSampling(samples=1, temperature=1.0, top_p=1.0, max_new_tokens=48)
# Questions that choose a format, and that are shown as examples.
_VALIDATION = 128


def pocket_tasks(settings: EvaluateConfig) -> list[EvaluationTask]:
    """Procedural tasks with questions of both splits; a question's split depends on its text alone.

    The seed of the questions is that of the evaluation, so every model that is evaluated with it gets the same ones.

    Raises:
        InputError: For an unknown task, or one whose questions come from a file.
    """
    tasks = []
    for name in settings.tasks or TASKS:
        if name.startswith(PREFIX):
            raise InputError(f"--task: '{name}' is a file; give it as --suite {name.removeprefix(PREFIX)}")
        task = task_named(name)
        count = settings.questions or QUESTIONS
        validation = count if settings.split == "validation" else min(count, _VALIDATION)
        questions = _questions(task, "validation", validation, settings.seed)
        if settings.split == "test":
            questions += _questions(task, "test", count, settings.seed)
        # Without a worked answer there are no examples to show.
        formats = ("think", "few_shot") if all(q.problem.work for q in questions) else ("think",)
        tasks.append(EvaluationTask(name, task.domain, questions, SAMPLING, formats))
    return tasks


def _questions(task: Task, split: str, count: int, seed: int) -> list[Question]:
    return [Question(question_id(problem.question), split, problem) for problem in task.distinct(count, split, seed)]
