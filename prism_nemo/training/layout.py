"""Layouts and batches that cannot work together, refused before processes start with those that can."""

from __future__ import annotations

from prism_nemo.config import ParallelConfig
from prism_nemo.errors import InputError
from prism_nemo.models.family import Architecture


def check_layout(architecture: Architecture, layout: ParallelConfig, distributed_optimizer: bool) -> None:
    """Refuse a layout that a model cannot have, or of which something would be ignored.

    Args:
        architecture: Of the model.
        layout: Over processes.
        distributed_optimizer: Whether the optimizer's state is cut over data-parallel ranks.

    Raises:
        InputError: Naming the key and what works.
    """
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "data_parallel_size",
        "context_parallel_size",
        "virtual_pipeline_model_parallel_size",
    ):
        if getattr(layout, name) < 1:
            raise InputError(f"parallel.{name}: {getattr(layout, name)} must be at least 1")
    architecture.check_layout(
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
        layout.context_parallel_size,
        layout.virtual_pipeline_model_parallel_size,
    )
    if layout.sequence_parallel and layout.tensor_model_parallel_size == 1:
        raise InputError(
            "parallel.sequence_parallel shares tokens over tensor-parallel ranks: it needs tensor_model_parallel_size "
            f"2 or more ({architecture.tensor_parallel_sizes()} fit this model), or leave it off"
        )
    if layout.overlap_param_gather and not distributed_optimizer:
        raise InputError(
            "parallel.overlap_param_gather: only the distributed optimizer scatters parameters; set "
            "use_distributed_optimizer=true, or leave it off"
        )
    if layout.overlap_param_gather and not layout.overlap_grad_reduce:
        raise InputError("parallel.overlap_param_gather needs parallel.overlap_grad_reduce=true as well")
    if layout.bucket_size is not None and not layout.overlap_grad_reduce:
        raise InputError(
            "parallel.bucket_size: without parallel.overlap_grad_reduce there is one bucket; set both or none"
        )
    if layout.bucket_size is not None and layout.bucket_size < 1:
        raise InputError(f"parallel.bucket_size: {layout.bucket_size} must be at least 1, or null")


def check_batch(layout: ParallelConfig, seq_length: int, micro_batch_size: int, global_batch_size: int) -> None:
    """Refuse batches that a layout cannot share out.

    Args:
        layout: Over processes.
        seq_length: Tokens of a row.
        micro_batch_size: Rows of a micro-batch.
        global_batch_size: Rows of a step.

    Raises:
        InputError: Naming the key and what works.
    """
    dp, pp = layout.data_parallel_size, layout.pipeline_model_parallel_size
    tp, cp = layout.tensor_model_parallel_size, layout.context_parallel_size
    if global_batch_size % (micro_batch_size * dp):
        raise InputError(
            f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size} x "
            f"data_parallel_size {dp}"
        )
    if layout.sequence_parallel and seq_length % (cp * tp):
        also = "" if cp == 1 else f" x context_parallel_size {cp}"
        raise InputError(
            f"seq_length {seq_length} is not a multiple of tensor_model_parallel_size {tp}{also} (sequence_parallel); "
            f"{_near(seq_length, cp * tp)} would be"
        )
    if seq_length % cp:
        raise InputError(
            f"seq_length {seq_length} is not a multiple of context_parallel_size {cp}; {_near(seq_length, cp)} would be"
        )
    micro_batches = global_batch_size // (micro_batch_size * dp)
    if layout.virtual_pipeline_model_parallel_size > 1 and micro_batches % pp:
        unit = micro_batch_size * dp * pp
        raise InputError(
            f"virtual_pipeline_model_parallel_size {layout.virtual_pipeline_model_parallel_size} deals micro-batches "
            f"in rounds of pipeline_model_parallel_size {pp}, but a step has {micro_batches}; global_batch_size "
            f"{_near(global_batch_size, unit)} would do, or virtual_pipeline_model_parallel_size 1"
        )


def _near(value: int, unit: int) -> int:
    return max(1, round(value / unit)) * unit
