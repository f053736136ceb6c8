"""The RL stage as a whole, on tasks that a random model can learn."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import rl_workers
from tiny_training import LLAMA, character_tokenizer, column, numbers, write_llama

from prism_nemo.checkpoint.convert import import_hf
from prism_nemo.checkpoint.native import find_latest, step_directory
from prism_nemo.config import (
    CheckpointConfig,
    GRPOConfig,
    OptimizerConfig,
    ParallelConfig,
    RecomputeConfig,
    RLConfig,
    RolloutConfig,
    ScheduleConfig,
)
from prism_nemo.errors import InputError, StoppedEarly
from prism_nemo.rl.train import check
from prism_nemo.runtime.launch import launch

ROLLOUT = {"group_size": 8, "prompts_per_step": 4, "max_new_tokens": 6}
DP2 = ParallelConfig(data_parallel_size=2)
TP2 = ParallelConfig(tensor_model_parallel_size=2)


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A random model with a vocabulary of 101 for 100 characters, and its tokenizer."""
    root = tmp_path_factory.mktemp("policy")
    character_tokenizer(root / "tokenizer")
    sizes = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    import_hf(write_llama(root / "hf", seed=3, std=0.1, **sizes), root / "native", ParallelConfig())
    return {"init_from": str(root / "native"), "tokenizer": str(root / "tokenizer")}


def _config(policy: dict[str, str], run_dir: Path, **changes: Any) -> RLConfig:
    values: dict[str, Any] = {
        "run_dir": str(run_dir),
        "tasks": ["first-digit"],
        "rollout": RolloutConfig(**{**ROLLOUT, **changes.pop("rollout", {})}),
        "grpo": GRPOConfig(kl_beta=0.0, normalize_advantage=False),
        # eps 1e-4: see tests/training/tiny_training.py
        "optimizer": OptimizerConfig(lr=1e-2, weight_decay=0.0, adam_eps=1e-4),
        "schedule": ScheduleConfig(lr_warmup_steps=0, decay="constant"),
        "checkpoint": CheckpointConfig(save_interval=2, keep=10),
        "train_steps": 5,
        "micro_batch_size": 8,
        **policy,
        **changes,
    }
    return RLConfig(**values)


def _run(config: RLConfig, worker: Any = rl_workers.train) -> Path:
    launch(worker, config, processes=config.parallel.world_size)
    return Path(config.run_dir)


def _samples(run_dir: Path) -> Counter[tuple[int, str]]:
    lines = [json.loads(line) for line in (run_dir / "rollouts.jsonl").read_text().splitlines()]
    return Counter((line["step"], line["task"]) for line in lines)


def test_reward_rises_and_the_sampler_is_the_policy(policy: dict[str, str], tmp_path: Path) -> None:
    """From one in ten to nearly always, in thirty steps of 32 responses."""
    run = _run(_config(policy, tmp_path / "run", train_steps=30, checkpoint=CheckpointConfig(save_interval=30)))
    rewards = column(run, "reward")
    assert len(rewards) == 30
    assert sum(rewards[:3]) / 3 < 0.3
    assert sum(rewards[-5:]) / 5 > 0.8
    # fp32 rounding is 1e-6 a token.
    assert max(column(run, "logprob_gap")) < 1e-4
    assert column(run, "entropy")[-1] < column(run, "entropy")[0]
    last = numbers(run)[-1]
    assert last["reward_by_task"] == {"first-digit": last["reward"]}
    assert 0.0 <= last["live_groups"] <= 1.0


