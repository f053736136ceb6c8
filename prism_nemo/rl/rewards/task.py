"""What a verifiable task is, how its questions are split, and how a response is scored."""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prism_nemo.errors import InputError

OPEN, CLOSE, END = "<think>", "</think>", "<eos>"
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Problem:
    """One question.

    Attributes:
        task: Name of the family.
        question: What is asked.
        work: The worked answer, for mid-training documents; empty where a task cannot write one.
        answer: The verifiable answer.
        metadata: What a task's own scorer needs beside the answer.
        domain: Of this problem, where a task has several.
        verifier: Name of what judges the answer; empty where the task does.
        text: The prompt as it is given to the model; empty for the usual form.
    """

    task: str
    question: str
    work: str
    answer: str
    metadata: dict[str, Any] = field(default_factory=dict, compare=False)
    domain: str = ""
    verifier: str = ""
    text: str = ""

    @property
    def prompt(self) -> str:
        """What the model is given; in the usual form it continues inside the thinking part."""
        return self.text or f"Q: {self.question}\n{OPEN}"

    @property
    def document(self) -> str:
        """Question, work and answer as mid-training text (the end token is added by the tokenizer stage)."""
        return f"{self.prompt}{self.work}{CLOSE}{self.answer}"


@dataclass(frozen=True)
class Score:
    """Verdict on a response.

    Attributes:
        reward: 1 for a right answer in the required form, else 0; with penalties where those are asked for.
        well_formed: Whether the form was right, whatever the answer.
        answer: What was read as the answer, or None.
        correct: What the verifier gave, without penalties; None where it is the reward.
        penalties: Numbers of 0 or less by name, part of the reward.
        failure: Why there is no verdict, or None; the reward means nothing then.
    """

    reward: float
    well_formed: bool
    answer: str | None
    correct: float | None = None
    penalties: dict[str, float] = field(default_factory=dict)
    failure: str | None = None

    @property
    def right(self) -> bool:
        """Whether the answer has full marks and the required form."""
        return (
            self.well_formed and self.failure is None and (self.reward if self.correct is None else self.correct) >= 1
        )


def split_of(question: str) -> str:
    """Which split a question belongs to, a property of its text alone: 20 % test, 10 % validation, 70 % train.

    So a question can never be trained on in one stage and tested in another, whatever the seed.
    """
    bucket = hashlib.sha256(question.encode()).digest()[0] * 10 // 256
    return "test" if bucket < 2 else "validation" if bucket == 2 else "train"


class Task(ABC):
    """A family of questions with checkable answers."""

    name: str
    domain: str

    @abstractmethod
    def draw(self, rng: random.Random) -> Problem:
        """One problem of any split."""

    def grade(self, problem: Problem, answer: str) -> float:
        """Reward of an extracted answer, 0 or 1; exact match unless a task knows better."""
        return float(answer == problem.answer)

    def sample(self, rng: random.Random, split: str) -> Problem:
        """One problem of a split.

        Raises:
            InputError: For an unknown split, or a task that yields no question of it.
        """
        if split not in SPLITS:
            raise InputError(f"split '{split}' is unknown; choose one of {', '.join(SPLITS)}")
        for _ in range(10_000):
            problem = self.draw(rng)
            if split_of(problem.question) == split:
                return problem
        raise InputError(f"task '{self.name}' has no question of split '{split}'")

    def distinct(self, count: int, split: str, seed: int) -> list[Problem]:
        """Up to `count` problems with different questions; fewer where the task has fewer."""
        rng = random.Random(f"{self.name}/{split}/{seed}")
        found: dict[str, Problem] = {}
        misses = 0
        while len(found) < count and misses < 2_000:
            problem = self.sample(rng, split)
            misses = misses + 1 if problem.question in found else 0
            found.setdefault(problem.question, problem)
        return list(found.values())

    def score(self, problem: Problem, response: str) -> Score:
        """Score what the model wrote after the prompt.

        The form: some work, exactly one ``</think>``, the answer, the end token. A response that was cut off before
        the end token, or that closes its thinking twice, scores 0 however right it looks.
        """
        body, separator, _ = response.partition(END)
        if not separator or body.count(CLOSE) != 1 or OPEN in body:
            return Score(0.0, False, None)
        answer = body.split(CLOSE)[1].strip()
        return Score(self.grade(problem, answer), True, answer)


_TASKS: dict[str, Task] = {}


def register(task: Task) -> Task:
    """Add a task to the registry."""
    _TASKS[task.name] = task
    return task


def task_named(name: str, templates: Sequence[str] = ()) -> Task:
    """The task of that name: a registered one, ``reasoning_gym:NAME`` of that package, or ``prompts:FILE``.

    Args:
        name: See above.
        templates: Forms of the prompts of a file.

    Raises:
        InputError: If there is none, or a file cannot be used.
    """
    from prism_nemo.rl.rewards import procedural  # noqa: F401  (registers itself)

    if name.startswith("prompts:"):
        from prism_nemo.rl.prompt_file import PromptFile

        return PromptFile(Path(name.partition(":")[2]), templates)
    if name.startswith("reasoning_gym:") and name not in _TASKS:
        from prism_nemo.rl.rewards.reasoning_gym import ReasoningGymTask

        return register(ReasoningGymTask(name.partition(":")[2]))
    if name not in _TASKS:
        known = ", ".join(sorted(n for n in _TASKS if ":" not in n))
        raise InputError(f"tasks: '{name}' is unknown; known: {known}, reasoning_gym:NAME, prompts:FILE")
    return _TASKS[name]
