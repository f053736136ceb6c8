"""What is asked: questions, tasks and suites, whatever they are read or made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from prism_nemo.rl.rewards.task import Problem


@dataclass(frozen=True)
class Question:
    """One question of a task.

    Attributes:
        id: Unique within the task, and the same for every model: two models are compared question by question.
        split: validation (to choose checkpoints and prompt formats on) or test.
        problem: What is asked, its answer and the name of its verifier (see prism_nemo.rl.rewards).
    """

    id: str
    split: str
    problem: Problem


@dataclass(frozen=True)
class AskedSampling:
    """How answers to a task are sampled.

    Attributes:
        samples: Answers to each question.
        temperature: 0 for greedy.
        top_p: Mass of the nucleus.
        max_new_tokens: Longest answer.
        stop_texts: Texts that end an answer.
    """

    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 2048
    stop_texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class EvaluationTask:
    """Questions that make one score.

    Attributes:
        name: Such as gpqa_diamond.
        domain: math, code, science, general or long_context: what a domain-weighted average is taken over.
        questions: All of them, of every split.
        sampling: How they are answered.
        formats: Names of the prompt formats that a base model is tried with; see `answering.formats`.
        about: Further facts that go into the result, such as the file that the questions came from.
    """

    name: str
    domain: str
    questions: Sequence[Question]
    sampling: AskedSampling = field(default_factory=AskedSampling)
    formats: tuple[str, ...] = ()
    about: dict[str, Any] = field(default_factory=dict)
