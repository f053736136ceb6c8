"""A run that was stopped, killed or moved to another layout goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_training import LAYOUTS, STEPS, column, midtrain_config, numbers
from training_workers import midtrain_interrupted

from prism_nemo.checkpoint.native import find_latest, step_directory
from prism_nemo.config import MidtrainConfig, to_yaml
from prism_nemo.errors import InputError, PrismError, StoppedEarly
from prism_nemo.run import read_metrics
from prism_nemo.runtime.launch import launch
from prism_nemo.training.midtrain import check, midtrain


def _run(config: MidtrainConfig) -> dict:
    return dict(launch(midtrain, config, processes=config.parallel.world_size))


def _interrupt(config: MidtrainConfig, at_step: int, how: str) -> None:
    launch(midtrain_interrupted, config, at_step, how, processes=config.parallel.world_size)


def _steps(run_dir: str | Path) -> list[int]:
    return [line["step"] for line in numbers(run_dir) if "loss" in line]


@pytest.mark.parametrize("layout", ["TP1", "TP2", "DP2", "PP2 VPP2", "DP2 overlap"])
def test_stopped_runs_continue_bit_for_bit(
    layout: str, run_of: Callable[..., Path], data: Path, initial: Path, tmp_path: Path
) -> None:
    """Stopped after steps 3 and 5, neither of which saves by itself; every number of every line is equal."""
    config = midtrain_config(tmp_path / "run", data, initial, parallel=LAYOUTS[layout])
    for at_step, total in ((3, 3), (2, 5)):
        with pytest.raises(StoppedEarly, match=f"stopped at step {total} of {STEPS} .*SIGUSR1.*same command again"):
            _interrupt(config, at_step, "stop")
        assert _steps(config.run_dir) == list(range(1, total + 1))
        assert find_latest(tmp_path / "run" / "checkpoints") == step_directory(tmp_path / "run" / "checkpoints", total)
    result = _run(config)
    undisturbed = run_of(layout)
    assert numbers(config.run_dir) == numbers(undisturbed)
    assert _steps(config.run_dir) == list(range(1, STEPS + 1))
    assert (result["step"], result["tokens"]) == (STEPS, column(undisturbed, "tokens")[-1])
    assert result["loss"] == column(undisturbed, "loss")[-1]


def test_time_limit_stops_after_a_step_and_saves(
    run_of: Callable[..., Path], data: Path, initial: Path, tmp_path: Path
) -> None:
    """A limit of no time at all still makes one step a start: a chain of short jobs ends."""
    config = midtrain_config(tmp_path / "run", data, initial, max_seconds=0.0)
    for step in (1, 2):
        with pytest.raises(StoppedEarly, match=f"stopped at step {step} .*time limit") as stopped:
            _run(config)
        assert stopped.value.exit_code == 75
    assert numbers(config.run_dir) == numbers(run_of("TP1"))[:2]


@pytest.mark.parametrize(("before", "after"), [("TP2", "PP2"), ("PP2", "DP2"), ("DP2", "TP1"), ("TP1", "TP2 SP")])
def test_continues_at_another_layout(
    before: str, after: str, run_of: Callable[..., Path], data: Path, initial: Path, tmp_path: Path
) -> None:
    """The tolerance is that of layouts without a stop (see test_parity.py): moving costs nothing in numbers.

    Optimizer moments that were lost or given to the wrong shard move the losses by 1e-2.
    """
    config = midtrain_config(tmp_path / "run", data, initial, parallel=LAYOUTS[before])
    with pytest.raises(StoppedEarly):
        _interrupt(config, 5, "stop")
    _run(midtrain_config(tmp_path / "run", data, initial, parallel=LAYOUTS[after]))
    undisturbed = run_of("TP1")
    assert _steps(config.run_dir) == list(range(1, STEPS + 1))
    assert column(config.run_dir, "loss") == pytest.approx(column(undisturbed, "loss"), abs=5e-6)
    assert column(config.run_dir, "grad_norm") == pytest.approx(column(undisturbed, "grad_norm"), abs=2e-5)


@pytest.mark.parametrize("background", [False, True], ids=["synchronous", "in the background"])
def test_kill_during_a_save_loses_only_the_steps_since_the_last_one(
    background: bool, run_of: Callable[..., Path], data: Path, initial: Path, tmp_path: Path
) -> None:
    """Killed at step 8 with every file of the checkpoint written, before it is published; steps 5 to 8 are repeated.

    In the background it is the writer that is killed; the run ends when it notices.
    """
    config = midtrain_config(tmp_path / "run", data, initial)
    config.checkpoint.async_save = background
    with pytest.raises(PrismError, match="ended without a message"):
        _interrupt(config, 8, "kill")
    checkpoints = tmp_path / "run" / "checkpoints"
    left = [path.name for path in checkpoints.iterdir()]
    assert any(".tmp-" in name for name in left)
    assert find_latest(checkpoints) == step_directory(checkpoints, 4)
    assert _steps(config.run_dir)[:8] == list(range(1, 9))
    _run(config)
    assert numbers(config.run_dir) == numbers(run_of("TP1"))
    assert not [path for path in checkpoints.iterdir() if ".tmp-" in path.name]


def _damage(checkpoint: Path) -> None:
    """As a copy that was cut short, or a disk that lost a block: the largest file is a byte short."""
    file = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size - 1)


def test_an_incomplete_newest_checkpoint_is_passed_over_and_replaced(
    run_of: Callable[..., Path], data: Path, initial: Path, tmp_path: Path
) -> None:
    """The run goes back to the checkpoint before, repeats the steps, and ends with checkpoints that all load."""
    shutil.copytree(run_of("TP1"), tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in (8, STEPS):
        _damage(step_directory(checkpoints, step))
    assert find_latest(checkpoints) == step_directory(checkpoints, 4)
    result = _run(midtrain_config(tmp_path / "run", data, initial))
    assert numbers(tmp_path / "run") == numbers(run_of("TP1"))
    assert find_latest(checkpoints) == step_directory(checkpoints, STEPS)
    assert result["checkpoint"] == str(step_directory(checkpoints, STEPS))


def test_incomplete_checkpoints_do_not_push_out_complete_ones(
    run_of: Callable[..., Path], data: Path, initial: Path, tmp_path: Path
) -> None:
    """keep=1 with a damaged newer checkpoint: whenever the run is cut, something that loads must be there."""
    shutil.copytree(run_of("TP1"), tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in (8, STEPS):
        _damage(step_directory(checkpoints, step))
    config = midtrain_config(tmp_path / "run", data, initial)
    config.checkpoint.keep = 1
    with pytest.raises(StoppedEarly):
        _interrupt(config, 2, "stop")  # at step 6
    assert find_latest(checkpoints) == step_directory(checkpoints, 6)


def test_starting_a_finished_run_again_changes_nothing(
    run_of: Callable[..., Path], data: Path, initial: Path, tmp_path: Path
) -> None:
    shutil.copytree(run_of("TP1"), tmp_path / "run")
    result = _run(midtrain_config(tmp_path / "run", data, initial))
    assert numbers(tmp_path / "run") == numbers(run_of("TP1"))
    assert result["step"] == STEPS
    assert result["checkpoint"] == str(step_directory(tmp_path / "run" / "checkpoints", STEPS))
    # The result is printed as JSON, which has no NaN.
    assert result["loss"] == column(run_of("TP1"), "loss")[-1]


def test_other_settings_are_recorded_and_those_of_a_finished_run_are_refused(
    run_of: Callable[..., Path], data: Path, initial: Path, tmp_path: Path
) -> None:
    shutil.copytree(run_of("TP1"), tmp_path / "run")
    config = midtrain_config(tmp_path / "run", data, initial)
    before = config.optimizer.lr
    config.optimizer.lr = before / 2
    with pytest.raises(InputError, match=r"is finished \(step \d+\) with other settings: optimizer\.lr: "):
        check(config)
    shutil.rmtree(step_directory(tmp_path / "run" / "checkpoints", STEPS))
    check(config)
    _run(config)
    events = json.loads((tmp_path / "run" / "lineage.json").read_text())["events"]
    changed = [event for event in events if event["event"] == "settings changed"]
    assert changed == [{"event": "settings changed", "step": 8, "what": [f"optimizer.lr: {before} -> {before / 2}"]}]


def _command(config: MidtrainConfig, folder: Path) -> subprocess.Popen[bytes]:
    file = folder / "recipe.yaml"
    file.write_text(to_yaml(config))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "prism_nemo", "midtrain", str(file)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _wait_for_steps(run_dir: Path, steps: int, process: subprocess.Popen[bytes], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if len(read_metrics(run_dir / "metrics.jsonl")) >= steps:
            return
        time.sleep(0.02)


@pytest.mark.parametrize("layout", ["TP1", "DP2"])
def test_sigterm_saves_and_exits_75(layout: str, data: Path, initial: Path, tmp_path: Path) -> None:
    """The signal goes to the command, as from Slurm or Ctrl-C in another window; its processes save and it says so."""
    config = midtrain_config(
        tmp_path / "run",
        data,
        initial,
        parallel=LAYOUTS[layout],
        train_steps=100_000,
        seq_length=8,
        eval_interval=10**6,
    )
    config.checkpoint.save_interval = 10**6
    process = _command(config, tmp_path)
    try:
        _wait_for_steps(tmp_path / "run", 3, process)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, errors.decode()
    step = _steps(config.run_dir)[-1]
    assert find_latest(tmp_path / "run" / "checkpoints") == step_directory(tmp_path / "run" / "checkpoints", step)
    assert f"stopped at step {step} of 100000 (SIGTERM)" in errors.decode()
    assert "Traceback" not in errors.decode()  # stopping on request is not an accident
    config.max_seconds = 0.0
    with pytest.raises(StoppedEarly):
        _run(config)
    assert _steps(config.run_dir) == list(range(1, step + 2))
