"""What an RL step reports: sums over ranks, one line of metrics, and responses that a person can read."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import torch

from prism_nemo.checkpoint.native import TrainState
from prism_nemo.rl.collect import Collected
from prism_nemo.rl.grpo import live_groups
from prism_nemo.rl.rollout import Rollout
from prism_nemo.rl.store import record
from prism_nemo.run import RunDirectory


def summarise(collected: Collected, group_size: int) -> dict[str, float]:
    """Sums over this rank's rollouts; summing over ranks and dividing give the means."""
    rollouts = collected.sampled
    rewards = torch.tensor([r.reward for r in rollouts])
    live = live_groups(rewards, group_size)
    scores = torch.tensor([r.score.reward for r in rollouts])
    sums: dict[str, float] = defaultdict(float)
    sums.update(
        responses=len(rollouts),
        reward=float(rewards.sum()),
        score=float(scores.sum()),
        response_tokens=sum(len(r.response.tokens) for r in rollouts),
        well_formed=sum(r.score.well_formed for r in rollouts),
        finished=sum(r.response.finished for r in rollouts),
        negative_logprob=-sum(sum(r.response.logprobs) for r in rollouts),
        groups=len(rollouts) // group_size,
        live=float(live.sum()),
        # Groups that teach nothing, by whether all responses were right or none was.
        solved=float((~live & (rewards.view(-1, group_size)[:, 0] > 0.5)).sum()),
        used=len(collected.used),
    )
    for rollout in rollouts:
        sums[f"count/{rollout.problem.task}"] += 1
        sums[f"reward/{rollout.problem.task}"] += rollout.score.reward
        for name, value in rollout.score.penalties.items():
            sums[f"penalty/{name}"] += value
    for kind, count in collected.failures.items():
        sums[f"failed/{kind}"] += count
    return dict(sums)


def keep_samples(run: RunDirectory, step: int, rollouts: list[Rollout]) -> None:
    """The first response of each task, readable."""
    if not run.writes:
        return
    seen = set()
    with run.rollouts_path.open("a") as file:
        for i, r in enumerate(rollouts):
            if r.problem.task not in seen:
                seen.add(r.problem.task)
                file.write(json.dumps(record(step, i, r)) + "\n")


def metrics_line(
    state: TrainState,
    means: dict[str, float],
    update: dict[str, float],
    lr: float,
    clock: dict[str, float],
    control: str,
) -> dict[str, Any]:
    """One line of metrics.

    ``reward`` is what the task gave; under a control, what the update used is ``control_reward``. ``entropy`` is the
    sampled estimate: mean of -log p over the response tokens.

    Args:
        state: After the step.
        means: Sums over ranks of `summarise`.
        update: Of the step's updates; empty if there was none.
        lr: Learning rate.
        clock: Seconds by part of the step.
        control: Which control is on.
    """
    n = means["responses"]
    counts = {name[6:]: count for name, count in means.items() if name.startswith("count/")}
    line: dict[str, Any] = {
        "step": state.step,
        "reward": means["score"] / n,
        "reward_by_task": {task: means[f"reward/{task}"] / count for task, count in counts.items()},
        "well_formed": means["well_formed"] / n,
        "finished": means["finished"] / n,
        "response_length": means["response_tokens"] / n,
        "entropy": means["negative_logprob"] / max(1.0, means["response_tokens"]),
        "live_groups": means["live"] / means["groups"],
        "used_responses": int(means["used"]),
        "solved_groups": means["solved"] / means["groups"],
        "lr": lr,
        "tokens_per_second": means["response_tokens"] / clock["step_seconds"],
        **clock,
        "seconds": state.seconds,
        **update,
    }
    if control != "none":
        line["control_reward"] = means["reward"] / n
    elif means["reward"] != means["score"]:
        line["shaped_reward"] = means["reward"] / n
    penalties = {name[8:]: total / n for name, total in means.items() if name.startswith("penalty/")}
    if penalties:
        line["penalties"] = penalties
    failed = {name[7:]: int(count) for name, count in means.items() if name.startswith("failed/")}
    if failed:
        line["failed_verdicts"] = failed
    return line
