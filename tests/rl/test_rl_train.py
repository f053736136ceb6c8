"""The RL stage as a whole, on tasks that a random model can learn."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import rl_workers
import torch
from safetensors.torch import load_file
from tiny_training import LLAMA, column, numbers, write_llama

from prism_nemo.checkpoint.convert import export_hf, import_hf
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
from prism_nemo.errors import InputError, PrismError, StoppedEarly
from prism_nemo.rl.store import read_rollouts, recorded_steps
from prism_nemo.rl.train import check
from prism_nemo.runtime.launch import launch

ROLLOUT = {"group_size": 8, "prompts_per_step": 4, "max_new_tokens": 6}
DP2 = ParallelConfig(data_parallel_size=2)
TP2 = ParallelConfig(tensor_model_parallel_size=2)
TP2_SP = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
PP2 = ParallelConfig(pipeline_model_parallel_size=2)


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


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All parameters, by way of an export."""
    with tempfile.TemporaryDirectory() as folder:
        export_hf(checkpoint, Path(folder) / "hf")
        return load_file(Path(folder) / "hf" / "model.safetensors")


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
        beta: _run(_equal_config(policy, root / str(beta), beta), rl_workers.train_on_cut_rollouts)
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
        (0.1, TP2_SP, 3),
        (0.0, PP2, 5),
        (0.1, PP2, 3),
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
    run, expected = _run(config, rl_workers.train_on_cut_rollouts), one_process[kl_beta]
    live = column(expected, "live_groups")
    assert {0.0, 0.5} <= set(live)
    assert column(run, "live_groups") == live
    assert column(run, "reward") == column(expected, "reward")
    # With a KL term every response has a gradient, without one only those of live groups.
    assert len(column(run, "grad_norm")) == (len(live) if kl_beta else sum(share > 0 for share in live))
    assert column(run, "grad_norm") == pytest.approx(column(expected, "grad_norm"), rel=5e-6)
    assert column(run, "kl") == pytest.approx(column(expected, "kl"), rel=5e-6, abs=1e-7)


def test_mini_batches_are_the_same_in_any_layout(policy: dict[str, str], tmp_path: Path) -> None:
    """As many updates, each from the same groups: every second question of one task can be solved by nobody."""

    def run(name: str, **changes: Any) -> Path:
        grpo = GRPOConfig(kl_beta=0.0, mini_batches=2)
        tasks, rollout = ["first-digit", "sometimes-digit"], {"group_size": 16}
        config = _config(policy, tmp_path / name, tasks=tasks, grpo=grpo, rollout=rollout, train_steps=3, **changes)
        return _run(config, rl_workers.train_on_cut_rollouts)

    one, two = run("one"), run("two", parallel=DP2)
    assert len(set(column(one, "live_groups"))) > 1
    assert max(column(one, "updates")) == 2
    assert column(two, "live_groups") == column(one, "live_groups")
    assert column(two, "updates") == column(one, "updates")
    assert column(two, "grad_norm") == pytest.approx(column(one, "grad_norm"), rel=1e-5)


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
    with pytest.raises(InputError, match=r"sampler and trainer disagree: .*gap \d.*They part at decoder\.layers\.0 "):
        _run(config, rl_workers.train_with_broken_sampler)
    assert find_latest(tmp_path / "run" / "checkpoints") is None


