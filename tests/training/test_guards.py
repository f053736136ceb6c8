"""Numbers, processes and memory that go wrong: nothing is lost, and the message names the cause."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import guards_workers
import pytest
import torch
from guards_workers import midtrain_with_fault, refused_step
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import LAYOUTS, STEPS, column, midtrain_config, numbers

from prism_nemo.checkpoint.native import TrainState, find_latest, step_directory
from prism_nemo.config import GuardConfig, MidtrainConfig, to_yaml
from prism_nemo.data.plan import DataPlan, Segment
from prism_nemo.errors import PrismError, StoppedEarly
from prism_nemo.run import RunDirectory, read_metrics
from prism_nemo.runtime.launch import launch
from prism_nemo.training import midtrain as midtrain_module
from prism_nemo.training.guards import RollBack, StepGuard, bad_steps_in_a_row, bit_sum, robust_z
from prism_nemo.training.midtrain import midtrain
from prism_nemo.training.stopping import slurm_seconds_left
from prism_nemo.training.watch import RankTimes, _print_stacks


def _run(config: MidtrainConfig, fault: str = "", steps: list[int] | None = None) -> dict[str, Any]:
    processes = config.parallel.world_size
    if fault:
        return dict(launch(midtrain_with_fault, config, fault, steps or [], processes=processes))
    return dict(launch(midtrain, config, processes=processes))


def _bad_steps(config: MidtrainConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.run_dir) / "bad_steps.jsonl").read_text().splitlines()]


def test_a_refused_step_leaves_weights_and_optimizer_as_they_were(hf_model: Path) -> None:
    assert launch(refused_step, str(hf_model)) == (True, True, True)


@pytest.mark.parametrize(
    ("fault", "layout"), [("loss", "TP1"), ("gradient", "TP1"), ("gradient", "DP2"), ("gradient", "PP2")]
)
def test_a_step_without_a_finite_gradient_is_left_out(
    fault: str, layout: str, run_of: Callable[..., Path], data: Path, initial: Path, tmp_path: Path
) -> None:
    config = midtrain_config(tmp_path / "run", data, initial, parallel=LAYOUTS[layout])
    result = _run(config, fault, [6])
    lines = {line["step"]: line for line in numbers(config.run_dir) if "lr" in line}
    undisturbed = {line["step"]: line for line in numbers(run_of(layout)) if "lr" in line}
    for step in range(1, 6):
        assert lines[step] == undisturbed[step]
    assert "grad_norm" not in lines[6]
    (bad,) = _bad_steps(config)
    assert (bad["step"], bad["first_sample"], bad["samples"], bad["action"]) == (6, 40, 8, "skip")
    assert ("loss" if fault == "loss" else "gradient norm") in bad["reason"]
    # The step was left out and not one more: the next loss is that of weights of five updates.
    assert lines[7]["loss"] == pytest.approx(undisturbed[7]["loss"], abs=0.4)
    assert lines[7]["loss"] != undisturbed[7]["loss"]
    assert [lines[step]["skipped_steps"] for step in (5, 6, 10)] == [0, 1, 1]
    assert math.isfinite(result["loss"])


def test_a_run_that_finds_no_finite_loss_any_more_stops(data: Path, initial: Path, tmp_path: Path) -> None:
    config = midtrain_config(tmp_path / "run", data, initial, guards=GuardConfig(max_bad_steps=3))
    with pytest.raises(PrismError, match=r"step 8: the loss is nan; 3 such steps in a row.*bad_steps\.jsonl") as end:
        _run(config, "loss", [6, 7, 8, 9, 10])
    assert end.value.exit_code == 1
    assert [(bad["step"], bad["first_sample"]) for bad in _bad_steps(config)] == [(6, 40), (7, 48), (8, 56)]
    checkpoints = Path(config.run_dir) / "checkpoints"
    assert find_latest(checkpoints) == step_directory(checkpoints, 4)
    assert _run(config)["step"] == STEPS


def _spiky(tmp_path: Path, data: Path, initial: Path, action: str, **changes: Any) -> MidtrainConfig:
    guards = GuardConfig(spike=action, spike_window=16)
    config = midtrain_config(tmp_path / "run", data, initial, train_steps=24, guards=guards, **changes)
    config.optimizer.lr = 1e-3  # slow enough that losses are alike
    config.checkpoint.save_interval = 18
    return config


@pytest.mark.parametrize("action", ["off", "warn", "skip"])
def test_a_spike_is_reported_or_left_out_as_configured(action: str, data: Path, initial: Path, tmp_path: Path) -> None:
    config = _spiky(tmp_path, data, initial, action)
    _run(config, "spike", [20])
    losses = column(config.run_dir, "loss")
    assert losses[19] > 5 * losses[18]
    if action == "off":
        assert not (tmp_path / "run" / "bad_steps.jsonl").exists()
    else:
        (bad,) = _bad_steps(config)
        assert (bad["step"], bad["action"]) == (20, action)
        assert "is usual (robust z" in bad["reason"]
    skipped = column(config.run_dir, "skipped_steps")[-1]
    assert skipped == (action == "skip")


def test_a_spike_leads_back_to_the_last_checkpoint_and_past_its_data(data: Path, initial: Path, tmp_path: Path) -> None:
    config = _spiky(tmp_path, data, initial, "rollback")
    # Counted in this process: the 20th step is step 20, and later steps have other numbers after the way back.
    result = _run(config, "spike", [20])
    assert result["step"] == 24
    lineage = json.loads((tmp_path / "run" / "lineage.json").read_text())
    (event,) = [event for event in lineage["events"] if event["event"] == "rolled back"]
    assert (event["step"], event["to"], event["left_out"]) == (20, 18, [144, 160])
    steps = [line["step"] for line in numbers(config.run_dir) if "lr" in line]
    assert steps == list(range(1, 25))  # what was logged after the checkpoint is gone
    assert max(column(config.run_dir, "loss")) < 2 * column(config.run_dir, "loss")[0]
    # 24 steps were taken, on the samples of 26.
    assert column(config.run_dir, "skipped_steps")[-1] == 1
    assert result["tokens"] < 24 * 8 * 32
    epochs = column(config.run_dir, "epoch/letters")
    assert epochs[18] / epochs[17] == pytest.approx(21 / 18, rel=0.06)


def test_too_many_rollbacks_stop_the_run(data: Path, initial: Path, tmp_path: Path) -> None:
    config = _spiky(tmp_path, data, initial, "rollback")
    config.guards.max_rollbacks = 2
    with pytest.raises(PrismError, match="after 2 rollbacks; the run stops"):
        _run(config, "spike", [20, 21, 22])


def test_a_checkpoint_that_is_due_among_bad_steps_waits(data: Path, initial: Path, tmp_path: Path) -> None:
    """The update before them may have broken the weights, and the steps that were left out would count at a restart."""
    config = midtrain_config(tmp_path / "run", data, initial, train_steps=7)
    config.checkpoint.save_interval = 3
    _run(config, "loss", [3, 4])
    names = [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())]
    assert names == ["step_00000005", "step_00000006", "step_00000007"]


def test_a_run_that_is_asked_to_stop_among_bad_steps_saves(data: Path, initial: Path, tmp_path: Path) -> None:
    config = midtrain_config(tmp_path / "run", data, initial, max_seconds=0.0)
    with pytest.raises(StoppedEarly, match=r"\(time limit\) among steps that were left out \(1 so far.*; saved"):
        _run(config, "loss", [1])
    checkpoints = tmp_path / "run" / "checkpoints"
    assert find_latest(checkpoints) == step_directory(checkpoints, 1)


def test_what_the_guards_remember_is_saved(data: Path, initial: Path, tmp_path: Path) -> None:
    """Two bad steps before a stop and one after it are three in a row."""
    config = midtrain_config(tmp_path / "run", data, initial, guards=GuardConfig(max_bad_steps=3))
    config.train_steps = 4
    _run(config, "loss", [3, 4])
    config.train_steps = STEPS
    with pytest.raises(PrismError, match=r"step 5: .*3 such steps"):
        _run(config, "loss", [1])


def test_a_flipped_bit_in_one_replica_is_found(data: Path, initial: Path, tmp_path: Path) -> None:
    """The flip is in the weights that rank 1 computes with; the update of the other half overwrites nothing of it."""
    config = midtrain_config(
        tmp_path / "run", data, initial, parallel=LAYOUTS["DP2"], guards=GuardConfig(replica_check_interval=1)
    )
    config.use_distributed_optimizer = False  # every replica updates its own copy, so the flip stays
    with pytest.raises(
        PrismError, match=r"step 3: replicas of the model differ.*linear_fc2\.weight.*replace the machine"
    ):
        _run(config, "flip", [3])
    config = midtrain_config(
        tmp_path / "clean", data, initial, parallel=LAYOUTS["DP2"], guards=GuardConfig(replica_check_interval=1)
    )
    assert _run(config)["step"] == STEPS


def test_a_replica_that_differs_is_not_saved(data: Path, initial: Path, tmp_path: Path) -> None:
    """Otherwise a checkpoint between the flip and the next check holds it, and a restart gives all replicas a copy."""
    config = midtrain_config(
        tmp_path / "run", data, initial, parallel=LAYOUTS["DP2"], guards=GuardConfig(replica_check_interval=8)
    )
    config.use_distributed_optimizer = False
    with pytest.raises(PrismError, match=r"step 4: replicas of the model differ.*equal when the last checkpoint was"):
        _run(config, "flip", [3])
    assert find_latest(tmp_path / "run" / "checkpoints") is None


@pytest.mark.parametrize("layout", ["DP2", "PP2"])
def test_weights_that_an_update_broke_are_not_saved(data: Path, initial: Path, tmp_path: Path, layout: str) -> None:
    """Loss and gradient were finite: only the weights show it, and on one rank."""
    config = midtrain_config(tmp_path / "run", data, initial, parallel=LAYOUTS[layout])
    with pytest.raises(
        PrismError, match=r"step 4: weights have values that are no finite.*: rank 1: decoder.*linear_fc2\.weight\. No"
    ):
        _run(config, "weight", [4])
    assert find_latest(tmp_path / "run" / "checkpoints") is None


def _command(config: MidtrainConfig, folder: Path, fault: str, *steps: int) -> tuple[int, str]:
    """The run as a process of its own: its exit code, and what it says."""
    file = folder / "config.yaml"
    file.write_text(to_yaml(config))
    command = [sys.executable, guards_workers.__file__, str(file), fault, *map(str, steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


def test_a_rank_that_hangs_ends_the_run_with_every_ranks_stack(data: Path, initial: Path, tmp_path: Path) -> None:
    config = midtrain_config(
        tmp_path / "run", data, initial, parallel=LAYOUTS["DP2"], guards=GuardConfig(watchdog_seconds=6.0)
    )
    code, errors = _command(config, tmp_path, "hang", 3)
    assert code == 1
    for rank in (0, 1):
        assert f"rank {rank} made no progress for 6 s in step 3" in errors
    assert "in broken" in errors  # where rank 1 sleeps
    assert "in start_grad_sync" in errors  # where rank 0 waits for it
    assert "ended without a message" in errors


def test_stacks_are_written_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks share a pipe and print at the same moment: word by word, their lines were mixed up."""
    (read, target), whole = os.pipe(), os.write
    pieces: list[bytes] = []

    def write(fd: int, text: bytes) -> int:
        if fd == target:
            pieces.append(text)
        return whole(fd, text)

    with os.fdopen(target, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        patch.setattr(os, "write", write)
        _print_stacks("where it stands:\n")
    text = os.read(read, 2**16)
    os.close(read)
    assert pieces == [text]
    assert text.startswith(b"where it stands:\n")
    assert b"in test_stacks_are_written_in_one_piece" in text


def test_a_rank_that_dies_is_named(data: Path, initial: Path, tmp_path: Path) -> None:
    config = midtrain_config(tmp_path / "run", data, initial, parallel=LAYOUTS["DP2"])
    with pytest.raises(PrismError, match="the process of rank 1 ended without a message"):
        _run(config, "die", [6])
    assert _run(config)["step"] == STEPS


def test_a_slow_rank_is_named(data: Path, initial: Path, tmp_path: Path) -> None:
    """Slow in two windows of a step each: not said at the first, said at the second."""
    config = midtrain_config(tmp_path / "run", data, initial, parallel=LAYOUTS["DP2"], train_steps=6)
    code, errors = _command(config, tmp_path, "slow", 4, 5)
    assert code == 0, errors
    assert "step 5: rank 1 is busy for" in errors
    assert "step 4: rank 1" not in errors
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "lr" in line]
    busy = {line["step"]: line["busy_seconds_max"] for line in lines}
    assert min(busy[4], busy[5]) > 0.3
    assert busy[3] < 0.3


