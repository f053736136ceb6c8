"""Tasks that a random model can learn, and what the RL tests run in processes of their own.

Importing this module registers the tasks, in the tests and in every process that runs one of its functions.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import replace
from typing import Any

from prism_nemo.config import RLConfig
from prism_nemo.generation.decode import Decoder
from prism_nemo.rl import train as module
from prism_nemo.rl.rewards.task import Problem, Score, Task, register
from prism_nemo.rl.rollout import Rollout, roll_out


class FirstDigit(Task):
    """Right when the response begins with a digit: about one in ten responses of a random model does."""

    name, domain = "first-digit", "math"

    def draw(self, rng: random.Random) -> Problem:
        """See `Task.draw`."""
        return Problem(self.name, "x" * rng.randint(0, 9) + str(rng.randint(0, 99)), "", "0")

    def score(self, problem: Problem, response: str) -> Score:
        """See `Task.score`."""
        return Score(float(response[:1].isdigit()), True, response[:1])


class SometimesDigit(FirstDigit):
    """Nobody can solve the questions that end in 3 to 9, so that many groups, and some steps, teach nothing."""

    name = "sometimes-digit"

    def score(self, problem: Problem, response: str) -> Score:
        """See `Task.score`."""
        if problem.question[-1] > "2":
            return Score(0.0, False, None)
        return super().score(problem, response)


class DeadAtFirst(FirstDigit):
    """Gives nothing to the first 32 responses that a process scores."""

    name = "dead-at-first"
    scored = 0

    def score(self, problem: Problem, response: str) -> Score:
        """See `Task.score`."""
        self.scored += 1
        return super().score(problem, response) if self.scored > 32 else Score(0.0, True, None)


for task in (FirstDigit(), SometimesDigit(), DeadAtFirst()):
    register(task)


def train(config: RLConfig) -> dict[str, Any]:
    """RL as it is."""
    return module.train(config)


def train_on_equal_rollouts(config: RLConfig) -> dict[str, Any]:
    """RL in which the responses to a question depend on the question and the policy alone, not on who asks.

    Responses are cut to one to six tokens, so that averages per response, micro-batch or rank would differ from the
    average over tokens.
    """

    def one_by_one(
        model: Any, problems: list[Problem], tasks: Any, tokenizer: Any, rollout: Any, seed: int
    ) -> list[Rollout]:
        found = []
        for problem in problems:
            group = roll_out(model, [problem], tasks, tokenizer, rollout, zlib.crc32(problem.question.encode()))
            for i, r in enumerate(group):
                n = 1 + (i * 5 + len(problem.question)) % 6
                r.response = replace(r.response, tokens=r.response.tokens[:n], logprobs=r.response.logprobs[:n])
                found.append(r)
        return found

    module.roll_out = one_by_one
    return module.train(config)


def train_with_broken_sampler(config: RLConfig) -> dict[str, Any]:
    """RL with a decoder whose rotary frequencies are five per cent off: fluent, plausible and of another policy."""
    prepare = Decoder.__init__

    def broken(self: Decoder, model: Any) -> None:
        prepare(self, model)
        self.inv_freq = self.inv_freq * 1.05

    Decoder.__init__ = broken  # type: ignore[method-assign]
    return module.train(config)