def test_a_broken_sampler_is_refused_also_when_the_first_batch_teaches_nothing(
    policy: dict[str, str], tmp_path: Path
) -> None:
    """All rewards of the first step are equal, so there is no update whose log-probabilities could be compared."""
    config = _config(policy, tmp_path / "run", tasks=["dead-at-first"], rollout={"max_new_tokens": 30})
    with pytest.raises(InputError, match="sampler and trainer disagree"):
        _run(config, rl_workers.train_with_broken_sampler)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": []}, r"tasks: name at least one"),
        ({"tasks": ["arithmetics"]}, r"tasks: 'arithmetics' is unknown; known: .*arithmetic"),
        ({"tasks": ["reasoning_gym:rubiks_cube"]}, r"rubiks_cube is not on the list"),
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
        ({"grpo": GRPOConfig(aggregation="mean")}, r"grpo\.aggregation: 'mean' is unknown; choose one of group"),
        ({"grpo": GRPOConfig(ratio="group")}, r"grpo\.ratio"),
        ({"grpo": GRPOConfig(kl_estimator="k4")}, r"grpo\.kl_estimator"),
        ({"grpo": GRPOConfig(clip_low=1.0)}, r"grpo\.clip_low"),
        ({"grpo": GRPOConfig(clip_high=float("nan"))}, r"grpo\.clip_high"),
        ({"grpo": GRPOConfig(importance_cap=0.5)}, r"grpo\.importance_cap"),
        ({"grpo": GRPOConfig(reference_alpha=0.0)}, r"grpo\.reference_alpha"),
        ({"grpo": GRPOConfig(reference_period=-1)}, r"grpo\.reference_period"),
        ({"grpo": GRPOConfig(mini_batches=5)}, r"grpo\.mini_batches: 5 is more than the 4 prompts"),
        ({"grpo": GRPOConfig(epochs=0)}, r"grpo\.epochs"),
        ({"grpo": GRPOConfig(max_sampling_rounds=0)}, r"grpo\.max_sampling_rounds"),
        ({"grpo": GRPOConfig(overlong_buffer=7)}, r"grpo\.overlong_buffer: 7 must be between 0 and .*6"),
        ({"control": "randomised"}, r"control: 'randomised' is unknown; choose one of none, random"),
        ({"control": "random", "control_rate": 1.0}, r"control_rate"),
        ({"keep_rollouts": "some"}, r"keep_rollouts"),
        ({"task_shares": "weights"}, r"task_shares: 'weights' is unknown"),
        ({"task_shares": "size"}, r"task_shares: size needs prompt files"),
        ({"init_from": "/nowhere"}, r"/nowhere: not a complete prism-nemo checkpoint"),
        ({"tokenizer": "/nowhere"}, r"/nowhere.*no such file"),
    ],
)
def test_what_cannot_work_is_refused(
    changes: dict[str, Any], message: str, policy: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        check(_config(policy, tmp_path / "run", **changes))


def test_a_task_that_is_named_twice_is_refused(
    policy: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("p.jsonl", "q.jsonl"):
        Path(name).write_text(json.dumps({"question": "1+1", "answer": "2", "reward": "exact"}) + "\n")
    Path("link.jsonl").symlink_to("p.jsonl")
    for again, first in (
        ("first-digit", "first-digit"),
        ("prompts:./p.jsonl", "prompts:p.jsonl"),
        (f"prompts:{tmp_path}/p.jsonl", "prompts:p.jsonl"),
        ("prompts:link.jsonl", "prompts:p.jsonl"),
    ):
        with pytest.raises(InputError, match=re.escape(f"tasks: '{again}' repeats '{first}'")):
            check(_config(policy, tmp_path / "run", tasks=["first-digit", "prompts:p.jsonl", again]))
    assert (
        len(check(_config(policy, tmp_path / "run", tasks=["first-digit", "prompts:p.jsonl", "prompts:q.jsonl"]))) == 3
    )


def test_a_tokenizer_larger_than_the_model_is_refused(policy: dict[str, str], tmp_path: Path) -> None:
    sizes = {**LLAMA, "vocab_size": 99, "num_hidden_layers": 1}
    hf = write_llama(tmp_path / "hf", **{k: v for k, v in sizes.items() if k not in ("architectures", "model_type")})
    import_hf(hf, tmp_path / "native", ParallelConfig())
    with pytest.raises(InputError, match="100 tokens, but the model has 99"):
        check(_config({**policy, "init_from": str(tmp_path / "native")}, tmp_path / "run"))
    assert [task.name for task in check(_config(policy, tmp_path / "run"))] == ["first-digit"]


SOFT = {"grpo": GRPOConfig(kl_beta=0.1, reference_period=2, reference_alpha=0.3), "train_steps": 6}


def test_the_reference_moves_towards_the_policy(policy: dict[str, str], tmp_path: Path) -> None:
    """After steps 2 and 4: ref <- 0.3 policy + 0.7 ref, by hand from the checkpoints of those steps."""
    run = _run(_config(policy, tmp_path / "run", **SOFT))
    expected = weights(Path(policy["init_from"]))
    for step in (2, 4, 6):
        trained = weights(step_directory(run / "checkpoints", step))
        expected = {name: 0.3 * trained[name] + 0.7 * value for name, value in expected.items()}
        found = weights(step_directory(run / "reference", step))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.allclose(found[name], value, atol=1e-6), (step, name)
    still = _run(_config(policy, tmp_path / "still", **{**SOFT, "grpo": GRPOConfig(kl_beta=0.1, reference_period=0)}))
    assert not list((still / "reference").glob("step_*"))
    kl, kept = column(run, "kl"), column(still, "kl")
    # Step 3 is the first that is held to a reference which has moved; it has moved towards the policy.
    assert kl[:2] == kept[:2]
    assert all(moved < stayed for moved, stayed in zip(kl[2:], kept[2:], strict=True))


def test_references_that_no_checkpoint_needs_are_removed(policy: dict[str, str], tmp_path: Path) -> None:
    """With updates after every step, and checkpoints after 2, 4 and 6 of which two are kept."""
    grpo = GRPOConfig(kl_beta=0.1, reference_period=1)
    checkpoint = CheckpointConfig(save_interval=2, keep=2, async_save=False)
    run = _run(_config(policy, tmp_path / "run", grpo=grpo, train_steps=8, checkpoint=checkpoint))
    assert sorted(path.name for path in (run / "reference").iterdir()) == [f"step_0000000{n}" for n in (6, 8)]


EXACT: dict[str, dict[str, Any]] = {
    "soft reference": {"grpo": GRPOConfig(kl_beta=0.1, reference_period=1, reference_alpha=0.5)},
    "mini-batches": {"grpo": GRPOConfig(kl_beta=0.0, mini_batches=2, epochs=2)},
    "dynamic sampling": {"grpo": GRPOConfig(kl_beta=0.0, dynamic_sampling=True), "tasks": ["sometimes-digit"]},
    "shuffled": {"grpo": GRPOConfig(kl_beta=0.0), "control": "shuffled"},
}


@pytest.mark.parametrize("name", EXACT)
def test_every_kind_of_run_continues_bit_for_bit(name: str, policy: dict[str, str], tmp_path: Path) -> None:
    undisturbed = _run(_config(policy, tmp_path / "undisturbed", **EXACT[name]))
    config = _config(policy, tmp_path / "run", max_seconds=0.0, **EXACT[name])
    for _ in range(3):
        with pytest.raises(StoppedEarly):
            _run(config)
    config.max_seconds = None
    run = _run(config)
    assert numbers(run) == numbers(undisturbed)
    for step in range(1, 6):
        assert read_rollouts(run, step) == read_rollouts(undisturbed, step)


def test_a_killed_run_repeats_its_rewards(policy: dict[str, str], tmp_path: Path) -> None:
    """SIGKILL somewhere after step 3; a checkpoint is due after every second step."""
    kind = EXACT["soft reference"]
    undisturbed = _run(_config(policy, tmp_path / "undisturbed", train_steps=8, **kind))
    config = _config(policy, tmp_path / "run", train_steps=8, **kind)
    with pytest.raises(PrismError, match="killed"):
        launch(rl_workers.train_and_be_killed, config, 5)
    assert 0 < len(recorded_steps(tmp_path / "run")) < 8
    run = _run(config)
    assert numbers(run) == numbers(undisturbed)
    for step in range(1, 9):
        assert read_rollouts(run, step) == read_rollouts(undisturbed, step)


def test_several_updates_from_one_batch(policy: dict[str, str], tmp_path: Path) -> None:
    """The first is on-policy; later ones have ratios away from 1, of which some are clipped at such a rate."""
    common: dict[str, Any] = {"rollout": {"prompts_per_step": 8}, "train_steps": 4}
    once = _run(_config(policy, tmp_path / "once", **common))
    grpo = GRPOConfig(kl_beta=0.0, mini_batches=2, epochs=3, clip_low=0.05, clip_high=0.05)
    often = _run(_config(policy, tmp_path / "often", grpo=grpo, **common))
    assert column(once, "updates") == [1] * 4
    assert column(often, "updates") == [6] * 4
    assert max(column(once, "clip_fraction")) == 0.0
    assert max(column(often, "clip_fraction")) > 0.01
    # The gap is that of sampler and trainer before the first update, whatever updates do.
    assert max(column(often, "logprob_gap")) < 1e-4
    assert column(once, "reward")[0] == column(often, "reward")[0]


@pytest.mark.parametrize("parallel", [DP2, TP2], ids=["DP2", "TP2"])
def test_dynamic_sampling_fills_the_step(parallel: ParallelConfig, policy: dict[str, str], tmp_path: Path) -> None:
    """Seven of ten questions teach nothing, so several rounds are needed; any layout draws the same prompts."""
    grpo = GRPOConfig(kl_beta=0.0, normalize_advantage=False, dynamic_sampling=True, max_sampling_rounds=20)
    common: dict[str, Any] = {
        "tasks": ["sometimes-digit"],
        "rollout": {"group_size": 16},
        "train_steps": 4,
        "grpo": grpo,
    }
    run = _run(_config(policy, tmp_path / "run", **common))
    rounds = column(run, "sampling_rounds")
    assert max(rounds) > 1
    advantages = [
        {n for n in {r["prompt_number"] for r in read_rollouts(run, step)} if _teaches(read_rollouts(run, step), n)}
        for step in (1, 2, 3, 4)
    ]
    assert all(len(found) >= 4 for found in advantages)
    assert column(run, "used_responses") == [4 * 16] * 4  # those beyond what was asked for are dropped
    other = _run(_config(policy, tmp_path / "other", parallel=parallel, **common))
    assert column(other, "sampling_rounds") == rounds
    assert column(other, "reward") == column(run, "reward")
    assert column(other, "grad_norm") == pytest.approx(column(run, "grad_norm"), rel=5e-6)


def _teaches(rollouts: list[dict[str, Any]], number: int) -> bool:
    return len({r["reward"] for r in rollouts if r["prompt_number"] == number}) > 1


def test_under_a_control_the_task_is_still_reported(policy: dict[str, str], tmp_path: Path) -> None:
    """Thirty steps teach first-digit completely; with random rewards the policy stays about where it was."""
    common: dict[str, Any] = {"train_steps": 30, "checkpoint": CheckpointConfig(save_interval=30)}
    run = _run(_config(policy, tmp_path / "run", control="random", **common))
    reward, control = column(run, "reward"), column(run, "control_reward")
    assert sum(control) / 30 == pytest.approx(0.5, abs=4 * 0.5 / (30 * 32) ** 0.5)
    assert sum(reward[-5:]) / 5 < 0.5
    lines = read_rollouts(run, 1)
    assert {line["score"] for line in lines} == {0.0, 1.0}
    assert [line["reward"] for line in lines] != [line["score"] for line in lines]


def test_length_shaping_reaches_the_update(policy: dict[str, str], tmp_path: Path) -> None:
    grpo = GRPOConfig(kl_beta=0.0, overlong_buffer=3, overlong_penalty=0.6)
    run = _run(_config(policy, tmp_path / "run", grpo=grpo, train_steps=1))
    for line in read_rollouts(run, 1):
        assert line["reward"] - line["score"] == pytest.approx(-0.2 * max(0, line["tokens"] - 3))
    shaped, plain = column(run, "shaped_reward")[0], column(run, "reward")[0]
    assert shaped < plain


def test_rollouts_need_not_be_kept(policy: dict[str, str], tmp_path: Path) -> None:
    run = _run(_config(policy, tmp_path / "run", train_steps=2, keep_rollouts="none"))
    assert not (run / "rollouts").exists()
    assert set(_samples(run).values()) == {1}


@pytest.mark.parametrize("aggregation", ["group", "sequence", "constant"])
def test_what_the_gradient_is_divided_by(aggregation: str, policy: dict[str, str], tmp_path: Path) -> None:
    """One step from the same rollouts of one token each, where every divisor follows from that of `token` by hand."""
    common: dict[str, Any] = {"train_steps": 1, "micro_batch_size": 5, "optimizer": OptimizerConfig(lr=1e-2)}
    norms = {}
    for name in ("token", aggregation):
        grpo = GRPOConfig(kl_beta=0.0, normalize_advantage=False, aggregation=name)
        run = _run(_config(policy, tmp_path / name, grpo=grpo, **common), rl_workers.train_on_single_tokens)
        norms[name] = column(run, "grad_norm")[0]
    # Of n used responses each weighs 1/n by token, group and sequence; by constant 1/(6 n), as 6 tokens are allowed.
    factor = {"group": 1.0, "sequence": 1.0, "constant": 1 / 6}[aggregation]
    assert norms[aggregation] == pytest.approx(factor * norms["token"], rel=1e-5)


def test_aggregations_differ_where_lengths_differ(policy: dict[str, str], tmp_path: Path) -> None:
    norms = set()
    for name in ("token", "group", "sequence"):
        grpo = GRPOConfig(kl_beta=0.0, normalize_advantage=False, aggregation=name)
        run = _run(_config(policy, tmp_path / name, grpo=grpo, train_steps=1), rl_workers.train_on_cut_rollouts)
        norms.add(round(column(run, "grad_norm")[0], 6))
    assert len(norms) == 3


def test_a_response_without_a_verdict_is_left_out(policy: dict[str, str], tmp_path: Path) -> None:
    """Its reward becomes the mean of the others in its group, so nothing is learned from it; and it is counted."""
    run = _run(_config(policy, tmp_path / "run", tasks=["sometimes-raises"], train_steps=2))
    failed = [line["failed_verdicts"] for line in numbers(run)]
    assert all(set(counts) == {"raised ZeroDivisionError"} for counts in failed)
    for step in (1, 2):
        lines = read_rollouts(run, step)
        assert sum("failure" in line for line in lines) == failed[step - 1]["raised ZeroDivisionError"]
        for first in range(0, len(lines), 8):
            group = lines[first : first + 8]
            judged = [line["reward"] for line in group if "failure" not in line]
            for line in group:
                if "failure" in line:
                    assert line["reward"] == pytest.approx(sum(judged) / len(judged))
                    assert abs(line["advantage"]) < 1e-6