def test_one_slow_window_is_no_slow_rank() -> None:
    times = RankTimes(torch.device("cpu"), 1.5)
    windows = [[1.0, 1.7, 1.0], [1.0, 1.0, 1.0], [1.0, 1.7, 1.0], [1.7, 1.0, 1.0], [1.7, 1.0, 1.0], [1.8, 1.0, 1.0]]
    named = [times._compare(seconds)[1] for seconds in windows]
    assert [name is not None for name in named] == [False, False, False, False, True, True]
    assert str(named[4]).startswith("rank 0 is busy for 1.7 s a step, 1.7 times as long as most")


def test_what_a_rank_does_between_steps_is_not_counted() -> None:
    """Log and monitors are the first rank's alone; steps are everyone's."""
    times = RankTimes(torch.device("cpu"), 1.5)
    guards_workers.burn(0.2)
    for seconds in (0.05, 0.15):
        with times.step():
            guards_workers.burn(seconds)
        guards_workers.burn(0.2)
    assert times._busy() == pytest.approx(0.1, abs=0.02)  # what is burned is processor time, whoever else runs


@given(st.lists(st.floats(1.9, 2.1), min_size=16, max_size=64), st.floats(1.9, 2.1))
def test_noise_is_no_spike(history: list[float], value: float) -> None:
    assert robust_z(value, history) < 25  # by the least noise: at most 0.2 / 0.0095


