"""Tasks that a random model can learn, and what the RL tests run in processes of their own.

Importing this module registers the tasks, in the tests and in every process that runs one of its functions.
"""

from __future__ import annotations

import os
import random
import signal
from dataclasses import replace
from typing import Any

from prism_nemo.checkpoint.native import TrainState
from prism_nemo.config import RLConfig, RolloutConfig
from prism_nemo.generation.decode import Decoder
from prism_nemo.generation.requests import Response
from prism_nemo.rl import collect
from prism_nemo.rl import train as module
from prism_nemo.rl.rewards.task import Problem, Score, Task, register


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


class SometimesRaises(FirstDigit):
    """Fails on responses that begin with a lower-case letter: a quarter of a random model's."""

    name = "sometimes-raises"

    def score(self, problem: Problem, response: str) -> Score:
        """See `Task.score`."""
        return Score(1 / (not response[:1].islower()) * float(response[:1].isdigit()), True, response[:1])


for task in (FirstDigit(), SometimesDigit(), DeadAtFirst(), SometimesRaises()):
    register(task)


def train(config: RLConfig) -> dict[str, Any]:
    """RL as it is."""
    return module.train(config)


def train_on_cut_rollouts(config: RLConfig) -> dict[str, Any]:
    """RL whose responses are cut to one to six tokens.

    So averages per response, group, micro-batch or rank differ from the average over tokens.
    """
    sample = collect.sample_responses

    def cut(engine: Any, problems: Any, tokenizer: Any, rollout: RolloutConfig, seed: int) -> list[Response]:
        found = []
        for i, response in enumerate(sample(engine, problems, tokenizer, rollout, seed)):
            problem = problems[i // rollout.group_size][1]
            n = 1 + (i % rollout.group_size * 5 + len(problem.question)) % 6
            found.append(replace(response, tokens=response.tokens[:n], logprobs=response.logprobs[:n]))
        return found

    collect.sample_responses = cut
    return module.train(config)


def train_on_single_tokens(config: RLConfig) -> dict[str, Any]:
    """RL whose responses are all cut to their first token."""
    sample = collect.sample_responses

    def cut(*arguments: Any) -> list[Response]:
        return [replace(r, tokens=r.tokens[:1], logprobs=r.logprobs[:1]) for r in sample(*arguments)]

    collect.sample_responses = cut
    return module.train(config)


def train_and_be_killed(config: RLConfig, step: int) -> dict[str, Any]:
    """RL whose process is killed in the middle of a step, after sampling and before the update."""
    collect_step = collect.Collector.collect

    def die(self: collect.Collector, state: TrainState) -> collect.Collected:
        found = collect_step(self, state)
        if state.step + 1 == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    collect.Collector.collect = die  # type: ignore[method-assign]
    return module.train(config)


def train_with_broken_sampler(config: RLConfig) -> dict[str, Any]:
    """RL with a decoder whose rotary frequencies are five per cent off: fluent, plausible and of another policy."""
    prepare = Decoder.__init__

    def broken(self: Decoder, model: Any) -> None:
        prepare(self, model)
        self.inv_freq = self.inv_freq * 1.05

    Decoder.__init__ = broken  # type: ignore[method-assign]
    return module.train(config)
