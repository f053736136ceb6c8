"""Which responses take part in an update."""

import torch

from prism_nemo.config import GRPOConfig, RLConfig
from prism_nemo.generation.sampling import Response
from prism_nemo.rl.rewards.task import Problem, Score
from prism_nemo.rl.rollout import Rollout
from prism_nemo.rl.train import _micro_batches

PROBLEM = Problem("t", "q", "", "a")


def _rows(kl_beta: float) -> int:
    rollouts = [
        Rollout(PROBLEM, Response([1, 2], [3] * n, [-0.5] * n, True), Score(1.0, True, "a")) for n in (1, 4, 2, 3)
    ]
    config = RLConfig(micro_batch_size=3, grpo=GRPOConfig(kl_beta=kl_beta))
    batches = _micro_batches(rollouts, [0.5, 0.0, -0.5, 0.0], config, 0, torch.device("cpu"))
    return sum(len(batch.advantages) for batch in batches)


def test_without_kl_only_responses_with_an_advantage_are_trained_on() -> None:
    assert _rows(kl_beta=0.0) == 2


def test_with_kl_every_response_is_held_to_the_reference() -> None:
    assert _rows(kl_beta=0.1) == 4
