"""What the optimizer of a stage did, read from its run directory: what null models need to know."""

from __future__ import annotations

from pathlib import Path

from prism_nemo.analysis.nulls import Schedule
from prism_nemo.checkpoint.retention import step_of
from prism_nemo.config import MidtrainConfig, RLConfig, load_yaml, resolve
from prism_nemo.errors import InputError
from prism_nemo.run import CONFIG, read_metrics
from prism_nemo.training.schedule import learning_rate


def schedule_of(run: Path, first: int = 0, last: int | None = None) -> Schedule:
    """The learning rates of a stage's updates, and its weight decay.

    An RL step updates as often as its metrics say: not at all where no group's answers differ in reward.

    Args:
        run: Directory of a mid-training or RL stage.
        first: Step that is the earlier checkpoint; 0 for what the stage began with.
        last: Step that is the later checkpoint; the last one recorded if not given.

    Raises:
        InputError: If it is no such directory, or has recorded no step.
    """
    path = run / CONFIG
    if not path.is_file():
        raise InputError(f"{run}: no config.yaml there; give the directory of a mid-training or RL stage")
    values = load_yaml(path)
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "step" in line]
    if last is None:
        if not lines:
            raise InputError(f"{run / 'metrics.jsonl'}: no step is recorded")
        last = max(line["step"] for line in lines)
    config: MidtrainConfig | RLConfig
    if "grpo" in values:
        config = resolve(RLConfig, values, [], source=str(path))
        updates = config.grpo.mini_batches * config.grpo.epochs
    else:
        config, updates = resolve(MidtrainConfig, values, [], source=str(path)), 1
    taken = {line["step"]: int(line["updates"]) for line in lines if "updates" in line}
    rates = [
        learning_rate(config.schedule, config.optimizer.lr, step, config.train_steps)
        for step in range(first, last)
        for _ in range(taken.get(step + 1, updates))
    ]
    return Schedule.of(rates, config.optimizer.weight_decay)


def stage_between(before: Path, after: Path) -> Schedule | None:
    """The schedule between two native checkpoints of one run, or between a stage's start and one of its checkpoints.

    Returns:
        None where `after` is no checkpoint of a run that began with `before` or passed through it.
    """
    run = after.parent.parent
    if after.parent.name != "checkpoints" or not (run / CONFIG).is_file():
        return None
    last = step_of(after)
    if last is None:
        return None
    if before.resolve().parent == after.resolve().parent:
        first = step_of(before)
        return None if first is None or first > last else schedule_of(run, first, last)
    values = load_yaml(run / CONFIG)
    origin = values.get("init_from")
    if origin is None or Path(str(origin)).resolve() != before.resolve():
        return None
    return schedule_of(run, 0, last)
