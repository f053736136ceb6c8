"""The life of a stage that trains: what it refuses, where it starts, when it saves, how it stops.

Mid-training and reinforcement learning differ in what a step is; everything around the steps is here, once.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from prism_nemo.checkpoint.atomic import HASHES, MANIFEST, read_manifest, remove_leftovers
from prism_nemo.checkpoint.hashes import damage, sha256
from prism_nemo.checkpoint.native import (
    TrainState,
    find_latest,
    load,
    set_aside,
    set_aside_damaged,
    step_directory,
)
from prism_nemo.checkpoint.retention import step_of
from prism_nemo.checkpoint.saver import Saver
from prism_nemo.config import (
    CheckpointConfig,
    GuardConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    check_positive,
)
from prism_nemo.errors import InputError, StoppedEarly
from prism_nemo.models.family import Architecture
from prism_nemo.run import RunDirectory
from prism_nemo.runtime import start, stop
from prism_nemo.training.guards import bad_steps_in_a_row, check_finite, check_replicas
from prism_nemo.training.other_settings import (
    other_settings,
    refuse_another_kind_of_optimizer,
    refuse_other_settings_of_a_finished_run,
)
from prism_nemo.training.schedule import check_schedule
from prism_nemo.training.stopping import StopRequest
from prism_nemo.training.trainer import Trainer


class StageConfig(Protocol):
    """What the configurations of all stages have."""

    run_dir: str
    parallel: ParallelConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    checkpoint: CheckpointConfig
    guards: GuardConfig
    train_steps: int
    micro_batch_size: int
    log_interval: int
    use_distributed_optimizer: bool

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
    check_optimizer(config.optimizer)
    check_schedule(config.schedule)
    if config.checkpoint.keep_every is not None:
        check_positive(config, "checkpoint.keep_every")
    check_run_directory(config)
    refuse_another_kind_of_optimizer(config)
    refuse_other_settings_of_a_finished_run(config)


def check_optimizer(optimizer: OptimizerConfig) -> None:
    """Refuse settings that would ruin the weights, or turn something off, without a word.

    Raises:
        InputError: Naming the key.
    """
    for key in ("lr", "weight_decay", "clip_grad"):
        value = getattr(optimizer, key)
        if not 0.0 <= value < math.inf:
            off = " (0: no clipping)" if key == "clip_grad" else ""
            raise InputError(f"optimizer.{key}: {value} must be a number of at least 0{off}")
    for key in ("adam_beta1", "adam_beta2"):
        value = getattr(optimizer, key)
        if not 0.0 <= value < 1.0:
            raise InputError(f"optimizer.{key}: {value} must be at least 0 and below 1")
    if not 0.0 < optimizer.adam_eps < math.inf:
        raise InputError(f"optimizer.adam_eps: {optimizer.adam_eps} must be a number above 0")


def check_run_directory(config: StageConfig) -> None:
    """Refuse the directory of another stage, or of one that began elsewhere: it would be gone on with, and its lineage
    would name a parent that it does not come from, or none.

    A checkpoint that was only moved is known by the hash of its manifest.

    Raises:
        InputError: Naming the directory and what it holds.
    """
    path = Path(config.run_dir) / "lineage.json"
    if not path.is_file():
        return
    try:
        found = json.loads(path.read_text())
        stage, parents, events = found.get("stage"), list(found.get("parents", [])), list(found.get("events", []))
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: not readable ({error}); give the stage another run_dir") from error
    mine = "rl" if hasattr(config, "grpo") else "midtrain"
    if stage not in (None, mine):
        raise InputError(
            f"run_dir {config.run_dir}: holds a stage of kind {stage}, and this one is {mine}; give another"
        )
    began = next((event for event in events if event.get("event") == "started from"), None)
    parent = Path(config.init_from) if config.init_from else None
    if parent is None:
        if began is not None or parents:
            beginning = began.get("checkpoint") if began is not None else parents[0]
            raise InputError(
                f"run_dir {config.run_dir}: its stage began with {beginning}, not with random weights; give another "
                "run_dir, or the checkpoint that it began with as init_from"
            )
        return
    if began is None:
        # Without a checkpoint of its own it would begin anew, with this one.
        if not parents and find_latest(Path(config.run_dir) / "checkpoints") is not None:
            raise InputError(
                f"run_dir {config.run_dir}: its stage began with random weights, not with {parent}; give another "
                "run_dir, or leave init_from out and give the model that it began with"
            )
        return
    if (parent / MANIFEST).is_file() and sha256(parent / MANIFEST) != began.get("manifest_sha256"):
        raise InputError(
            f"run_dir {config.run_dir}: its stage began with {began.get('checkpoint')}, not with {parent}; give "
            "another run_dir, or the checkpoint that it began with"
        )


def make_trainer(
    start_with: dict[str, Any], architecture: Architecture, arguments: tuple[Any, ...], more: dict[str, Any]
) -> tuple[Trainer, Architecture]:
    """A trainer like the rank's, in the process that writes its checkpoints."""
    trainer = Trainer(architecture, start(seed=0, **start_with), *arguments, **more)
    return trainer, trainer.architecture


