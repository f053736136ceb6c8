"""A run that is started again: which of its settings are others than those that it was trained with so far."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from prism_nemo.checkpoint.native import find_latest
from prism_nemo.checkpoint.retention import step_of
from prism_nemo.config import load_yaml, to_yaml
from prism_nemo.errors import InputError
from prism_nemo.run import CONFIG

# What may be another at every start, because it decides where and how fast, or has a check of its own (data, parent,
# tokenizer), but not what is trained.
_FREE = (
    "run_dir", "init_from", "model", "tokenizer", "parallel", "recompute", "checkpoint", "guards", "monitor",
    "evaluation", "data.path", "data.index_dir", "data.validation_source", "data.validation_rows", "data.packing",
    "data.change_mixture", "micro_batch_size", "log_interval", "eval_interval", "max_seconds", "keep_rollouts",
    "use_distributed_optimizer", "init_method_std", "embedding_init_method_std", "rollout.slots",
    "rollout.cache_tokens", "rollout.vllm_memory_share", "rewards.workers", "rewards.time_limit", "rewards.memory_gb",
)  # fmt: skip


_KIND = "use_distributed_optimizer"


class _Config(Protocol):
    run_dir: str
    train_steps: int
    use_distributed_optimizer: bool


def other_settings(config: _Config) -> list[str]:
    """Settings that differ from those of the run's last start, as ``key: before -> now``.

    A key that only one of the two has is of another version of this package, and is left out; so is everything where
    the record is not readable: it is written anew at every start.
    """
    path = Path(config.run_dir) / CONFIG
    if not path.is_file():
        return []
    try:
        before = load_yaml(path)
    except InputError:
        return []
    return list(_differences(config, before, yaml.safe_load(to_yaml(config)), ""))


def refuse_other_settings_of_a_finished_run(config: _Config) -> None:
    """A run whose last step is done is not done again, so other settings would have no effect, in silence.

    Raises:
        InputError: Naming the keys.
    """
    latest = find_latest(Path(config.run_dir) / "checkpoints")
    step = None if latest is None else step_of(latest)
    if step is None or step < config.train_steps:
        return
    changed = other_settings(config)
    if changed:
        raise InputError(
            f"run_dir {config.run_dir}: is finished (step {step}) with other settings: "
            f"{'; '.join(changed)}; give another run_dir, or the settings that it was trained with"
        )


def refuse_another_kind_of_optimizer(config: _Config) -> None:
    """A run with checkpoints cannot turn `use_distributed_optimizer` on or off: what is saved has another structure.

    Raises:
        InputError: Saying what the run was saved with.
    """
    path = Path(config.run_dir) / CONFIG
    if not path.is_file() or find_latest(Path(config.run_dir) / "checkpoints") is None:
        return
    try:
        before = load_yaml(path).get(_KIND)
    except InputError:
        return
    now = getattr(config, _KIND)
    if isinstance(before, bool) and before != now:
        word = str(before).lower()
        raise InputError(
            f"{_KIND}: the checkpoints of {config.run_dir} were saved with {word}, and their optimizer cannot be "
            f"loaded with {str(now).lower()}; go on with {_KIND}={word}, or start a new stage from the newest "
            "one (init_from)"
        )


def _differences(config: Any, before: dict[str, Any], now: dict[str, Any], prefix: str) -> Iterator[str]:
    for field in fields(config):
        key = f"{prefix}{field.name}"
        if key in _FREE or field.name not in before:
            continue
        old, new, value = before[field.name], now[field.name], getattr(config, field.name)
        if is_dataclass(value):
            yield from _differences(value, old if isinstance(old, dict) else {}, new, f"{key}.")
        elif old != new:
            yield f"{key}: {old} -> {new}"
