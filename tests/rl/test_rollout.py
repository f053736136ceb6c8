"""Grouping, scoring, and responses as tensors."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_training import character_tokenizer

from prism_nemo.config import RewardConfig, RolloutConfig
from prism_nemo.data.tokenizer import Tokenizer
from prism_nemo.generation.requests import Request, Response, request_seed
from prism_nemo.rl.prompts import PromptStream
from prism_nemo.rl.rewards.judge import Judge
from prism_nemo.rl.rewards.task import Problem, Score, task_named
from prism_nemo.rl.rollout import Rollout, collate, roll_out

TASKS = [task_named(name) for name in ("arithmetic", "lists", "formulas")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return character_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def judge() -> Iterator[Judge]:
    with Judge(RewardConfig(), {t.name: t for t in TASKS}, 40) as judge:
        yield judge


class HalfRight:
    """Answers the first half of each group rightly and the second half with its neighbour's answer."""

    def __init__(self, problems: list[Problem], tokenizer: Tokenizer) -> None:
        self.problems, self.tokenizer = problems, tokenizer
        self.asked: list[Request] = []

    def generate(self, requests: list[Request]) -> list[Response]:
        self.asked = requests
        size = len(requests) // len(self.problems)
        responses = []
        for i, request in enumerate(requests):
            n, k = divmod(i, size)
            problem = self.problems[n if k < size // 2 else (n + 1) % len(self.problems)]
            ids = [*self.tokenizer.encode(problem.document[len(problem.prompt) :]), self.tokenizer.eos_id]
            responses.append(Response(request.prompt, ids, [-0.1] * len(ids), True))
        return responses


def test_groups_stand_together_and_are_scored_with_their_own_problem(tokenizer: Tokenizer, judge: Judge) -> None:
    problems = PromptStream(TASKS, seed=0).take(0, 6)
    engine: Any = HalfRight(problems, tokenizer)
    config = RolloutConfig(group_size=4, max_new_tokens=33, temperature=0.7, top_p=0.9)
    rollouts = roll_out(engine, list(enumerate(problems, 12)), judge, tokenizer, config, seed=9)
    assert [r.problem for r in rollouts] == [p for p in problems for _ in range(4)]
    assert [r.number for r in rollouts] == [12 + i for i in range(6) for _ in range(4)]
    assert [tokenizer.decode(r.prompt) for r in engine.asked] == [p.prompt for p in problems for _ in range(4)]
    settings = {(r.sampling.max_new_tokens, r.sampling.temperature, r.sampling.top_p) for r in engine.asked}
    assert settings == {(33, 0.7, 0.9)}
    assert {tuple(r.sampling.stop_ids) for r in engine.asked} == {(tokenizer.eos_id,)}
    assert [r.sampling.seed for r in engine.asked] == [request_seed(9, 12 + i, k) for i in range(6) for k in range(4)]
    wanted = []
    for i, problem in enumerate(problems):
        wanted += [1.0, 1.0] + [float(problems[(i + 1) % len(problems)].answer == problem.answer)] * 2
    assert [r.score.reward for r in rollouts] == wanted
    assert [r.reward for r in rollouts] == wanted
    assert 0.0 in wanted


def test_every_response_of_a_run_has_its_own_seed() -> None:
    seeds = {request_seed(s, n, k) for s in (0, 1) for n in range(50) for k in range(16)}
    assert len(seeds) == 1600
    assert all(0 <= seed < 2**64 for seed in seeds)


def _rollout(prompt: list[int], tokens: list[int], advantage: float = 0.0) -> Rollout:
    logprobs = [-(i + 1) / 10 for i in range(len(tokens))]
    score = Score(0.0, True, None)
    return Rollout(Problem("t", "q", "", "a"), Response(prompt, tokens, logprobs, True), score, advantage=advantage)


def test_collate_by_hand() -> None:
    """Position i of the mask asks for the log-probability of label i, which is token i + 1 of the sequence."""
    rollouts = [_rollout([5, 6, 7], [8, 9], 0.5), _rollout([4], [3], -0.5)]
    batch = collate(rollouts, 0, torch.device("cpu"), [2.0, 0.25])
    assert batch.tokens.tolist() == [[5, 6, 7, 8], [4, 0, 0, 0]]
    assert batch.labels.tolist() == [[6, 7, 8, 9], [3, 0, 0, 0]]
    assert batch.mask.tolist() == [[0, 0, 1, 1], [1, 0, 0, 0]]
    assert batch.sampler_logprobs[0].tolist() == pytest.approx([0, 0, -0.1, -0.2])
    assert batch.sampler_logprobs[1].tolist() == pytest.approx([-0.1, 0, 0, 0])
    assert batch.advantages.tolist() == [0.5, -0.5]
    assert batch.weights.tolist() == [2.0, 0.25]
    assert collate(rollouts, 0, torch.device("cpu")).weights.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("multiple", [1, 4])
def test_collate_masks_exactly_the_response_tokens(multiple: int) -> None:
    rng = random.Random(1)
    rollouts = [
        _rollout([rng.randint(4, 99) for _ in range(rng.randint(1, 9))], [rng.randint(1, 99) for _ in range(n)])
        for n in (1, 7, 3, 12, 5)
    ]
    batch = collate(rollouts, 0, torch.device("cpu"), multiple=multiple)
    longest = max(len(r.response.prompt + r.response.tokens) for r in rollouts) - 1
    assert batch.tokens.shape[1] == -(-longest // multiple) * multiple
    for row, r in enumerate(rollouts):
        inside = batch.mask[row].bool()
        assert batch.labels[row][inside].tolist() == r.response.tokens
        assert batch.sampler_logprobs[row][inside].tolist() == pytest.approx(r.response.logprobs)
        assert not batch.sampler_logprobs[row][~inside].any()
        # The token that the model reads at a position is the label of the position before.
        whole = r.response.prompt + r.response.tokens
        assert batch.tokens[row, : len(whole) - 1].tolist() == whole[:-1]
        assert batch.labels[row, : len(whole) - 1].tolist() == whole[1:]


def test_prompts_survive_the_tokenizer(tokenizer: Tokenizer) -> None:
    """The thinking mark is one token, and what is encoded is what is decoded."""
    for problem in PromptStream(TASKS, seed=1).take(0, 9):
        ids = tokenizer.encode(problem.prompt)
        assert tokenizer.decode(ids) == problem.prompt
        assert ids.count(2) == 1