def test_a_spike_stands_out_although_the_history_holds_one() -> None:
    rng = random.Random(0)
    history = [2 + rng.gauss(0, 0.02) for _ in range(64)]
    assert robust_z(2.05, history) < 4
    assert robust_z(2.5, history) > 15
    assert robust_z(2.5, [*history, 9.0, 9.0, 9.0]) > 15
    assert robust_z(100.0, history[:15]) == 0.0


def _used_to(config: GuardConfig, state: TrainState, run: RunDirectory) -> StepGuard:
    """A guard that has seen twenty losses of about 2."""
    guard = StepGuard(config, state, run)
    for step in range(20):
        assert guard.judge({"loss": 2.0 + 0.01 * (step % 3), "tokens": 1.0}, 1.0) is None
        assert guard.settle(step, step, 1, 2.0, 1.0) is None
    return guard


def test_a_spike_does_not_become_usual_when_it_is_left_out(tmp_path: Path) -> None:
    state, run = TrainState(), RunDirectory(tmp_path)
    guard = _used_to(GuardConfig(spike="skip"), state, run)
    for step in range(20, 60):
        loss = 2.0 if step % 5 == 0 else 4.0
        assert (guard.judge({"loss": loss, "tokens": 1.0}, 1.0) is not None) == (loss == 4.0)
        assert ("left out" in str(guard.settle(step, step, 1, loss, 1.0))) == (loss == 4.0)
        assert bad_steps_in_a_row(state) == step % 5
    assert guard.skipped == 32
    rolling = StepGuard(GuardConfig(spike="rollback"), state, run)
    rolling.judge({"loss": 4.0, "tokens": 1.0}, 1.0)
    with pytest.raises(RollBack):
        rolling.settle(40, 40, 1, 4.0, 1.0)


