"""What the tests of prism_nemo.checkpoint run in processes of their own; module-level, so that they can be pickled."""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from prism_nemo.checkpoint import convert, exporting, importing, native
from prism_nemo.checkpoint.exporting import export_worker
from prism_nemo.checkpoint.hf import HFReader
from prism_nemo.checkpoint.hf_writer import DEFAULT_SHARD_BYTES
from prism_nemo.checkpoint.importing import import_worker
from prism_nemo.config import OptimizerConfig, ParallelConfig
from prism_nemo.models.family import read_hf_config
from prism_nemo.models.weights import FusedQKV, Run
from prism_nemo.runtime import start, stop


def swap_key_and_value() -> None:
    """Break the mapping the same way in both directions, so that a round trip cannot see it."""
    right, other = FusedQKV.runs, {0: 0, 1: 2, 2: 1}

    def runs(self: FusedQKV, rank: int, size: int) -> tuple[Run, ...]:
        return tuple(Run(other[run.source], run.start, run.rows) for run in right(self, rank, size))  # type: ignore[index]

    FusedQKV.runs = runs  # type: ignore[method-assign]


def import_with_swapped_key_and_value(hf_dir: str, out: str) -> None:
    swap_key_and_value()
    import_worker(hf_dir, out, read_hf_config(Path(hf_dir)), False, {}, ParallelConfig())


def export_with_swapped_key_and_value(checkpoint: str, out: str) -> None:
    swap_key_and_value()
    architecture = native.read_architecture(Path(checkpoint))
    export_worker(checkpoint, out, architecture, None, None, DEFAULT_SHARD_BYTES, ParallelConfig())


def loss_and_padding_gradient(hf_dir: str, tokens: torch.Tensor, parallel: ParallelConfig) -> tuple[torch.Tensor, Any]:
    """Loss per position, and the largest gradient that any rank's padding rows of the output layer receive."""
    from prism_nemo.models.build import build_model
    from prism_nemo.models.forward import positions

    runtime = start(parallel, seed=0)
    architecture = read_hf_config(Path(hf_dir))
    model = build_model(architecture, runtime)
    tp = parallel.tensor_model_parallel_size
    convert.load_hf_weights(model, architecture, HFReader(Path(hf_dir)), tp)
    loss = model(tokens[:, :-1], positions(tokens[:, :-1]), None, labels=tokens[:, 1:])
    loss.sum().backward()
    padding = model.output_layer.weight.grad[model.real_rows :]
    padded: list[Any] = [None] * runtime.world_size
    dist.all_gather_object(padded, (len(padding), padding.abs().max().item() if len(padding) else 0.0))
    stop()
    return loss.detach(), padded


def saved_by_training(
    hf_dir: str, checkpoints: str, parallel: ParallelConfig, steps: list[int]
) -> dict[int, torch.Tensor]:
    """Checkpoints with optimizer and state, as a training loop writes them (no update is made).

    Returns:
        By step, what the generator gives first after that save.
    """
    trainer, architecture = _trainer(hf_dir, parallel)
    drawn = {}
    for step in steps:
        _save(trainer, architecture, native.step_directory(Path(checkpoints), step), step)
        drawn[step] = torch.rand(3)
    stop()
    return drawn


def state_after_load(hf_dir: str, checkpoint: str, parallel: ParallelConfig) -> dict[str, Any]:
    """Load with optimizer; what came back."""
    trainer, _ = _trainer(hf_dir, parallel, fill=False)
    state = native.load(Path(checkpoint), trainer.raw, trainer.optimizer)
    drawn = torch.rand(3)
    weight = trainer.raw.decoder.final_layernorm.weight.detach().clone() if trainer.raw.post_process else None
    stop()
    return {"state": vars(state), "drawn": drawn, "final_norm": weight}


def save_with_moments(hf_dir: str, out: str, parallel: ParallelConfig) -> None:
    """A checkpoint whose Adam moments are numbered element by element, each parameter in its own way."""
    trainer, architecture = _trainer(hf_dir, parallel)
    for name, key, state, first in _moments(trainer):
        with torch.no_grad():
            state.copy_(_numbered(name, key, first, state.numel()))
    _save(trainer, architecture, Path(out), 1)
    stop()


