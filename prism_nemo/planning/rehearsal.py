"""Every rank's real module, gradient buffers and optimizer at full size, without memory, GPUs or other processes.

The rank's place is given by a process group that only pretends to communicate, its memory by torch's meta device; what
is built is what `prism_nemo.training.trainer.Trainer` builds. One pipeline then runs a micro-batch forward and
backward, stage by stage, and what it keeps and computes is counted.

This changes the state of its process (Megatron's groups, the adaptation to the CPU), so it runs in one of its own.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import resource
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from prism_nemo.config import OptimizerConfig, ParallelConfig
from prism_nemo.models.family import Architecture
from prism_nemo.planning.layouts import model_overrides


@dataclass(frozen=True)
class RankCount:
    """What one rank holds, counted on its tensors.

    Attributes:
        rank: Of all processes.
        tensor, pipeline, data, context: Its place in the layout.
        parameters: Elements.
        whole_parameters: Those of them that other tensor-parallel ranks hold too (norms, B and C of few groups).
        tied_copy: Elements of a second copy of the embedding, on the last stage of a model that ties it.
        parameter_bytes: Of the buffer that the parameters lie in, padding included.
        gradient_bytes: Of the gradients' buffer.
        optimizer_bytes: Of this rank's fp32 parameters and both moments.
        buckets: Elements of each of the buffer's buckets.
    """

    rank: int
    tensor: int
    pipeline: int
    data: int
    context: int
    parameters: int
    whole_parameters: int
    tied_copy: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    buckets: tuple[int, ...]


@dataclass(frozen=True)
class StageCount:
    """One micro-batch through one stage, counted on one rank of it.

    Attributes:
        stage: Of the pipeline.
        forward_flops, backward_flops: Whole squares of attention scores, as FlopCounterMode counts.
        kept_bytes: Of all storages that the forward pass keeps for the backward pass and that are no parameters.
    """

    stage: int
    forward_flops: int
    backward_flops: int
    kept_bytes: int


@dataclass(frozen=True)
class Rehearsal:
    """All of it.

    Attributes:
        ranks: One entry for each process.
        stages: One entry for each pipeline stage.
        seconds: That it took, without starting the process.
        peak_bytes: Largest resident memory of its process.
    """

    ranks: tuple[RankCount, ...]
    stages: tuple[StageCount, ...]
    seconds: float
    peak_bytes: int

    @property
    def parameters(self) -> int:
        """Of the whole model: what is held by several ranks counts once. Padding of the vocabulary is included."""
        one_replica = [r for r in self.ranks if r.data == r.context == 0]
        return sum(r.parameters - r.tied_copy - (r.whole_parameters if r.tensor else 0) for r in one_replica)

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {**asdict(self), "parameters": self.parameters}


def rehearse(
    architecture: Architecture,
    layout: ParallelConfig,
    seq_length: int,
    micro_batch_size: int,
    recompute: str = "none",
    distributed_optimizer: bool = True,
    precision: str = "bf16",
) -> Rehearsal:
    """Build every rank in a process of its own.

    Args:
        architecture: The model.
        layout: Of the processes; must fit (`Architecture.check_layout`).
        seq_length: Tokens of a row.
        micro_batch_size: Rows.
        recompute: "none", "selective" or "full".
        distributed_optimizer: Whether the optimizer's state is cut over data-parallel ranks.
        precision: "bf16", or "fp32" as on the CPU.
    """
    from prism_nemo.runtime.launch import launch

    result: Rehearsal = launch(
        _rehearse, architecture, layout, seq_length, micro_batch_size, recompute, distributed_optimizer, precision
    )
    return result


def _rehearse(
    a: Architecture,
    layout: ParallelConfig,
    seq_length: int,
    micro_batch_size: int,
    recompute: str,
    distributed_optimizer: bool,
    precision: str,
) -> Rehearsal:
    import torch

    from prism_nemo.quiet import quiet
    from prism_nemo.runtime import cpu, faults

    quiet()
    began = time.perf_counter()
    cpu.adapt()
    faults.mend()
    from megatron.core.distributed import DistributedDataParallel

    DistributedDataParallel.broadcast_params = lambda self: None  # a call per parameter, to nobody
    torch.set_num_threads(1)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    overrides = model_overrides(recompute)
    ranks, stages = [], []
    gc.freeze()
    gc.disable()  # it would walk through Megatron's modules again and again; each rank is collected at its end
    try:
        with cpu.allocating_on(torch.device("meta")):
            for rank in range(layout.world_size):
                with _pretend(layout, rank) as place:
                    trainer = _build(a, layout, rank, seq_length, dtype, distributed_optimizer, overrides)
                    ranks.append(_count(trainer, rank, place))
                    if place[0] == place[2] == place[3] == 0:
                        stages.append(_run(trainer, place[1], seq_length, micro_batch_size))
                    del trainer
                if rank % 16 == 15:
                    gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Rehearsal(tuple(ranks), tuple(stages), time.perf_counter() - began, peak)


@contextlib.contextmanager
def _pretend(layout: ParallelConfig, rank: int) -> Iterator[tuple[int, int, int, int]]:
    """While open, this process is that rank of a group that does not communicate.

    Its place is given: (tensor, pipeline, data, context).
    """
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    importlib.import_module("torch.distributed._tools.fake_collectives")  # lets the group take tensors without memory
    virtual = layout.virtual_pipeline_model_parallel_size
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor_model_parallel_size,
            pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
            context_parallel_size=layout.context_parallel_size,
            create_gloo_process_groups=False,
        )
        # Groups of the gloo backend would look for their peers.
        for name in [name for name in vars(parallel_state) if name.endswith("_GLOO")]:
            setattr(parallel_state, name, getattr(parallel_state, name.removesuffix("_GLOO")))
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        yield (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_pipeline_model_parallel_rank(),
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_context_parallel_rank(),
        )
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _build(
    a: Architecture,
    layout: ParallelConfig,
    rank: int,
    seq_length: int,
    dtype: Any,
    distributed_optimizer: bool,
    overrides: dict[str, Any],
) -> Any:
    import torch

    from prism_nemo.errors import PrismError
    from prism_nemo.runtime import Runtime
    from prism_nemo.training.trainer import Trainer

    meta = torch.device("meta")
    runtime = Runtime(meta, layout, rank, layout.world_size, dtype, transformer_engine=False)
    with meta:
        # Asked for CPU initialisation, Megatron names no device and the context decides.
        trainer = Trainer(
            a,
            runtime,
            OptimizerConfig(),
            seq_length,
            distributed_optimizer,
            use_cpu_initialization=True,
            # There are no values to draw; perform_initialization=False would also leave out the marks of what is cut.
            init_method=_draw_nothing,
            output_layer_init_method=_draw_nothing,
            embedding_init_method=_draw_nothing,
            **overrides,
        )
    real = [name for name, p in trainer.raw.named_parameters() if not p.is_meta]
    if real or not all(buffer.grad_data.is_meta for part in trainer.parts for buffer in part.buffers):
        raise PrismError(f"memory was allocated in a rehearsal: {real[:3] or 'gradient buffers'}")
    return trainer


def _draw_nothing(weight: Any) -> None:
    """In place of an initialisation."""


def _count(trainer: Any, rank: int, place: tuple[int, int, int, int]) -> RankCount:
    buffers = [buffer for part in trainer.parts for buffer in part.buffers]
    parameters = list(trainer.raw.parameters())
    modules = [_unwrapped(part) for part in trainer.parts]
    tied = [p for m in modules for p in m.parameters() if getattr(p, "shared_embedding", False) and not m.pre_process]
    held = [p for p in parameters if not getattr(p, "tensor_model_parallel", False)]
    if buffers[0].param_data is not None:
        parameter_bytes = sum(buffer.param_data.nbytes for buffer in buffers)
    else:
        parameter_bytes = sum(p.nbytes for p in parameters)
    return RankCount(
        rank,
        *place,
        parameters=sum(p.numel() for p in parameters),
        whole_parameters=sum(p.numel() for p in held),
        tied_copy=sum(p.numel() for p in tied),
        parameter_bytes=parameter_bytes,
        gradient_bytes=sum(buffer.grad_data.nbytes for buffer in buffers),
        optimizer_bytes=_optimizer_bytes(trainer),
        buckets=tuple(b.grad_data.numel() for buffer in buffers for b in buffer.buckets),
    )


def _optimizer_bytes(trainer: Any) -> int:
    """Of the fp32 parameters that the optimizer has beside the model's, and of Adam's two moments.

    The moments are made by the first update, with the shapes of the parameters that it updates.
    """
    model = {p.untyped_storage()._cdata for p in trainer.raw.parameters()}
    total = 0
    for optimizer in getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer]):
        for group in optimizer.optimizer.param_groups:
            for p in group["params"]:
                copies = 2 if p.untyped_storage()._cdata in model else 3
                total += copies * p.nbytes
    return total


def _unwrapped(part: Any) -> Any:
    """The language model inside a part's wrappers for gradients and types."""
    while hasattr(part, "module"):
        part = part.module
    return part


