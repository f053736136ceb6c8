"""Native checkpoints: Megatron's distributed format, reshardable to any layout, saved atomically."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from torch.distributed.checkpoint.api import CheckpointException

from prism_nemo.checkpoint.atomic import HASHES, MANIFEST, publish, read_manifest, remove_leftovers, temporary_name
from prism_nemo.checkpoint.hashes import files_below, shared_hashes
from prism_nemo.errors import InputError, PrismError
from prism_nemo.models.family import Architecture
from prism_nemo.run import versions

_FULL = 2**20  # bytes; nothing that a checkpoint is made of fits into less


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
        # Otherwise a save gathers every bucket in fp32 on every rank's device (distrib_optimizer.py:1077), and without
        # overlap a bucket is nearly the whole rank. Only data-parallel rank 0 writes: only it needs it, in host memory.
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _layout() -> list[int]:
    context = parallel_state.get_context_parallel_world_size()
    return [
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(),
        # Checkpoints from before context parallelism end here.
        *([context] if context > 1 else []),
    ]


def _barrier() -> None:
    if dist.get_world_size() > 1:
        dist.barrier()


def generators() -> dict[str, Any]:
    """State of this rank's random generators: torch's, and those that Megatron switches between."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    states: dict[str, Any] = {"torch": torch.get_rng_state(), "tracker": dict(get_cuda_rng_tracker().get_states())}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_generators(states: dict[str, Any] | torch.Tensor) -> None:
    """Put back what `generators` gave; checkpoints of version 0.1 hold torch's state alone."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    if isinstance(states, torch.Tensor):
        states = {"torch": states}
    torch.set_rng_state(states["torch"])
    if states.get("tracker"):
        get_cuda_rng_tracker().set_states(states["tracker"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _cause(error: BaseException, folder: Path) -> str:
    """An error in a few words; Megatron hands on those of its writers inside others."""
    text = str(error)
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text
    if not full and "unexpected pos" in text:
        # torch's writer of archives, when a write was cut short, says only that it is not where it should be.
        full = shutil.disk_usage(folder.parent).free < _FULL
    if full:
        return "No space left on device: the disk is full"
    failures = getattr(error, "failures", None)
    if failures:
        rank, wrapped = next(iter(failures.items()))
        return f"rank {rank}: {wrapped[0]}"
    return text or type(error).__name__


@dataclass
class Begun:
    """A save whose folder exists and whose tensors are collected, but not written.

    Attributes:
        final: Name that it gets when it is complete.
        temporary: Folder that is written into.
        content: For `megatron.core.dist_checkpointing.save`.
        record: Values for the manifest.
    """

    final: Path
    temporary: Path
    content: dict[str, Any]
    record: dict[str, Any]


def begin(
    final: Path,
    model: torch.nn.Module,
    architecture: Architecture,
    optimizer: Any = None,
    state: TrainState | None = None,
    manifest: dict[str, Any] | None = None,
) -> Begun:
    """Make the temporary folder of a save and collect what goes into it; arguments and errors as those of `save`."""
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
        if content["optimizer"].get("param_state", True) is None:  # gathered on another rank; Megatron would warn
            del content["optimizer"]["param_state"]
    if state is not None:
        rng: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(rng, generators())
        # Megatron saves rank 0's copy and complains about any other; clocks differ between ranks.
        values = [vars(state)]
        dist.broadcast_object_list(values, src=0)
        content["state"] = {**values[0], "rng": rng, "layout": _layout()}
    record = {"architecture": architecture.to_dict(), "versions": versions(), **(manifest or {})}
    record.update(step=state.step if state else 0, has_optimizer=optimizer is not None)
    return Begun(final, temporary, content, record)


@contextmanager
def explained(begun: Begun) -> Iterator[None]:
    """While a save is written: an error, on whatever rank, removes the folder and becomes one with its cause.

    Raises:
        PrismError: With the cause; what was there before is untouched.
    """
    try:
        try:
            yield
        except CheckpointException as error:
            # No Exception to Python, and only rank 0 is told the cause; but it is raised on every rank.
            causes = [_cause(error, begun.temporary)]
            dist.broadcast_object_list(causes, src=0)
            raise PrismError(causes[0]) from error
    except Exception as error:
        cause = _cause(error, begun.temporary)
        if dist.get_rank() == 0:
            shutil.rmtree(begun.temporary, ignore_errors=True)
        raise PrismError(f"saving {begun.final} failed ({cause}); earlier checkpoints are untouched") from error


def complete(begun: Begun, known: dict[str, str] | None = None) -> None:
    """Hash what was written and give it its final name; every rank must call it, inside `explained`.

    Args:
        begun: All its files are written.
        known: SHA-256 of files that this rank has hashed already; another rank's may be missing.
    """
    _barrier()
    hashes = shared_hashes(begun.temporary, files_below(begun.temporary), known)
    if dist.get_rank() == 0:
        publish(begun.temporary, begun.final, {**begun.record, HASHES: hashes})
    _barrier()


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
        InputError: If `final` exists or cannot be created.
        PrismError: If the save failed; what was there before is untouched.
    """
    begun = begin(final, model, architecture, optimizer, state, manifest)
    with explained(begun):
        dist_checkpointing.save(begun.content, str(begun.temporary), content_metadata=None)
        complete(begun)


def read_architecture(checkpoint: Path) -> Architecture:
    """The architecture that a checkpoint holds.

    Raises:
        InputError: If it is not a complete checkpoint.
    """
    return _architecture_of(checkpoint, read_manifest(checkpoint))


def _architecture_of(checkpoint: Path, manifest: dict[str, Any]) -> Architecture:
    if "architecture" in manifest:
        return Architecture.from_dict(manifest["architecture"])
    if "mixture" in manifest:  # built data has a manifest.json too
        raise InputError(
            f"{checkpoint}: holds tokens (of 'prism-nemo data build'), not a checkpoint; its place is data.path"
        )
    raise InputError(f"{checkpoint}: is not a checkpoint: its {MANIFEST} names no architecture")


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
    different = _architecture_of(checkpoint, manifest).differences(model.architecture)  # type: ignore[arg-type]
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
        restore_generators(rng[dist.get_rank()])
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


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that nobody takes it for one and its name is free; rank 0 calls this."""
    aside = checkpoint.with_name(f"damaged_{checkpoint.name}_{os.getpid()}")
    checkpoint.rename(aside)
    return aside


def set_aside_damaged(checkpoints: Path, latest: Path | None) -> list[str]:
    """Rename the step directories that are newer than `latest`: they are damaged, or they would be the latest.

    A run that continues from the one before would otherwise find the name taken when it gets to that step again, and
    might count a damaged checkpoint among those worth keeping. Every rank must call this.

    Returns:
        What was wrong, a line for each; on rank 0 only.
    """
    found = []
    if dist.get_rank() == 0:
        for path in sorted(checkpoints.glob("step_*")):
            if ".tmp-" not in path.name and (latest is None or path.name > latest.name):
                try:
                    read_manifest(path)
                    cause = "damaged"
                except InputError as error:
                    cause = str(error)
                found.append(f"{cause} (kept as {set_aside(path).name})")
    _barrier()
    return found


def step_directory(checkpoints: Path, step: int) -> Path:
    """Name of the checkpoint of a step; sorts in step order."""
    return checkpoints / f"step_{step:08d}"
