"""From prompts to scored responses, and responses as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prism_nemo.config import RolloutConfig
from prism_nemo.data.tokenizer import Tokenizer
from prism_nemo.generation.requests import Request, Response, Sampler, SamplingParams, request_seed
from prism_nemo.rl.rewards.judge import Answered, Judge
from prism_nemo.rl.rewards.task import Problem, Score


@dataclass
class Rollout:
    """One response with its verdict and what the update makes of it.

    Attributes:
        problem: The question.
        response: What the policy wrote.
        score: The verdict.
        text: The response, with the text of the end token if it was reached.
        number: Of the prompt in the run's sequence of prompts.
        reward: What the advantage is computed from: the score's reward with length shaping, or a control's.
        advantage: Of the response within its group.
    """

    problem: Problem
    response: Response
    score: Score
    text: str = ""
    number: int = 0
    reward: float = 0.0
    advantage: float = 0.0


def sample_responses(
    engine: Sampler, problems: Sequence[tuple[int, Problem]], tokenizer: Tokenizer, config: RolloutConfig, seed: int
) -> list[Response]:
    """Sample a group of responses to each problem; arguments are those of `roll_out`."""
    requests = []
    for number, problem in problems:
        prompt = tokenizer.encode(problem.prompt)
        for sample in range(config.group_size):
            sampling = SamplingParams(
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                top_p=config.top_p,
                stop_ids=(tokenizer.eos_id,),
                seed=request_seed(seed, number, sample),
            )
            requests.append(Request(prompt, sampling))
    return engine.generate(requests)


def judge_responses(
    problems: Sequence[tuple[int, Problem]], responses: Sequence[Response], judge: Judge, tokenizer: Tokenizer
) -> list[Rollout]:
    """Score the responses to each problem; those of one problem stand together."""
    group_size = len(responses) // max(1, len(problems))
    owners = [owner for owner in problems for _ in range(group_size)]
    answered = [
        Answered(problem, tokenizer.decode(response.tokens), response.tokens, response.finished)
        for (_, problem), response in zip(owners, responses, strict=True)
    ]
    return [
        Rollout(problem, response, score, item.text, number, score.reward)
        for (number, problem), response, item, score in zip(
            owners, responses, answered, judge.score(answered), strict=True
        )
    ]


def roll_out(
    engine: Sampler,
    problems: Sequence[tuple[int, Problem]],
    judge: Judge,
    tokenizer: Tokenizer,
    config: RolloutConfig,
    seed: int,
) -> list[Rollout]:
    """Sample a group of responses to each problem and score them.

    Args:
        engine: Over the policy.
        problems: This data-parallel rank's share of the step, each with its number in the run.
        judge: Scores the responses.
        tokenizer: The model's.
        config: Group size, length, temperature.
        seed: Of the run.

    Returns:
        ``len(problems) * group_size`` rollouts; groups stand together.
    """
    return judge_responses(problems, sample_responses(engine, problems, tokenizer, config, seed), judge, tokenizer)


@dataclass
class PolicyBatch:
    """Responses as tensors, padded on the right to a common length.

    Attributes:
        tokens: [B, S] prompt and response without the last token.
        labels: [B, S] shifted by one.
        mask: [B, S], 1 where the label is a response token.
        sampler_logprobs: [B, S], 0 outside the mask.
        advantages: [B].
        weights: [B], what the loss of each token of a response weighs.
        old_logprobs: [B, S] of the policy before the first update from these rollouts, or None.
        reference_logprobs: [B, S], or None.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor
    sampler_logprobs: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor
    old_logprobs: torch.Tensor | None = None
    reference_logprobs: torch.Tensor | None = None


def collate(
    rollouts: Sequence[Rollout],
    pad_id: int,
    device: torch.device,
    weights: Sequence[float] | None = None,
    multiple: int = 1,
) -> PolicyBatch:
    """Pad rollouts to the longest of them.

    Args:
        rollouts: At least one.
        pad_id: Fills what no response reaches; masked.
        device: Of the tensors.
        weights: One for each rollout; 1 if not given.
        multiple: The length is a multiple of this (sequence parallelism cuts it into as many parts).
    """
    rows = [r.response.prompt + r.response.tokens for r in rollouts]
    width = -(-(max(len(row) for row in rows) - 1) // multiple) * multiple
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
    per_row = [[r.advantage for r in rollouts], [1.0] * len(rows) if weights is None else list(weights)]
    advantages, scale = torch.tensor(per_row, dtype=torch.float32, device=device)
    return PolicyBatch(tokens.to(device), labels.to(device), mask.to(device), logprobs.to(device), advantages, scale)
