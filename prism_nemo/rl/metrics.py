"""What an RL step reports: sums over ranks, one line of metrics, and responses that a person can read."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import torch

from prism_nemo.checkpoint.native import TrainState
from prism_nemo.rl.grpo import live_groups
from prism_nemo.rl.rollout import Rollout
from prism_nemo.run import RunDirectory
from prism_nemo.runtime import gather


def sum_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """Sum over data-parallel ranks."""
    total: dict[str, float] = defaultdict(float)
    for part in gather(values):
        for name, value in part.items():
            total[name] += value
    return total


def summarise(rollouts: list[Rollout], group_size: int) -> dict[str, float]:
    """Sums over this rank's rollouts; `sum_over_ranks` and division give the means."""
    rewards = torch.tensor([r.score.reward for r in rollouts])
    sums: dict[str, float] = defaultdict(float)
    sums.update(
        responses=len(rollouts),
        reward=float(rewards.sum()),
        response_tokens=sum(len(r.response.tokens) for r in rollouts),
        well_formed=sum(r.score.well_formed for r in rollouts),
        negative_logprob=-sum(sum(r.response.logprobs) for r in rollouts),
        groups=len(rollouts) // group_size,
        live=float(live_groups(rewards, group_size).sum()),
    )
    for rollout in rollouts:
        sums[f"count/{rollout.problem.task}"] += 1
        sums[f"reward/{rollout.problem.task}"] += rollout.score.reward
    return dict(sums)


def keep_samples(run: RunDirectory, step: int, rollouts: list[Rollout], tokenizer: Any) -> None:
    """The first response of each task, readable."""
    if not run.writes:
        return
    seen = set()
    with run.rollouts_path.open("a") as file:
        for r in rollouts:
            if r.problem.task in seen:
                continue
            seen.add(r.problem.task)
            line = {
                "step": step, "task": r.problem.task, "prompt": r.problem.prompt,
                "response": tokenizer.decode(r.response.tokens), "answer": r.problem.answer, "reward": r.score.reward,
            }  # fmt: skip
            file.write(json.dumps(line) + "\n")


def metrics_line(
    state: TrainState, means: dict[str, float], result: Any, lr: float, sampling: float, seconds: float
) -> dict[str, Any]:
    """One line of metrics. ``entropy`` is the sampled estimate: mean of -log p over the response tokens."""
    counts = {name[6:]: n for name, n in means.items() if name.startswith("count/")}
    line: dict[str, Any] = {
        "step": state.step,
        "reward": means["reward"] / means["responses"],
        "reward_by_task": {task: means[f"reward/{task}"] / n for task, n in counts.items()},
        "well_formed": means["well_formed"] / means["responses"],
        "response_length": means["response_tokens"] / means["responses"],
        "entropy": means["negative_logprob"] / means["response_tokens"],
        "live_groups": means["live"] / means["groups"],
        "lr": lr,
        "tokens_per_second": means["response_tokens"] / seconds,
        "sampling_seconds": sampling,
        "seconds": state.seconds,
    }
    if result is not None and result.skipped is None:
        tokens = result.sums["tokens"]
        line["grad_norm"] = result.grad_norm
        line["logprob_gap"] = result.sums["logprob_gap"] / tokens
        if "kl" in result.sums:
            line["kl"] = result.sums["kl"] / tokens
    return line
