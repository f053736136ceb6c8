"""The life of a stage that trains: what it refuses, where it starts, when it saves, how it stops.

Mid-training and reinforcement learning differ in what a step is; everything around the steps is here, once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from prism_nemo.checkpoint.native import (
    TrainState,
    find_latest,
    load,
    remove_old,
    save,
    set_aside_damaged,
    step_directory,
)
from prism_nemo.config import CheckpointConfig, ParallelConfig, ScheduleConfig, check_positive
from prism_nemo.errors import StoppedEarly
from prism_nemo.run import RunDirectory
from prism_nemo.runtime import stop
from prism_nemo.training.guards import StopRequest
from prism_nemo.training.schedule import check_schedule
from prism_nemo.training.trainer import Trainer


class StageConfig(Protocol):
    """What the configurations of all stages have."""

    run_dir: str
    parallel: ParallelConfig
    schedule: ScheduleConfig
    checkpoint: CheckpointConfig
    train_steps: int
    micro_batch_size: int
    log_interval: int

    @property
    def init_from(self) -> str | None:
        """Checkpoint to start from; only mid-training may have none."""


def check_stage(config: StageConfig, *counts: str) -> None:
    """Refuse what no stage can run with.

    Args:
        config: The stage's configuration.
        counts: Dotted names of more fields that must be at least 1.

    Raises:
        InputError: Naming the key.
    """
    check_positive(
        config,
        "parallel.tensor_model_parallel_size",
        "parallel.pipeline_model_parallel_size",
        "parallel.data_parallel_size",
        "checkpoint.save_interval",
        "checkpoint.keep",
        "train_steps",
        "micro_batch_size",
        "log_interval",
        *counts,
    )
    check_schedule(config.schedule)


def begin(kind: str, config: StageConfig, run: RunDirectory, trainer: Trainer) -> tuple[TrainState, Path | None]:
    """Fill the trainer from the run's newest checkpoint, or from where the stage starts; record the start.

    Args:
        kind: Of stage, for the lineage.
        config: The stage's configuration.
        run: Its directory.
        trainer: Filled in place; keeps its random weights if there is nothing to load.

    Returns:
        The state to continue from, and the checkpoint that it came from (None at the beginning).
    """
    latest = find_latest(run.checkpoints)
    set_aside_damaged(run.checkpoints, latest)
    state = TrainState()
    if latest is not None:
        state = load(latest, trainer.raw, trainer.optimizer)
    elif config.init_from is not None:
        load(Path(config.init_from), trainer.raw)
        trainer.optimizer.reload_model_params()
    run.begin(kind, config, [config.init_from] if config.init_from else [], state.step)
    run.truncate_metrics(state.step)
    return state, latest


def end_step(
    stage: str, config: StageConfig, run: RunDirectory, trainer: Trainer, state: TrainState, request: StopRequest
) -> Path | None:
    """Save if a checkpoint is due, the stage is done, or it was asked to stop; every rank calls this after each step.

    Returns:
        The checkpoint that was saved, or None.

    Raises:
        StoppedEarly: If the stage was asked to stop, after saving.
        PrismError: If the save failed.
    """
    done = state.step >= config.train_steps
    stopping = not done and request.agreed()
    if not (stopping or done or state.step % config.checkpoint.save_interval == 0):
        return None
    path = step_directory(run.checkpoints, state.step)
    save(path, trainer.raw, trainer.architecture, trainer.optimizer, state, {"stage": stage})
    if run.writes:
        remove_old(run.checkpoints, config.checkpoint.keep)
    if stopping:
        stop()
        raise StoppedEarly(
            f"{config.run_dir}: stopped at step {state.step} of {config.train_steps} ({request.reason}); "
            "saved, run the same command again to continue"
        )
    return path
