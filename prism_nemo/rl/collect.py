"""One step's rollouts: sampled, scored, shaped, and turned into advantages."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from megatron.core import parallel_state

from prism_nemo.checkpoint.native import TrainState
from prism_nemo.config import RLConfig
from prism_nemo.data.tokenizer import Tokenizer
from prism_nemo.generation.requests import Sampler
from prism_nemo.rl.controls import controlled, overlong_penalty
from prism_nemo.rl.grpo import group_advantages, live_groups
from prism_nemo.rl.prompts import PromptStream
from prism_nemo.rl.rewards.judge import Judge
from prism_nemo.rl.rewards.task import Problem
from prism_nemo.rl.rollout import Rollout, judge_responses, sample_responses
from prism_nemo.runtime import gather

CURSOR = "prompts"  # in TrainState.extra: how many prompts have been drawn


@dataclass
class Collected:
    """What a data-parallel rank has of a step.

    Attributes:
        sampled: Everything that was sampled, groups together.
        used: The groups that take part in the update.
        rounds: How often prompts were drawn; more than 1 only with dynamic sampling.
        failures: Verdicts that could not be had, by kind.
    """

    sampled: list[Rollout]
    used: list[Rollout]
    rounds: int
    failures: dict[str, int] = field(default_factory=dict)


class Collector:
    """Draws prompts, samples a group of responses to each, and judges them.

    Args:
        config: Of the stage.
        stream: Of prompts.
        engine: Over the policy.
        judge: Of responses.
        tokenizer: The model's.
    """

    def __init__(
        self, config: RLConfig, stream: PromptStream, engine: Sampler, judge: Judge, tokenizer: Tokenizer
    ) -> None:
        self._config, self._stream, self._engine, self._judge = config, stream, engine, judge
        self._tokenizer = tokenizer
        self.reward_seconds = 0.0  # spent in the judge during the last step
        self._rank = parallel_state.get_data_parallel_rank()
        self._share = config.rollout.prompts_per_step // parallel_state.get_data_parallel_world_size()

    def epochs(self, state: TrainState) -> dict[str, float]:
        """How often each prompt file has been gone through so far."""
        return self._stream.epochs(state.extra.get(CURSOR, 0))

    def collect(self, state: TrainState) -> Collected:
        """The rollouts of the next step; moves the cursor of `state`. Every rank calls this.

        With dynamic sampling (DAPO, arXiv 2503.14476 section 3.2) prompts are drawn until `prompts_per_step` groups
        teach something, or `max_sampling_rounds` times; those drawn first are used, the rest is dropped.
        """
        config, group = self._config, self._config.rollout.group_size
        wanted = config.rollout.prompts_per_step
        sampled: list[Rollout] = []
        used: list[Rollout] = []
        rounds = 0
        self.reward_seconds = 0.0
        while True:
            first = state.extra.get(CURSOR, 0)
            problems = list(enumerate(self._stream.take(first, wanted), first))
            state.extra[CURSOR] = first + wanted
            rounds += 1
            found = self._round(self._mine(problems))
            sampled += found
            live = live_groups(torch.tensor([r.reward for r in found]), group).tolist()
            # Without a KL term a group of equal rewards has no gradient, and its tokens stay out of the denominator;
            # with one, every response is held to the reference.
            keep_all = config.grpo.kl_beta > 0 and not config.grpo.dynamic_sampling
            used += [r for i, r in enumerate(found) if live[i // group] or keep_all]
            if not config.grpo.dynamic_sampling:
                break
            numbers = sorted(n for part in gather([r.number for r in used[::group]]) for n in part)
            if len(numbers) >= wanted or rounds >= config.grpo.max_sampling_rounds:
                taken = set(numbers[:wanted])
                used = [r for r in used if r.number in taken]
                break
        return Collected(sampled, used, rounds, self._judge.take_failures())

    def _mine(self, problems: list[tuple[int, Problem]]) -> list[tuple[int, Problem]]:
        """This rank's share: a part of each mini-batch where that is possible, so that no rank waits in an update."""
        batches = self._config.grpo.mini_batches
        batches = batches if self._share % batches == 0 else 1
        size, own = len(problems) // batches, self._share // batches
        starts = range(self._rank * own, len(problems), size)
        return [problem for start in starts for problem in problems[start : start + own]]

    def _round(self, problems: list[tuple[int, Problem]]) -> list[Rollout]:
        config, grpo = self._config, self._config.grpo
        responses = sample_responses(self._engine, problems, self._tokenizer, config.rollout, config.seed)
        began = time.perf_counter()
        rollouts = judge_responses(problems, responses, self._judge, self._tokenizer)
        self.reward_seconds += time.perf_counter() - began
        limit = config.rollout.max_new_tokens
        for r in rollouts:
            length = len(r.response.tokens)
            r.reward = r.score.reward + overlong_penalty(length, limit, grpo.overlong_buffer, grpo.overlong_penalty)
        _spare_failed(rollouts, config.rollout.group_size)
        if config.control != "none":
            rewards = controlled(
                config.control,
                [r.reward for r in rollouts],
                [r.score.well_formed for r in rollouts],
                [(r.problem.question, r.text) for r in rollouts],
                config.rollout.group_size,
                [((config.seed & 0xFFFFFFFF) << 32) + number for number, _ in problems],
                config.control_rate,
            )
            for r, reward in zip(rollouts, rewards, strict=True):
                r.reward = reward
        group = config.rollout.group_size
        advantages = group_advantages(torch.tensor([r.reward for r in rollouts]), group, grpo.normalize_advantage)
        for r, advantage in zip(rollouts, advantages.tolist(), strict=True):
            r.advantage = advantage
        return rollouts


def _spare_failed(rollouts: list[Rollout], group_size: int) -> None:
    """A response without a verdict gets the mean of its group's others: an advantage of zero, whatever the truth is.

    Counting it as wrong would push the policy away from answers that are too slow to check.
    """
    for first in range(0, len(rollouts), group_size):
        group = rollouts[first : first + group_size]
        judged = [r.reward for r in group if r.score.failure is None]
        for r in group:
            if r.score.failure is not None:
                r.reward = sum(judged) / len(judged) if judged else 0.0


def sum_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """Sum over data-parallel ranks."""
    total: dict[str, float] = defaultdict(float)
    for part in gather(values):
        for name, value in part.items():
            total[name] += value
    return dict(total)