@pytest.fixture(scope="session")
def one_process(policy: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    """Per KL coefficient, eight steps in one process and micro-batches of 8."""
    root = tmp_path_factory.mktemp("equal")
    return {
        beta: _run(_equal_config(policy, root / str(beta), beta), rl_workers.train_on_equal_rollouts)
        for beta in (0.0, 0.1)
    }


def _equal_config(policy: dict[str, str], run_dir: Path, kl_beta: float, **changes: Any) -> RLConfig:
    return _config(
        policy,
        run_dir,
        tasks=["sometimes-digit"],
        grpo=GRPOConfig(kl_beta=kl_beta, normalize_advantage=True),
        rollout={"prompts_per_step": 2, "group_size": 16},
        train_steps=8,
        **changes,
    )


@pytest.mark.parametrize(
    ("kl_beta", "parallel", "micro_batch_size"),
    [
        (0.0, ParallelConfig(), 5),
        (0.0, ParallelConfig(), 64),
        (0.0, DP2, 8),
        (0.0, DP2, 3),
        (0.1, ParallelConfig(), 1),
        (0.1, DP2, 3),
        (0.1, TP2, 8),
    ],
    ids=lambda value: value.describe() if isinstance(value, ParallelConfig) else str(value),
)
def test_the_update_does_not_depend_on_how_responses_are_dealt(
    kl_beta: float,
    parallel: ParallelConfig,
    micro_batch_size: int,
    policy: dict[str, str],
    one_process: dict[float, Path],
    tmp_path: Path,
) -> None:
    """The loss is divided by the response tokens of the whole batch.

    Every step continues from the update before, so one wrong gradient shows in all later numbers. With two ranks there
    are steps in which only one of them has a group to learn from, and steps in which none has.
    """
    config = _equal_config(policy, tmp_path / "run", kl_beta, parallel=parallel, micro_batch_size=micro_batch_size)
    run, expected = _run(config, rl_workers.train_on_equal_rollouts), one_process[kl_beta]
    live = column(expected, "live_groups")
    assert {0.0, 0.5} <= set(live)
    assert column(run, "live_groups") == live
    assert column(run, "reward") == column(expected, "reward")
    # With a KL term every response has a gradient, without one only those of live groups.
    assert len(column(run, "grad_norm")) == (len(live) if kl_beta else sum(share > 0 for share in live))
    assert column(run, "grad_norm") == pytest.approx(column(expected, "grad_norm"), rel=5e-6)
    assert column(run, "kl") == pytest.approx(column(expected, "kl"), rel=5e-6, abs=1e-7)


def test_kl_is_to_the_starting_policy(one_process: dict[float, Path]) -> None:
    kl = column(one_process[0.1], "kl")
    assert abs(kl[0]) < 1e-9
    assert min(kl[1:]) > 1e-6
    assert column(one_process[0.0], "kl") == []


@pytest.mark.parametrize("parallel", [ParallelConfig(), DP2], ids=["TP1", "DP2"])
def test_stopped_runs_continue_bit_for_bit(parallel: ParallelConfig, policy: dict[str, str], tmp_path: Path) -> None:
    """Every number of every step; with a reference policy, which is the starting point and not the last checkpoint."""
    common = {
        "parallel": parallel,
        "grpo": GRPOConfig(kl_beta=0.05),
        "schedule": ScheduleConfig(lr_warmup_steps=2, decay="linear", min_lr_ratio=0.1),
    }
    undisturbed = _run(_config(policy, tmp_path / "undisturbed", **common))
    config = _config(policy, tmp_path / "run", max_seconds=0.0, **common)
    for step in (1, 2, 3):
        with pytest.raises(StoppedEarly, match=f"stopped at step {step} of 5 .*time limit"):
            _run(config)
    config.max_seconds = None
    run = _run(config)
    assert numbers(run) == numbers(undisturbed)
    assert [line["step"] for line in numbers(run)] == [1, 2, 3, 4, 5]
    assert (run / "rollouts.jsonl").read_text() == (undisturbed / "rollouts.jsonl").read_text()


def test_repeated_steps_are_recorded_once(policy: dict[str, str], tmp_path: Path) -> None:
    """The newest checkpoint is damaged, so steps 3 and 4 are done again, with the same responses."""
    config = _config(policy, tmp_path / "run", train_steps=4)
    run = _run(config)
    before, samples = numbers(run), (run / "rollouts.jsonl").read_text()
    damaged = step_directory(run / "checkpoints", 4)
    file = max(damaged.iterdir(), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size - 1)
    _run(config)
    assert numbers(run) == before
    assert find_latest(run / "checkpoints") == damaged
    assert set(_samples(run).values()) == {1}
    assert (run / "rollouts.jsonl").read_text() == samples


def test_starting_a_finished_run_again_changes_nothing(policy: dict[str, str], tmp_path: Path) -> None:
    config = _config(policy, tmp_path / "run", train_steps=1)
    first = launch(rl_workers.train, config)
    again = launch(rl_workers.train, config)
    assert again == first
    assert again["reward"] == again["reward"]  # not NaN


def test_a_sampler_that_is_not_the_policy_is_refused(policy: dict[str, str], tmp_path: Path) -> None:
    config = _config(policy, tmp_path / "run", rollout={"max_new_tokens": 30})
    with pytest.raises(InputError, match=r"sampler and trainer disagree: mean log-probability gap \d"):
        _run(config, rl_workers.train_with_broken_sampler)
    assert find_latest(tmp_path / "run" / "checkpoints") is None


def test_a_broken_sampler_is_refused_also_when_the_first_batch_teaches_nothing(
    policy: dict[str, str], tmp_path: Path
) -> None:
    """All rewards of the first step are equal, so there is no update whose log-probabilities could be compared."""
    config = _config(policy, tmp_path / "run", tasks=["dead-at-first"], rollout={"max_new_tokens": 30})
    with pytest.raises(InputError, match="sampler and trainer disagree"):
        _run(config, rl_workers.train_with_broken_sampler)


def test_sequence_parallel_is_refused(policy: dict[str, str], tmp_path: Path) -> None:
    """It needs every length to be a multiple of the tensor-parallel size, and responses have any length."""
    config = _config(policy, tmp_path / "run", parallel=ParallelConfig(2, sequence_parallel=True), train_steps=2)
    with pytest.raises(InputError, match="sequence_parallel"):
        check(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": []}, r"tasks: name at least one"),
        ({"tasks": ["arithmetics"]}, r"tasks: 'arithmetics' is unknown; known: .*arithmetic"),
        ({"tasks": ["reasoning_gym:rubiks_cube"]}, r"rubiks_cube is not on the list"),
        ({"parallel": ParallelConfig(pipeline_model_parallel_size=2)}, r"pipeline_model_parallel_size: .*need 1"),
        ({"parallel": ParallelConfig(context_parallel_size=2)}, r"context_parallel_size.*RL runs with 1"),
        ({"parallel": ParallelConfig(overlap_grad_reduce=True)}, r"overlap_grad_reduce.*without overlap"),
        ({"recompute": RecomputeConfig("ful")}, r"recompute\.granularity: 'ful' is unknown"),
        ({"parallel": ParallelConfig(tensor_model_parallel_size=3)}, r"tensor_model_parallel_size 3 does not divide"),
        ({"parallel": ParallelConfig(data_parallel_size=3)}, r"prompts_per_step 4 is not a multiple of.*3"),
        ({"rollout": {"group_size": 1}}, r"rollout\.group_size"),
        ({"rollout": {"temperature": 0.0}}, r"rollout\.temperature"),
        ({"rollout": {"top_p": 0.0}}, r"rollout\.top_p"),
        ({"rollout": {"top_p": 1.5}}, r"rollout\.top_p"),
        ({"rollout": {"top_p": 0.9}}, r"samples of the policy itself"),
        ({"rollout": {"temperature": 0.7}}, r"samples of the policy itself"),
        ({"rollout": {"max_new_tokens": 64}}, r"max_new_tokens 64 leaves no room"),
        ({"rollout": {"prompts_per_step": 0}}, r"rollout\.prompts_per_step"),
        ({"rollout": {"max_new_tokens": 0}}, r"rollout\.max_new_tokens"),
        ({"schedule": ScheduleConfig(decay="cosin")}, r"schedule\.decay"),
        ({"micro_batch_size": 0}, r"micro_batch_size"),
        ({"train_steps": 0}, r"train_steps"),
        ({"log_interval": 0}, r"log_interval"),
        ({"checkpoint": CheckpointConfig(save_interval=0)}, r"save_interval"),
        ({"grpo": GRPOConfig(kl_beta=-0.1)}, r"grpo\.kl_beta"),
        ({"init_from": "/nowhere"}, r"/nowhere: not a complete prism-nemo checkpoint"),
        ({"tokenizer": "/nowhere"}, r"/nowhere.*no such file"),
    ],
)
def test_what_cannot_work_is_refused(
    changes: dict[str, Any], message: str, policy: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        check(_config(policy, tmp_path / "run", **changes))


def test_a_tokenizer_larger_than_the_model_is_refused(policy: dict[str, str], tmp_path: Path) -> None:
    sizes = {**LLAMA, "vocab_size": 99, "num_hidden_layers": 1}
    hf = write_llama(tmp_path / "hf", **{k: v for k, v in sizes.items() if k not in ("architectures", "model_type")})
    import_hf(hf, tmp_path / "native", ParallelConfig())
    with pytest.raises(InputError, match="100 tokens, but the model has 99"):
        check(_config({**policy, "init_from": str(tmp_path / "native")}, tmp_path / "run"))
    assert [task.name for task in check(_config(policy, tmp_path / "run"))] == ["first-digit"]
