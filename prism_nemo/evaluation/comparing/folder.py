"""An evaluation with its questions, read from its folder for a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prism_nemo.errors import InputError
from prism_nemo.evaluation.answering.store import EVALUATION, SAMPLES, read_evaluation, read_results
from prism_nemo.evaluation.held_out_loss import DOMAIN
from prism_nemo.evaluation.result import Evaluation, QuestionResult

__all__ = ["EVALUATION", "EvaluationFolder", "distinct_names", "question_value", "read_folder"]


@dataclass(frozen=True)
class EvaluationFolder:
    """An evaluation with its questions.

    Attributes:
        path: The folder.
        evaluation: Its evaluation.json.
        questions: By task, those of the evaluation's split, in the order of their ids.
    """

    path: Path
    evaluation: Evaluation
    questions: dict[str, list[QuestionResult]]

    @property
    def name(self) -> str:
        """Of the model, or of the folder where the model has none."""
        return str(self.evaluation.model.get("name") or self.path.name)


def read_folder(path: Path) -> EvaluationFolder:
    """Read an evaluation, whole.

    Raises:
        InputError: A file that is missing, damaged or of another format; a task whose questions are not all there, or
            are there twice; naming the file.
    """
    evaluation = read_evaluation(path)
    questions = {}
    for task, score in evaluation.tasks.items():
        source = path / SAMPLES / f"{task}.jsonl"
        # Held-out text belongs to no split: its rows are the same whatever the questions are.
        read = [q for q in read_results(source) if score.domain == DOMAIN or q.split == evaluation.split]
        if len({q.id for q in read}) != len(read):
            raise InputError(f"{source}: holds a question twice; evaluate the model again")
        if len(read) != score.questions or not read:
            raise InputError(
                f"{source}: {len(read)} questions of split {evaluation.split}, where {EVALUATION} counts "
                f"{score.questions}; evaluate the model again"
            )
        for question in read:
            question_value(question, score.metric, source)
        questions[task] = sorted(read, key=lambda q: q.id)
    return EvaluationFolder(path, evaluation, questions)


def question_value(question: QuestionResult, metric: str, source: Path | None = None) -> float:
    """What a question adds to the task's metric: a value that is kept under this name, or the mean of its answers.

    Args:
        question: The question.
        metric: Of the task.
        source: The file, for the message.

    Raises:
        InputError: Neither is there.
    """
    if metric in question.metrics:
        return question.metrics[metric]
    if not question.answers:
        where = f"{source}: " if source is not None else ""
        raise InputError(f"{where}question {question.id} has no answers and no value of {metric}; evaluate again")
    return question.correct


def distinct_names(folders: Sequence[EvaluationFolder]) -> list[str]:
    """Names that tell the models apart: those of the same name have their folder beside it."""
    names = [folder.name for folder in folders]
    return [
        name if names.count(name) == 1 else f"{name} ({folder.path})"
        for name, folder in zip(names, folders, strict=True)
    ]