def wrong_moments_after_load(hf_dir: str, checkpoint: str, parallel: ParallelConfig) -> list[str]:
    """Parameters, on any rank, that did not get their own moments or weights back."""
    trainer, _ = _trainer(hf_dir, parallel, fill=False)
    native.load(Path(checkpoint), trainer.raw, trainer.optimizer)
    wrong = [
        f"{name} {key}"
        for name, key, state, first in _moments(trainer)
        if not torch.equal(state, _numbered(name, key, first, state.numel()))
    ]
    wanted, _ = _trainer(hf_dir, parallel)
    for (name, ours), theirs in zip(trainer.raw.named_parameters(), wanted.raw.parameters(), strict=True):
        if not torch.equal(ours, theirs):
            wrong.append(f"{name} weights")
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, wrong)
    stop()
    return sorted({name for names in everyone for name in names})


def save_that_fails(hf_dir: str, checkpoints: str, step: int, how: str, rank: int, parallel: ParallelConfig) -> None:
    """A save in which `rank` fails after its files are on disk: 'full' (ENOSPC), 'error', or 'killed' (no cleanup)."""
    trainer, architecture = _trainer(hf_dir, parallel)
    real = native.dist_checkpointing.save

    def failing(content: Any, directory: str, **kwargs: Any) -> None:
        real(content, directory, **kwargs)
        if dist.get_rank() != rank:
            return
        if how == "killed":
            os._exit(137)
        if how == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        raise RuntimeError("the writer died")

    native.dist_checkpointing.save = failing
    _save(trainer, architecture, native.step_directory(Path(checkpoints), step), step)


def save_weights(hf_dir: str, out: str, times: int = 1) -> None:
    """Save weights only, `times` times under the same name."""
    trainer, architecture = _trainer(hf_dir, ParallelConfig())
    for _ in range(times):
        native.save(Path(out), trainer.raw, architecture)
    stop()


def load_into(hf_dir: str, checkpoint: str) -> None:
    """Load the weights into a model of another folder's shape."""
    trainer, _ = _trainer(hf_dir, ParallelConfig(), fill=False)
    native.load(Path(checkpoint), trainer.raw)
    stop()


def save_filled(hf_dir: str, out: str, parallel: ParallelConfig) -> None:
    """Save with Megatron's own writer a model that was filled from a folder; weights only."""
    trainer, architecture = _trainer(hf_dir, parallel)
    native.save(Path(out), trainer.raw, architecture)
    stop()


