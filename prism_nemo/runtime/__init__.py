"""The machine, hidden behind one seam: `start()` gives device, process groups, seeds and precision.

Nothing else in the library asks whether CUDA is present.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist

from prism_nemo.config import ParallelConfig, PrecisionConfig
from prism_nemo.errors import InputError
from prism_nemo.quiet import quiet

T = TypeVar("T")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Runtime:
    """What this process is: its device, its place in the layout, and which kernels it may use."""

    device: torch.device
    parallel: ParallelConfig
    rank: int
    world_size: int
    dtype: torch.dtype
    transformer_engine: bool
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and progress."""
        return self.rank == 0


def start(
    parallel: ParallelConfig,
    seed: int,
    dtype: torch.dtype | None = None,
    precision: PrecisionConfig | None = None,
) -> Runtime:
    """Join the process group, lay out Megatron's parallel groups, seed every generator.

    Reads torchrun's environment (RANK, WORLD_SIZE, MASTER_ADDR, ...); without it, this is the only process.

    Args:
        parallel: The layout; its product must equal the number of processes.
        seed: Seeds the weights (equal on all data-parallel ranks) and dropout.
        dtype: Parameter type; that of `precision` when not given.
        precision: What to compute in; by default fp32 on CPU, bf16 on GPU and no FP8.

    Returns:
        The runtime of this process.

    Raises:
        InputError: If the layout does not match the number of processes.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    if parallel.world_size != world_size:
        raise InputError(
            f"layout {parallel.describe()} needs {parallel.world_size} processes, but {world_size} were started"
        )
    quiet()
    precision = precision or PrecisionConfig()
    cuda = torch.cuda.is_available()
    if dtype is None:
        dtype = DTYPES[precision.dtype or ("bf16" if cuda else "fp32")]
    if cuda:
        from prism_nemo.runtime.cuda import has_transformer_engine, select_device

        device, te = select_device(), has_transformer_engine()
    else:
        from prism_nemo.runtime import cpu

        cpu.adapt()
        device, te = torch.device("cpu"), False
        if world_size > 1:
            torch.set_num_threads(1)  # more threads than cores was seen to cost a factor of ten

    from prism_nemo.runtime import faults

    faults.mend()

    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not dist.is_initialized():
        if world_size == 1 and "MASTER_ADDR" not in os.environ:
            dist.init_process_group("nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=world_size)
    virtual = parallel.virtual_pipeline_model_parallel_size
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return Runtime(
        device=device,
        parallel=parallel,
        rank=rank,
        world_size=world_size,
        dtype=dtype,
        # Emulated FP8 goes into Megatron's own linear layers.
        transformer_engine=te and precision.fp8 != "emulate",
        precision=precision,
    )


def gather(value: T) -> list[T]:
    """The values of all data-parallel ranks, in their order, on each of them."""
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group()
    values = [value] * group.size()
    if group.size() > 1:
        dist.all_gather_object(values, value, group=group)
    return values


def stop() -> None:
    """Leave the process groups."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