def _run(trainer: Any, stage: int, seq_length: int, rows: int) -> StageCount:
    """One micro-batch forward and backward through this rank's part, or parts, of the model."""
    counts = [_run_part(trainer, part, seq_length, rows) for part in trainer.parts]
    forward, backward, kept = (sum(values) for values in zip(*counts, strict=True))
    return StageCount(stage, forward, backward, kept)


def _run_part(trainer: Any, part: Any, seq_length: int, rows: int) -> tuple[int, int, int]:
    """FLOPs of the forward and of the backward pass, and bytes kept between them."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from prism_nemo.planning.meta_kernels import gpu_kernels

    raw, model, meta = _unwrapped(part), part.module, torch.device("meta")
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that no other storage gets its number
        return tensor

    model.train()
    torch.compiler.set_stance("force_eager")  # Megatron compiles small functions; there is nothing to run faster here
    share = seq_length // raw.config.context_parallel_size
    length = share // raw.config.tensor_model_parallel_size if raw.config.sequence_parallel else share
    with meta, gpu_kernels():
        tokens = torch.empty(rows, share, dtype=torch.int64)
        positions = torch.empty(rows, share, dtype=torch.int64)
        if not raw.pre_process:
            received = torch.empty(length, rows, raw.config.hidden_size, dtype=raw.config.params_dtype)
            raw.set_input_tensor(received.requires_grad_())
        with FlopCounterMode(display=False) as forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            output = model(tokens, positions, None, labels=tokens if raw.post_process else None)
        for p in trainer.raw.parameters():
            kept.pop(p.untyped_storage()._cdata, None)
        kept_bytes = sum(storage.nbytes() for storage in kept.values())
        kept.clear()
        with FlopCounterMode(display=False) as backward:
            output.backward(torch.empty_like(output))
    return forward.get_total_flops(), backward.get_total_flops(), kept_bytes