def loaded_parameters(checkpoint: str, parallel: ParallelConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Parameters of a model of type `dtype` after Megatron has loaded a checkpoint into it."""
    from prism_nemo.models.build import build_model

    runtime = start(parallel, seed=0, dtype=dtype)
    model = build_model(native.read_architecture(Path(checkpoint)), runtime)
    native.load(Path(checkpoint), model)
    stop()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def wrong_parameters_after_reading(hf_dir: str, parallel: ParallelConfig, dtype: torch.dtype) -> list[str]:
    """Parameters, on any rank, that reading by rows and columns did not fill with what whole tensors give."""
    from prism_nemo.checkpoint.placement import parameters_of
    from prism_nemo.models.build import build_model

    runtime = start(parallel, seed=0, dtype=dtype)
    architecture, reader = read_hf_config(Path(hf_dir)), HFReader(Path(hf_dir))
    model, tp = build_model(architecture, runtime), parallel.tensor_model_parallel_size
    convert.load_hf_weights(model, architecture, reader, tp)
    rank = importing.parallel_rank()
    wrong = [
        name
        for name, parameter, mapping, sources in parameters_of(model, architecture, tp)
        if not torch.equal(
            parameter, mapping.to_megatron(tuple(reader.get(s) for s in sources), rank, tp).to(parameter.dtype)
        )
    ]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, wrong)
    stop()
    return sorted({name for names in everyone for name in names})


def allocated_by_description(hf_dir: str, parallel: ParallelConfig) -> tuple[list[str], int, float]:
    """Devices of the parameters of a described model, how many there are, and MB that describing it took."""
    from prism_nemo.checkpoint.placement import build_empty

    runtime = start(parallel, seed=0)
    before = psutil.Process().memory_info().rss
    model = build_empty(read_hf_config(Path(hf_dir)), runtime)
    grown = (psutil.Process().memory_info().rss - before) / 1e6
    parameters = list(model.parameters())
    stop()
    return sorted({p.device.type for p in parameters}), sum(p.numel() for p in parameters), grown


def import_in_chunks(hf_dir: str, out: str, limit: int) -> None:
    """An import whose chunks are of at most `limit` bytes."""
    importing.CHUNK_BYTES = limit
    import_worker(hf_dir, out, read_hf_config(Path(hf_dir)), False, {}, ParallelConfig())


def export_in_blocks(checkpoint: str, out: str, limit: int) -> None:
    """An export that reads at most `limit` bytes at a time."""
    real = exporting.blocks_of
    exporting.blocks_of = lambda shape, dtype: real(shape, dtype, limit)
    architecture = native.read_architecture(Path(checkpoint))
    export_worker(checkpoint, out, architecture, None, None, DEFAULT_SHARD_BYTES, ParallelConfig())


def import_that_fails(hf_dir: str, out: str, how: str, rank: int, parallel: ParallelConfig) -> None:
    """An import in which `rank` fails after some chunks: 'full' (ENOSPC) or 'error'."""
    real = importing.ChunkWriter.tensor

    def failing(self: Any, *args: Any) -> None:
        real(self, *args)
        if dist.get_rank() == rank and len(self.record.chunks) == 3:
            if how == "full":
                raise OSError(errno.ENOSPC, "No space left on device")
            raise RuntimeError("the reader died")

    importing.ChunkWriter.tensor = failing  # type: ignore[method-assign]
    import_worker(hf_dir, out, read_hf_config(Path(hf_dir)), False, {}, parallel)


def export_that_fails(checkpoint: str, out: str, rank: int, parallel: ParallelConfig) -> None:
    """An export in which `rank` finds the disk full while it writes a file."""
    real = exporting.write_file

    def failing(path: Path, tensors: Any) -> None:
        real(path, tensors)
        if dist.get_rank() == rank:
            raise OSError(errno.ENOSPC, "No space left on device")

    exporting.write_file = failing
    architecture = native.read_architecture(Path(checkpoint))
    export_worker(checkpoint, out, architecture, None, None, 60_000, parallel)


def _trainer(hf_dir: str, parallel: ParallelConfig, fill: bool = True) -> tuple[Any, Any]:
    from prism_nemo.training.trainer import Trainer

    runtime = start(parallel, seed=11)
    architecture = read_hf_config(Path(hf_dir))
    trainer = Trainer(architecture, runtime, OptimizerConfig(), 32, use_distributed_optimizer=True)
    if fill:
        reader = HFReader(Path(hf_dir))
        convert.load_hf_weights(trainer.raw, architecture, reader, parallel.tensor_model_parallel_size)
        trainer.optimizer.reload_model_params()
    return trainer, architecture


def _moments(trainer: Any) -> Iterator[tuple[str, str, torch.Tensor, int]]:
    """(name in the whole model, moment, this rank's part of it, index of its first element)."""
    first_layer = trainer.raw.decoder.layers[0].layer_number - 1
    trainer.optimizer.state_dict()  # gives the moments their tensors
    inner = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
    for name, parameter in trainer.raw.named_parameters():
        for optimizer in inner:
            if parameter not in optimizer.model_param_gbuf_map:
                continue
            part = optimizer._get_model_param_range_map(parameter)["param"]
            states = optimizer._get_main_param_and_optimizer_states(parameter)
            for key in ("exp_avg", "exp_avg_sq"):
                yield _whole_name(name, first_layer, trainer), key, states[key], part.start


def _whole_name(name: str, first_layer: int, trainer: Any) -> str:
    """A pipeline stage counts its layers from 0, and the last one has its own copy of a tied embedding."""
    if name.startswith("decoder.layers."):
        start, layer, rest = name.split(".", 3)[1:]
        return f"decoder.{start}.{int(layer) + first_layer}.{rest}"
    if name == "output_layer.weight" and trainer.architecture.tied_embeddings:
        return "embedding.word_embeddings.weight"
    return name


def _numbered(name: str, key: str, first: int, size: int) -> torch.Tensor:
    seed = zlib.crc32(f"{name} {key}".encode()) % 1000
    return 1.0 + seed + torch.arange(first, first + size, dtype=torch.float32) / 2**13


def _save(trainer: Any, architecture: Any, path: Path, step: int) -> None:
    state = native.TrainState(step, 10 * step, 1000 * step, 0.5, {"cursor": [step]})
    native.save(path, trainer.raw, architecture, trainer.optimizer, state)
