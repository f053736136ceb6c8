"""Import and export: what the two commands check before any work, and how they start it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from prism_nemo.checkpoint.exporting import export_worker
from prism_nemo.checkpoint.hf import HFReader, blocks_of
from prism_nemo.checkpoint.hf_writer import DEFAULT_SHARD_BYTES
from prism_nemo.checkpoint.importing import ImportReport, fill_world, import_worker
from prism_nemo.checkpoint.native import read_architecture
from prism_nemo.checkpoint.placement import parameters_of
from prism_nemo.config import ParallelConfig
from prism_nemo.errors import InputError
from prism_nemo.models.family import Architecture, read_hf_config, table_of
from prism_nemo.models.names import actual_name
from prism_nemo.models.weights import expand
from prism_nemo.runtime.launch import launch


def load_hf_weights(model: torch.nn.Module, architecture: Architecture, reader: HFReader, tp_size: int) -> None:
    """Fill this rank's parameters from a Hugging Face folder, reading only the rows and columns that it holds.

    Raises:
        InputError: If a tensor is missing or has the wrong shape.
    """
    from megatron.core import parallel_state

    rank = parallel_state.get_tensor_model_parallel_rank()
    for _, parameter, mapping, sources in parameters_of(model, architecture, tp_size):
        if mapping.local_shape(rank, tp_size) != tuple(parameter.shape):
            raise InputError(
                f"{reader.folder}: {', '.join(sources)} give shape {mapping.local_shape(rank, tp_size)}, but the model "
                f"has {tuple(parameter.shape)}"
            )
        dtype = reader.dtype(sources[0])
        for first, rows in blocks_of(tuple(parameter.shape), dtype):
            target = parameter.data[first : first + rows]
            direct = target.dtype == dtype and target.device.type == "cpu" and target.is_contiguous()
            block = target if direct else torch.empty((rows, *parameter.shape[1:]), dtype=dtype)
            reader.read_part(mapping, sources, rank, tp_size, first, block)
            if not direct:
                target.copy_(block)


def hf_tensors(model: torch.nn.Module, architecture: Architecture) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's weights under their Hugging Face names; the model must be whole on this rank (TP 1, PP 1)."""
    parameters = dict(model.named_parameters())
    for mapping, layer in expand(table_of(architecture)):
        name, targets = mapping.at(layer)
        yield from zip(targets, mapping.to_hf(parameters[actual_name(name, parameters)].detach()), strict=True)


def run(worker: Callable[..., Any], *args: Any) -> Any:
    """Run a worker, whose last argument is the layout, in the processes that torchrun or Slurm started.

    Where there are none, they are started here.
    """
    layout = fill_world(args[-1])
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return worker(*args[:-1], layout)
    return launch(worker, *args[:-1], layout, processes=layout.world_size)


def import_hf(
    hf_dir: Path,
    out: Path,
    parallel: ParallelConfig,
    strict: bool = False,
    dt_floor: float | None = None,
    source: str = "",
) -> ImportReport:
    """Hugging Face folder to native checkpoint, in the types of the folder.

    The layout decides only how the work is shared: the checkpoint loads at any layout.

    Args:
        hf_dir: The folder.
        out: Directory to create.
        parallel: The layout.
        strict: Refuse NaN and infinity; otherwise the tensors that hold them are reported.
        dt_floor: Smallest step size of the Mamba mixers (nemotron_h only); none if not given.
        source: Where the folder came from, for the manifest; the folder itself if not given.

    Returns:
        What was found.

    Raises:
        InputError: For a folder, layout, option or output that cannot be used; nothing was written.
        PrismError: If writing failed; nothing is left.
    """
    architecture = with_dt_floor(read_hf_config(hf_dir), dt_floor)
    architecture.check_layout(parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    HFReader(hf_dir).check(architecture)
    refuse_existing(out)
    record = {"imported_from": source or str(hf_dir), "dt_floor": dt_floor}
    report: ImportReport = run(import_worker, str(hf_dir), str(out), architecture, strict, record, parallel)
    return report


def with_dt_floor(architecture: Architecture, dt_floor: float | None) -> Architecture:
    """The architecture with a floor of the step size, also in the configuration that an export writes.

    Raises:
        InputError: For another family, or a floor that is no positive number.
    """
    if dt_floor is None:
        return architecture
    if architecture.family != "nemotron_h" or architecture.mamba is None:
        raise InputError(f"--dt-floor is for the nemotron_h family; this is {architecture.family}")
    if not 0 < dt_floor < math.inf:
        raise InputError(f"--dt-floor {dt_floor}: expected a positive number")
    limit = (dt_floor, architecture.mamba.dt_limit[1])
    return replace(
        architecture,
        mamba=replace(architecture.mamba, dt_limit=limit),
        hf_config={**architecture.hf_config, "time_step_limit": list(limit)},
    )


def export_hf(
    checkpoint: Path,
    out: Path,
    dtype: torch.dtype | None = None,
    tokenizer: Path | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Native checkpoint, saved at any layout, to a Hugging Face folder.

    Args:
        checkpoint: By `import_hf` or by a training stage.
        out: Folder to create.
        dtype: Of the weights; as stored if not given.
        tokenizer: Folder whose tokenizer files and generation settings are copied; those that the import carried along
            if not given.
        max_shard_bytes: Size that a file does not pass unless it holds a single tensor.

    Raises:
        InputError: If the checkpoint is incomplete or `out` exists; nothing was written.
        PrismError: If writing failed; nothing is left.
    """
    architecture = read_architecture(checkpoint)
    refuse_existing(out)
    folder = str(tokenizer) if tokenizer else None
    run(export_worker, str(checkpoint), str(out), architecture, dtype, folder, max_shard_bytes, ParallelConfig())


def refuse_existing(out: Path) -> None:
    """Refuse to write over anything.

    Raises:
        InputError: If there is something of that name.
    """
    if os.path.lexists(out):
        raise InputError(f"{out}: already exists; remove it or choose another name")
