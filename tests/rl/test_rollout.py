"""Prompts, grouping, and responses as tensors."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from tiny_training import character_tokenizer

from prism_nemo.config import RolloutConfig
from prism_nemo.data.tokenizer import Tokenizer
from prism_nemo.generation.sampling import Response
from prism_nemo.rl import rollout as module
from prism_nemo.rl.rewards.task import Problem, Score, split_of, task_named
from prism_nemo.rl.rollout import Rollout, collate, draw_prompts, roll_out

TASKS = [task_named(name) for name in ("arithmetic", "lists", "formulas")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return character_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_prompts_are_a_function_of_seed_and_step() -> None:
    """Whatever was drawn before: a resumed run has drawn nothing."""
    first = draw_prompts(TASKS, 12, step=5, seed=1)
    random.seed(0)
    for step in range(5):
        draw_prompts(TASKS, 12, step, seed=1)
    assert draw_prompts(TASKS, 12, step=5, seed=1) == first
    assert draw_prompts(TASKS, 12, step=6, seed=1) != first
    assert draw_prompts(TASKS, 12, step=5, seed=2) != first


def test_prompts_of_reasoning_gym_are_a_function_of_seed_and_step() -> None:
    """Its problems come in chunks that an object keeps; the chunk of another step must not leak into this one."""
    tasks = [task_named("reasoning_gym:chain_sum"), task_named("reasoning_gym:gcd")]
    first = draw_prompts(tasks, 6, step=3, seed=1)
    draw_prompts(tasks, 7, step=2, seed=1)
    assert draw_prompts(tasks, 6, step=3, seed=1) == first
    assert draw_prompts(tasks, 6, step=4, seed=1) != first


def test_prompts_are_of_the_training_split_and_shared_evenly() -> None:
    """Seven a step over three tasks: the task that goes first moves, so that all have their turn."""
    counts = dict.fromkeys((task.name for task in TASKS), 0)
    for step in range(60):
        problems = draw_prompts(TASKS, 7, step, seed=3)
        assert {split_of(p.question) for p in problems} == {"train"}
        for problem in problems:
            counts[problem.task] += 1
    assert sum(counts.values()) == 420
    assert max(counts.values()) - min(counts.values()) <= 1


def test_groups_stand_together_and_are_scored_with_their_own_problem(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A generator that answers the first half of each group rightly and the second half with its neighbour's answer."""
    problems = draw_prompts(TASKS, 6, step=0, seed=0)
    asked: dict[str, Any] = {}

    def generate(model: Any, prompts: list[list[int]], *, samples_per_prompt: int, **options: Any) -> list[Response]:
        asked.update(options, prompts=prompts)
        responses = []
        for i, prompt in enumerate(prompts):
            for k in range(samples_per_prompt):
                problem = problems[i if k < samples_per_prompt // 2 else (i + 1) % len(problems)]
                ids = [*tokenizer.encode(problem.document[len(problem.prompt) :]), tokenizer.eos_id]
                responses.append(Response(prompt, ids, [-0.1] * len(ids), True))
        return responses

    monkeypatch.setattr(module, "generate", generate)
    model: Any = torch.nn.Linear(1, 1)
    config = RolloutConfig(group_size=4, max_new_tokens=33, temperature=0.7, top_p=0.9)
    rollouts = roll_out(model, problems, {t.name: t for t in TASKS}, tokenizer, config, seed=9)
    assert [r.problem for r in rollouts] == [p for p in problems for _ in range(4)]
    assert [tokenizer.decode(prompt) for prompt in asked["prompts"]] == [p.prompt for p in problems]
    assert (asked["max_new_tokens"], asked["temperature"], asked["top_p"]) == (33, 0.7, 0.9)
    assert asked["stop_id"] == tokenizer.eos_id
    assert asked["generator"].initial_seed() == 9
    wanted = []
    for i, problem in enumerate(problems):
        wanted += [1.0, 1.0] + [float(problems[(i + 1) % len(problems)].answer == problem.answer)] * 2
    assert [r.score.reward for r in rollouts] == wanted
    assert 0.0 in wanted


def _rollout(prompt: list[int], tokens: list[int]) -> Rollout:
    logprobs = [-(i + 1) / 10 for i in range(len(tokens))]
    return Rollout(Problem("t", "q", "", "a"), Response(prompt, tokens, logprobs, True), Score(0.0, True, None))


def test_collate_by_hand() -> None:
    """Position i of the mask asks for the log-probability of label i, which is token i + 1 of the sequence."""
    batch = collate([_rollout([5, 6, 7], [8, 9]), _rollout([4], [3])], [0.5, -0.5], 0, torch.device("cpu"))
    assert batch.tokens.tolist() == [[5, 6, 7, 8], [4, 0, 0, 0]]
    assert batch.labels.tolist() == [[6, 7, 8, 9], [3, 0, 0, 0]]
    assert batch.mask.tolist() == [[0, 0, 1, 1], [1, 0, 0, 0]]
    assert batch.sampler_logprobs[0].tolist() == pytest.approx([0, 0, -0.1, -0.2])
    assert batch.sampler_logprobs[1].tolist() == pytest.approx([-0.1, 0, 0, 0])
    assert batch.advantages.tolist() == [0.5, -0.5]


def test_collate_masks_exactly_the_response_tokens() -> None:
    rng = random.Random(1)
    rollouts = [
        _rollout([rng.randint(4, 99) for _ in range(rng.randint(1, 9))], [rng.randint(1, 99) for _ in range(n)])
        for n in (1, 7, 3, 12, 5)
    ]
    for length in (None, 40):
        batch = collate(rollouts, [0.0] * 5, 0, torch.device("cpu"), length)
        assert batch.tokens.shape[1] == (
            length or max(len(r.response.prompt + r.response.tokens) for r in rollouts) - 1
        )
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
    for problem in draw_prompts(TASKS, 9, step=1, seed=1):
        ids = tokenizer.encode(problem.prompt)
        assert tokenizer.decode(ids) == problem.prompt
        assert ids.count(2) == 1
