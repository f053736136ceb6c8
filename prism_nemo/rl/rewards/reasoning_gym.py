"""One adapter for the tasks of the package reasoning-gym.

Its scorers cannot be used as they are: some raise on answers that are not numbers, wrong answers often score 0.01
instead of 0, and one scores 1.0 for any text. So only tasks whose scorer was seen to behave are allowed, exceptions
count as wrong, and scores are cut to 0 or 1.
"""

from __future__ import annotations

import random
import weakref
from typing import Any

from prism_nemo.errors import InputError
from prism_nemo.rl.rewards.task import Problem, Task

# Each was checked to give its own answer 1.0 and other answers less; see tests/rl/rewards/test_reasoning_gym.py.
ALLOWED = {
    "chain_sum": "math",
    "basic_arithmetic": "math",
    "products": "math",
    "gcd": "math",
    "lcm": "math",
    "simple_equations": "math",
    "leg_counting": "math",
    "letter_counting": "code",
    "word_sorting": "code",
    "base_conversion": "code",
    "caesar_cipher": "code",
}


class ReasoningGymTask(Task):
    """A reasoning-gym dataset; its entry's metadata travels with the problem, for its own scorer needs it.

    Args:
        dataset: Name in reasoning-gym.
        config: Options of the dataset.
    """

    def __init__(self, dataset: str, **config: Any) -> None:
        if dataset not in ALLOWED:
            raise InputError(
                f"tasks: reasoning_gym:{dataset} is not on the list of checked tasks; choose one of "
                f"{', '.join(sorted(ALLOWED))}"
            )
        import reasoning_gym

        self.name, self.domain = f"reasoning_gym:{dataset}", ALLOWED[dataset]
        self._create = lambda seed: reasoning_gym.create_dataset(dataset, size=256, seed=seed, **config)
        self._scorer = self._create(0)
        self._chunk: Any = None
        self._chunk_rng: weakref.ref[random.Random] | None = None
        self._next = 0

    def draw(self, rng: random.Random) -> Problem:
        """See `Task.draw`. Datasets are made 256 problems at a time, seeded from `rng`."""
        owner = self._chunk_rng() if self._chunk_rng is not None else None
        if owner is not rng or self._next >= 256:
            self._chunk = self._create(rng.randrange(2**31))
            self._chunk_rng, self._next = weakref.ref(rng), 0
        entry = self._chunk[self._next]
        self._next += 1
        return Problem(self.name, entry["question"], "", str(entry["answer"]), dict(entry["metadata"]))

    def grade(self, problem: Problem, answer: str) -> float:
        """1 if reasoning-gym's own scorer gives full marks, else 0."""
        if answer == problem.answer:
            return 1.0
        entry = {"question": problem.question, "answer": problem.answer, "metadata": problem.metadata}
        try:
            score = float(self._scorer.score_answer(answer=answer, entry=entry))
        except Exception:
            return 0.0
        return float(score >= 1.0)