@pytest.mark.parametrize(("action", "taken"), [("skip", 4), ("rollback", 5)])
def test_a_loss_that_stays_high_stops_the_run(action: str, taken: int, tmp_path: Path) -> None:
    """Leaving out every step from there on is training on nothing, with exit code 0. A way back that leads nowhere
    (there is no checkpoint yet) leaves steps out as well."""
    state = TrainState()
    guard = _used_to(GuardConfig(spike=action), state, RunDirectory(tmp_path))
    for step in range(20, 20 + taken):
        assert guard.judge({"loss": 2.2, "tokens": 1.0}, 1.0) is not None
        with pytest.raises(RollBack) if action == "rollback" else nullcontext():
            guard.settle(step, step, 1, 2.2, 1.0)
    guard.judge({"loss": 2.2, "tokens": 1.0}, 1.0)
    with pytest.raises(PrismError, match=rf"{taken + 1} such steps in a row, so the run stops.*guards\.spike=warn"):
        guard.settle(20 + taken, 20 + taken, 1, 2.2, 1.0)


def test_a_step_on_nothing_is_no_bad_step(tmp_path: Path) -> None:
    """A step of RL whose groups have nothing to tell apart has no tokens, and so no loss."""
    state = TrainState()
    guard = StepGuard(GuardConfig(max_bad_steps=1), state, RunDirectory(tmp_path))
    assert guard.judge({"loss": 0.0, "tokens": 0.0}, 0.0) is not None
    guard.settle(1, 0, 1, 0.0, 0.0)
    assert bad_steps_in_a_row(state) == 0


