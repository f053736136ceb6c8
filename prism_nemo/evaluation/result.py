"""What an evaluation leaves on disk, and reading it again.

    OUT/evaluation.json            the model, the settings, a score with its interval for each task
    OUT/samples/TASK.jsonl         one line for each question: what was asked, what was answered, how it was judged

Both are enough to compare two models question by question, and to judge the answers again without generating them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

FORMAT = 1


@dataclass(frozen=True)
class Answer:
    """One answer to a question.

    Attributes:
        text: What the model wrote; empty for tasks that compare likelihoods.
        tokens: Its length.
        finished: Whether it ended by itself.
        read: What was read as the answer, or None.
        correct: 0 (wrong) to 1 (right).
        failure: Why it was counted as wrong without a verdict, or None.
    """

    text: str
    tokens: int
    finished: bool
    read: str | None
    correct: float
    failure: str | None = None


@dataclass(frozen=True)
class QuestionResult:
    """A line of OUT/samples/TASK.jsonl.

    Attributes:
        id: Of the question.
        split: validation or test.
        prompt: What the model was given.
        gold: The right answer, as text.
        answers: One for each sample.
        logprobs: For tasks that compare likelihoods: of each option, in nats.
        metrics: Further values of this question by name, such as acc_norm; of the same question for every model.
    """

    id: str
    split: str
    prompt: str
    gold: str
    answers: list[Answer]
    logprobs: list[float] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def correct(self) -> float:
        """Mean over the answers, 0 to 1."""
        return sum(answer.correct for answer in self.answers) / len(self.answers)


@dataclass(frozen=True)
class TaskScore:
    """A task's part of evaluation.json.

    Attributes:
        domain: math, code, science, general, long_context or text.
        metric: What `estimate` is: "pass@1", "acc_norm", "loss" (nats per token).
        estimate: The score.
        low: Of its 95 % interval.
        high: Of its 95 % interval.
        questions: Number of questions.
        samples: Answers to each.
        higher_is_better: False for a loss.
        chance: What guessing scores, or None.
        details: Further values by name (pass@k, maj@k, format rate, mean length, failures by kind, prompt format ...).
    """

    domain: str
    metric: str
    estimate: float
    low: float
    high: float
    questions: int
    samples: int = 1
    higher_is_better: bool = True
    chance: float | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """evaluation.json.

    Attributes:
        suite: Name of the suite.
        split: validation or test.
        model: ``path``, ``kind`` (native or huggingface), ``hash``, ``name``.
        settings: Whatever decides the answers: engine, tokenizer hash, sampling, prompt formats, seed.
        tasks: By name.
        averages: Labelled: ``domain_weighted`` and ``plain_mean``, each with estimate, low, high and what it averages.
        marks: What a reader has to know, such as "chosen on the test split".
    """

    suite: str
    split: str
    model: dict[str, Any]
    settings: dict[str, Any]
    tasks: dict[str, TaskScore]
    averages: dict[str, dict[str, Any]] = field(default_factory=dict)
    marks: list[str] = field(default_factory=list)
    format: int = FORMAT
