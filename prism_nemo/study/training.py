"""Training the model of a cell, and filtering prompts: the library's own stages, with one process."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from prism_nemo.analysis.lineage import schedule_of
from prism_nemo.analysis.nulls import Schedule
from prism_nemo.checkpoint.native import find_latest
from prism_nemo.config import (
    CheckpointConfig,
    DataConfig,
    GRPOConfig,
    MidtrainConfig,
    MonitorConfig,
    OptimizerConfig,
    RewardConfig,
    RLConfig,
    RolloutConfig,
    ScheduleConfig,
)
from prism_nemo.errors import InputError, PrismError, StoppedEarly
from prism_nemo.rl.check import check as check_rl
from prism_nemo.rl.curate import FilterConfig, measure, read_measured, write_kept
from prism_nemo.rl.train import train
from prism_nemo.run import write_json
from prism_nemo.study.folders import Folders
from prism_nemo.study.plan import Cell
from prism_nemo.study.settings import MODELS, StudySettings
from prism_nemo.training.midtrain import check as check_midtrain
from prism_nemo.training.midtrain import midtrain

_AGAIN = 1_000_003  # added to a seed for another order of batches


def model_seed(cell: Cell) -> int:
    """Seed of a cell's batches and samples: that of the study's seed, so that cells differ in what their name says."""
    return cell.seed + (_AGAIN if cell.other_seed else 2 * _AGAIN if cell.longer else 0)


def build_model_of(cell: Cell, folders: Folders, settings: StudySettings) -> dict[str, Any]:
    """Train a cell's model from the start; what an earlier try left is removed.

    Returns:
        ``outcome``: trained; no prompts (the filter kept none: the model is the one it starts from); or diverged.

    Raises:
        PrismError: If training fails, unless the cell is there to see whether it does (a factor of the learning rate).
    """
    run = folders.run(cell)
    shutil.rmtree(run, ignore_errors=True)
    if cell.kind in ("base", "midtrain"):
        config = midtrain_config(cell, folders, settings)
        check_midtrain(config)
        midtrain(config, cell.name)
        return {"outcome": "trained"}
    rl = rl_config(cell, folders, settings)
    if not rl.tasks:
        return {"outcome": "no prompts"}
    check_rl(rl)
    try:
        done = train(rl, cell.name)
    except (InputError, StoppedEarly):
        raise
    except PrismError as error:
        if cell.factor == 1:
            raise
        return {"outcome": "diverged", "message": str(error).replace(str(folders.out), "OUT")}
    return {"outcome": "trained", "last_reward": done["reward"]}


def checkpoint_of(cell: Cell, cells: dict[str, Cell], folders: Folders) -> Path | None:
    """The model that stands for a cell: its own, or, where no prompt was left to train on, that of its parent.

    Returns:
        None if it is not there.
    """
    if cell.kind == "filter":
        return None
    own = find_latest(folders.run(cell) / "checkpoints")
    if own is not None:
        return own
    measured = folders.read(cell)
    if measured is not None and measured["outcome"] == "no prompts":
        return checkpoint_of(cells[cell.parent], cells, folders)
    return None


def midtrain_config(cell: Cell, folders: Folders, settings: StudySettings) -> MidtrainConfig:
    """The stage of a base or a mid-trained model."""
    base = cell.kind == "base"
    steps, lr = settings.steps(cell.kind, cell.family), settings.base_lr if base else settings.midtrain_lr
    if cell.longer:
        steps, lr = settings.longer_steps, settings.longer_lr
    elif cell.rl_rate:
        lr = settings.rl_lr
    data = folders.data(cell.seed)
    model = None
    if base:
        vocabulary = json.loads((data / "done.json").read_text())["vocab_size"]
        model = {**MODELS[cell.family], "vocab_size": vocabulary}
    return MidtrainConfig(
        run_dir=str(folders.run(cell)),
        init_from=None if base else str(_parent(cell, folders)),
        model=model,
        init_method_std=MODELS[cell.family]["hidden_size"] ** -0.5,
        data=DataConfig(path=str(data / "tokens" / cell.mixture)),
        optimizer=OptimizerConfig(lr=lr, weight_decay=0.1, adam_eps=1e-8),
        schedule=ScheduleConfig(lr_warmup_steps=min(30, max(0, steps - 1)), min_lr_ratio=0.05),
        checkpoint=CheckpointConfig(save_interval=steps, keep=1, async_save=False),
        monitor=MonitorConfig(tensorboard=False),
        train_steps=steps,
        seq_length=settings.seq_length,
        micro_batch_size=settings.global_batch_size,
        global_batch_size=settings.global_batch_size,
        eval_interval=steps,
        log_interval=max(1, steps // 50),
        seed=model_seed(cell),
    )


def rl_config(cell: Cell, folders: Folders, settings: StudySettings) -> RLConfig:
    """The RL stage of a cell; without tasks where the filter left no prompt."""
    steps = settings.steps("rl", cell.family)
    prompts = [folders.prompts(cell.family, cell.seed, cell.prompts, task) for task in cell.domains]
    return RLConfig(
        run_dir=str(folders.run(cell)),
        init_from=str(_parent(cell, folders)),
        tokenizer=str(folders.data(cell.seed) / "tokenizer"),
        # Relative to the study's folder, in which a cell runs: the order of prompts depends on the name of their file.
        tasks=[
            f"prompts:{path.relative_to(folders.out)}" for path in prompts if path.is_file() and path.stat().st_size > 1
        ],
        control=cell.control,
        rewards=RewardConfig(gate=cell.gate),
        rollout=RolloutConfig(
            group_size=settings.group_size,
            prompts_per_step=settings.prompts_per_step,
            max_new_tokens=settings.max_new_tokens,
        ),
        grpo=GRPOConfig(kl_beta=0.0, normalize_advantage=False, aggregation="token"),
        optimizer=OptimizerConfig(lr=settings.rl_lr * cell.factor, weight_decay=0.0, adam_beta2=0.99, adam_eps=1e-8),
        schedule=ScheduleConfig(lr_warmup_steps=min(3, steps - 1), decay="linear", min_lr_ratio=0.0),
        checkpoint=CheckpointConfig(save_interval=steps, keep=1, async_save=False),
        monitor=MonitorConfig(tensorboard=False),
        train_steps=steps,
        micro_batch_size=32,
        keep_rollouts="none",
        seed=cell.seed,
    )


def stage_schedule(cell: Cell, folders: Folders) -> Schedule:
    """Learning rates of a cell's updates, for the null models."""
    return schedule_of(folders.run(cell))