@pytest.mark.parametrize("changed", [True, False])
def test_losses_of_another_mixture_are_no_measure(
    changed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = [DataPlan(seed, 32, "best_fit", (Segment(0, ()),)).to_dict() for seed in (1, 2 if changed else 1)]

    def feed(config: Any, run: Any, state: TrainState, *_: Any) -> list[None]:
        state.extra["data"] = {"plan": plans[1]}
        return []

    monkeypatch.setattr(midtrain_module, "Feed", feed)
    losses = [2.0] * 20
    session = midtrain_module._Session.__new__(midtrain_module._Session)
    session.state = TrainState(extra={"guards": {"losses": list(losses)}, "data": {"plan": plans[0]}})
    session.config = SimpleNamespace(guards=GuardConfig())  # type: ignore[assignment]
    session.run, session.runtime = RunDirectory(tmp_path), None  # type: ignore[assignment]
    session.trainer = SimpleNamespace(architecture=None)  # type: ignore[assignment]
    session.progress = SimpleNamespace(say=print)  # type: ignore[assignment]
    session._open()
    assert session.state.extra["guards"]["losses"] == ([] if changed else losses)


@given(st.integers(0, 31), st.integers(0, 63))
def test_any_flipped_bit_changes_the_sum(bit: int, place: int) -> None:
    values = torch.linspace(-1, 1, 64)
    before = bit_sum(values)
    flipped = values.clone()
    flipped.view(torch.int32)[place] ^= (1 << bit) - (1 << 32 if bit == 31 else 0)
    assert bit_sum(flipped) != before
    assert bit_sum(values.bfloat16()).dtype == torch.int64


def test_slurms_own_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert slurm_seconds_left(1000.0) is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", "4600")
    assert slurm_seconds_left(1000.0) == 3600 - 120
    assert slurm_seconds_left(9000.0) == 0.0


def test_rank_times_of_one_process_say_nothing() -> None:
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    assert RankTimes(torch.device("cpu"), 1.5).slowest() == ({}, None)
    torch.distributed.destroy_process_group()
