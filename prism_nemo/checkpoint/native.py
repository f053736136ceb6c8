"""Native checkpoints: Megatron's distributed format, reshardable to any layout, saved atomically."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state

from prism_nemo.checkpoint.atomic import publish, read_manifest, remove_leftovers, temporary_name
from prism_nemo.errors import InputError, PrismError
from prism_nemo.models.family import Architecture
from prism_nemo.run import versions


@dataclass
class TrainState:
    """Everything beside weights and optimizer that decides the next step."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    seconds: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)  # a stage's own cursor, such as the RL prompt position


def sharding_metadata() -> dict[str, Any]:
    """How sharded state dicts are made, for saving and for loading."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",  # loads at another TP, PP or DP
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _layout() -> list[int]:
    return [
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(),
    ]


def _barrier() -> None:
    if dist.get_world_size() > 1:
        dist.barrier()


def save(
    final: Path,
    model: torch.nn.Module,
    architecture: Architecture,
    optimizer: Any = None,
    state: TrainState | None = None,
    manifest: dict[str, Any] | None = None,
) -> None:
    """Save atomically; every rank must call it.

    Args:
        final: Directory that will hold the checkpoint; must not exist.
        model: This rank's unwrapped model.
        architecture: Recorded in the manifest.
        optimizer: Megatron optimizer, or None for weights only.
        state: Step, data position and so on.
        manifest: More values for the manifest.

    Raises:
        PrismError: If the save failed; what was there before is untouched.
    """
    main = dist.get_rank() == 0
    names = [str(temporary_name(final))]
    dist.broadcast_object_list(names, src=0)
    temporary = Path(names[0])
    problem: list[str | None] = [None]
    if main:
        if final.exists():
            problem = [f"{final}: already exists; remove it or choose another name"]
        else:
            remove_leftovers(final)
            try:
                temporary.mkdir(parents=True)
            except OSError as error:
                problem = [f"{temporary}: cannot be created: {error.strerror}"]
    dist.broadcast_object_list(problem, src=0)
    if problem[0]:
        raise InputError(problem[0])
    metadata = sharding_metadata()
    content: dict[str, Any] = {"model": model.sharded_state_dict(metadata=metadata)}  # type: ignore[operator]
    if optimizer is not None:
        content["optimizer"] = optimizer.sharded_state_dict(content["model"], is_loading=False, metadata=metadata)
    if state is not None:
        rng: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(rng, torch.get_rng_state())
        # Megatron saves rank 0's copy and complains about any other; clocks differ between ranks.
        values = [vars(state)]
        dist.broadcast_object_list(values, src=0)
        content["state"] = {**values[0], "rng": rng, "layout": _layout()}
    try:
        dist_checkpointing.save(content, str(temporary), content_metadata=None)
        _barrier()
        if main:
            record = {"architecture": architecture.to_dict(), "versions": versions(), **(manifest or {})}
            record.update(step=state.step if state else 0, has_optimizer=optimizer is not None)
            publish(temporary, final, record)
        _barrier()
    except Exception as error:
        if main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise PrismError(f"saving {final} failed ({error}); earlier checkpoints are untouched") from error


def read_architecture(checkpoint: Path) -> Architecture:
    """The architecture that a checkpoint holds.

    Raises:
        InputError: If it is not a complete checkpoint.
    """
    return Architecture.from_dict(read_manifest(checkpoint)["architecture"])


def load(checkpoint: Path, model: torch.nn.Module, optimizer: Any = None) -> TrainState:
    """Load weights, and optimizer and state when an optimizer is given, at whatever layout this process group has.

    Args:
        checkpoint: A published checkpoint.
        model: This rank's unwrapped model; filled in place.
        optimizer: Megatron optimizer to fill, or None for weights only.

    Returns:
        The saved state (a fresh one when only weights were asked for).

    Raises:
        InputError: If the checkpoint is incomplete, or lacks the optimizer that was asked for.
    """
    manifest = read_manifest(checkpoint)
    different = Architecture.from_dict(manifest["architecture"]).differences(model.architecture)  # type: ignore[arg-type]
    if different:
        raise InputError(f"{checkpoint}: holds another architecture than the model: {'; '.join(different)}")
    metadata = sharding_metadata()
    wanted: dict[str, Any] = {"model": model.sharded_state_dict(metadata=metadata)}  # type: ignore[operator]
    if optimizer is not None:
        if not manifest.get("has_optimizer"):
            raise InputError(f"{checkpoint}: holds weights only, so training cannot resume from it; use init_from")
        wanted["optimizer"] = optimizer.sharded_state_dict(wanted["model"], is_loading=True, metadata=metadata)
    loaded = dist_checkpointing.load(wanted, str(checkpoint))
    missing, unexpected = model.load_state_dict(loaded["model"], strict=False)
    missing = [name for name in missing if not name.endswith("_extra_state")]
    unexpected = [name for name in unexpected if not name.endswith("_extra_state")]
    if missing or unexpected:
        raise InputError(f"{checkpoint}: does not fit the model: missing {missing[:3]}, unexpected {unexpected[:3]}")
    if optimizer is None:
        return TrainState()
    optimizer.load_state_dict(loaded["optimizer"])
    saved = dict(loaded["state"])
    rng, layout = saved.pop("rng"), saved.pop("layout")
    if layout == _layout():
        torch.set_rng_state(rng[dist.get_rank()])
    return TrainState(**saved)


def find_latest(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None.

    Incomplete directories are passed over: a run that was killed while saving continues from the one before.
    """
    for path in sorted(checkpoints.glob("step_*"), reverse=True):
        try:
            read_manifest(path)
        except InputError:
            continue
        return path
    return None


def set_aside_damaged(checkpoints: Path, latest: Path | None) -> None:
    """Rename the step directories that are newer than `latest`: they are damaged, or they would be the latest.

    A run that continues from the one before would otherwise find the name taken when it gets to that step again, and
    might count a damaged checkpoint among those worth keeping. Every rank must call this.
    """
    if dist.get_rank() == 0:
        for path in sorted(checkpoints.glob("step_*")):
            if ".tmp-" not in path.name and (latest is None or path.name > latest.name):
                path.rename(path.with_name(f"damaged_{path.name}_{os.getpid()}"))
    _barrier()


def step_directory(checkpoints: Path, step: int) -> Path:
    """Name of the checkpoint of a step; sorts in step order."""
    return checkpoints / f"step_{step:08d}"


def remove_old(checkpoints: Path, keep: int) -> None:
    """Delete all but the newest `keep` complete checkpoints."""
    complete = sorted(p for p in checkpoints.glob("step_*") if ".tmp-" not in p.name)
    for path in complete[: max(0, len(complete) - keep)]:
        shutil.rmtree(path, ignore_errors=True)