def newest_good(checkpoints: Path, verify: bool) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, by its sizes and, if asked, by its hashes; every rank calls this.

    Newer ones are damaged: they are renamed, so that the run can go back and come to their steps again.

    Returns:
        The checkpoint, or None; and what was wrong with the newer ones (on rank 0 only).
    """
    problems: list[str] = []
    while True:
        latest = find_latest(checkpoints)
        problems += set_aside_damaged(checkpoints, latest)
        problem = damage(latest) if latest is not None and verify else None
        if problem is None:
            return latest, problems
        if latest is not None and dist.get_rank() == 0:
            problems.append(f"{problem} (kept as {set_aside(latest).name})")
        if dist.get_world_size() > 1:
            dist.barrier()


def begin(
    kind: str, config: StageConfig, run: RunDirectory, trainer: Trainer, saver: Saver | None = None
) -> tuple[TrainState, Path | None]:
    """Fill the trainer from the run's newest checkpoint, or from where the stage starts; record the start.

    Args:
        kind: Of stage, for the lineage.
        config: The stage's configuration.
        run: Its directory.
        trainer: Filled in place; keeps its random weights if there is nothing to load.
        saver: Saves the stage's checkpoints; makes this the only run in the directory.

    Returns:
        The state to continue from, and the checkpoint that it came from (None at the beginning).

    Raises:
        InputError: If another run is going on in the directory, or `init_from` is damaged.
    """
    if saver is not None:
        saver.claim(run.path)
        if run.writes:
            remove_leftovers(step_directory(run.checkpoints, 0), alone=True)
    verify = config.checkpoint.verify_on_load
    latest, problems = newest_good(run.checkpoints, verify)
    where = f"step {step_of(latest)}" if latest is not None else "the beginning"
    for problem in problems:
        sys.stderr.write(f"{problem}; the run goes back to {where}\n")
    state = TrainState()
    if latest is not None:
        state = load(latest, trainer.raw, trainer.optimizer)
    elif config.init_from is not None:
        wrong = damage(Path(config.init_from)) if verify else None
        if wrong is not None:
            raise InputError(f"init_from: {wrong}")
        load(Path(config.init_from), trainer.raw)
        trainer.optimizer.reload_model_params()
    changed = other_settings(config) if state.step and run.writes else []
    run.begin(kind, config, [config.init_from] if config.init_from else [], state.step)
    if changed:
        sys.stderr.write(
            f"{config.run_dir}: goes on from step {state.step} with other settings: {'; '.join(changed)}\n"
        )
        run.record({"event": "settings changed", "step": state.step, "what": changed})
    if config.init_from and run.writes:
        _record_parent(run, Path(config.init_from))
    for problem in problems:
        run.record({"event": "damaged checkpoint", "problem": problem, "to": state.step})
    run.truncate_metrics(state.step)
    next_save = (state.step // config.checkpoint.save_interval + 1) * config.checkpoint.save_interval
    if saver is not None and next_save < config.train_steps:  # the last one is waited for in any case
        runtime = trainer.runtime
        start_with = {"parallel": runtime.parallel, "dtype": runtime.dtype, "precision": runtime.precision}
        saver.prepare(trainer, make_trainer, start_with, *trainer.arguments)
    return state, latest


def _record_parent(run: RunDirectory, parent: Path) -> None:
    """What exactly the stage started from: the hashes of the parent's files, and of the manifest that names them."""
    event = {"event": "started from", "checkpoint": str(parent), "manifest_sha256": sha256(parent / MANIFEST)}
    run.record({**event, "sha256": read_manifest(parent).get(HASHES, {})})


def end_step(
    stage: str,
    config: StageConfig,
    run: RunDirectory,
    trainer: Trainer,
    state: TrainState,
    request: StopRequest,
    saver: Saver | None = None,
    before_save: Callable[[], None] | None = None,
) -> Path | None:
    """Save if a checkpoint is due, the stage is done, or it was asked to stop; every rank calls this after each step.

    A checkpoint in the middle of a stage is written in the background, if the saver can; the last one is waited for.
    `before_save` writes what the checkpoint refers to. Weights must be numbers, and replicas are compared: at a restart
    all get a copy of one.
    A checkpoint that is due while steps are left out waits for the first step that is taken again: the update before
    may have broken the weights. On request, and at the end, it is saved all the same.

    Returns:
        The checkpoint that was saved, or None.

    Raises:
        StoppedEarly: If the stage was asked to stop, after saving.
        PrismError: If this save, or one in the background, failed, weights are no numbers, or replicas differ.
    """
    saver = saver or Saver(replace(config.checkpoint, async_save=False))
    saver.poll()
    done = state.step >= config.train_steps
    stopping = not done and request.agreed()
    bad = bad_steps_in_a_row(state)
    saver.due = saver.due or state.step % config.checkpoint.save_interval == 0
    if not (stopping or done or (saver.due and not bad)):
        return None
    saver.due = False
    check_finite(trainer.raw, state.step)
    if config.guards.replica_check_interval:
        check_replicas(trainer.raw, state.step)
    if before_save is not None:
        before_save()
    path = step_directory(run.checkpoints, state.step)
    saved = saver.save(path, trainer, state, {"stage": stage}, background=not (stopping or done))
    if stopping:
        stop()
        among = f" among steps that were left out ({bad} so far, see bad_steps.jsonl)" if bad else ""
        raise StoppedEarly(
            f"{config.run_dir}: stopped at step {state.step} of {config.train_steps} ({request.reason}){among}; "
            "saved, run the same command again to continue"
        )
    return saved