def filter_prompts(cell: Cell, folders: Folders, settings: StudySettings) -> dict[str, Any]:
    """Ask a cell's parent every training question and keep those that it answers sometimes but not always.

    The study keeps what is solved at least once (mathematics: exactly once) of 16; a prompt that is always solved
    teaches as little as one that never is, and at this size there are many.

    Returns:
        Number measured, kept, and pass rate of each task.
    """
    found = {}
    for task in cell.domains:
        out = folders.prompts(cell.family, cell.seed, cell.parent, task)
        shutil.rmtree(out.parent / task, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        for old in out.parent.glob(f"{out.name}*"):
            old.unlink()
        config = FilterConfig(
            prompts=[str(folders.data(cell.seed) / "questions" / f"{task}.jsonl")],
            checkpoint=str(_parent(cell, folders)),
            tokenizer=str(folders.data(cell.seed) / "tokenizer"),
            out=str(out),
            samples=settings.filter_samples,
            keep={"*": f"{settings.least_right}:{settings.filter_samples - 1}"},
            max_new_tokens=settings.max_new_tokens,
            batch=settings.pool,
            seed=cell.seed,
        )
        measured = measure(config)
        _, answered = read_measured(Path(f"{out}.measured.jsonl"))
        rates = [int(line["right"]) for line in answered]
        if any(settings.least_right <= right < settings.filter_samples for right in rates):
            write_kept(config)
        else:
            out.write_text("")  # a result and not an error: the base solves nothing that could be trained on
        lines = [json.loads(line) for line in out.read_text().splitlines() if line.strip()]
        digest = hashlib.sha256("".join(line["id"] for line in lines).encode()).hexdigest()
        mean = sum(rates) / (len(rates) * settings.filter_samples)
        found[task] = {"measured": measured, "kept": len(lines), "kept_sha256": digest, "pass_rate": mean}
    write_json(folders.prompts(cell.family, cell.seed, cell.parent, "all").with_suffix(".json"), found)
    return found


def _parent(cell: Cell, folders: Folders) -> Path:
    """Checkpoint of the cell that this one starts from; never one without a model of its own (see `plan`)."""
    found = find_latest(folders.run_of(cell.family, cell.seed, cell.parent) / "checkpoints")
    if found is None:
        raise PrismError(f"{cell.key}: the checkpoint of {cell.parent} is not there; run the study again")
    return found
