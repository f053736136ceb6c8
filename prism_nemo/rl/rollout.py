"""Prompts, rollouts and rewards of one step."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from prism_nemo.config import RolloutConfig
from prism_nemo.data.tokenizer import Tokenizer
from prism_nemo.generation.sampling import Response, generate
from prism_nemo.models.decoder import LanguageModel
from prism_nemo.rl.rewards.task import Problem, Score, Task


@dataclass
class Rollout:
    """One response with its verdict."""

    problem: Problem
    response: Response
    score: Score


def draw_prompts(tasks: list[Task], count: int, step: int, seed: int) -> list[Problem]:
    """The prompts of a step, a function of (seed, step): a resumed run sees the same ones.

    Tasks take turns, so each has an equal share.
    """
    rng = random.Random(f"prompts/{seed}/{step}")
    return [tasks[(step * count + i) % len(tasks)].sample(rng, "train") for i in range(count)]


def roll_out(
    model: LanguageModel,
    problems: list[Problem],
    tasks: dict[str, Task],
    tokenizer: Tokenizer,
    config: RolloutConfig,
    seed: int,
) -> list[Rollout]:
    """Sample a group of responses to each problem and score them.

    Args:
        model: The policy; its weights are the trainer's own.
        problems: This data-parallel rank's share of the step.
        tasks: By name.
        tokenizer: The model's.
        config: Group size, length, temperature.
        seed: Of the sampling, different for each step and data-parallel rank.

    Returns:
        ``len(problems) * group_size`` rollouts; groups stand together.
    """
    device = next(model.parameters()).device
    responses = generate(
        model,
        [tokenizer.encode(problem.prompt) for problem in problems],
        samples_per_prompt=config.group_size,
        max_new_tokens=config.max_new_tokens,
        stop_id=tokenizer.eos_id,
        temperature=config.temperature,
        top_p=config.top_p,
        generator=torch.Generator(device).manual_seed(seed),
    )
    rollouts = []
    for i, response in enumerate(responses):
        problem = problems[i // config.group_size]
        text = tokenizer.decode(response.tokens)
        rollouts.append(Rollout(problem, response, tasks[problem.task].score(problem, text)))
    return rollouts


@dataclass
class PolicyBatch:
    """Responses as tensors, padded on the right to a common length.

    Attributes:
        tokens: [B, S] prompt and response without the last token.
        labels: [B, S] shifted by one.
        mask: [B, S], 1 where the label is a response token.
        sampler_logprobs: [B, S], 0 outside the mask.
        advantages: [B].
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor
    sampler_logprobs: torch.Tensor
    advantages: torch.Tensor


def collate(
    rollouts: list[Rollout], advantages: list[float], pad_id: int, device: torch.device, length: int | None = None
) -> PolicyBatch:
    """Pad rollouts to the longest of them, or to `length`."""
    rows = [r.response.prompt + r.response.tokens for r in rollouts]
    width = length or max(len(row) for row in rows) - 1
    tokens = torch.full((len(rows), width), pad_id)
    labels = torch.full((len(rows), width), pad_id)
    mask = torch.zeros(len(rows), width)
    logprobs = torch.zeros(len(rows), width)
    for i, (row, rollout) in enumerate(zip(rows, rollouts, strict=True)):
        first, last = len(rollout.response.prompt) - 1, len(row) - 1
        tokens[i, :last] = torch.tensor(row[:-1])
        labels[i, :last] = torch.tensor(row[1:])
        mask[i, first:last] = 1.0
        logprobs[i, first:last] = torch.tensor(rollout.response.logprobs)
    return PolicyBatch(
        tokens.to(device), labels.to(device), mask.to(device), logprobs.to(device),
        torch.tensor(advantages, dtype=torch.float32, device=device),
    )  # fmt: skip
