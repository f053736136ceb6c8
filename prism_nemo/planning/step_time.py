"""Time of a step from a roofline: each kernel takes its FLOPs or its bytes, whichever takes longer at what is assumed.

    step = (micro-batches + stages - 1) x slowest stage + reduction of gradients + gathering of parameters + update

The first factor is the one-forward-one-backward schedule with its bubble (arXiv 2104.04473, section 2.2). Collectives
over n ranks move 2 (n - 1) / n of an all-reduced tensor through each rank, half of that for a reduce-scatter or an
all-gather. Nothing overlaps: neither the trainer's reduction of gradients nor Megatron's tensor-parallel collectives
are set to. Every efficiency is an assumption (`prism_nemo.planning.hardware.Assumptions`); nothing here was measured on
a GPU.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from prism_nemo.config import ParallelConfig
from prism_nemo.models.family import Architecture
from prism_nemo.planning.activations import Kernels, Shape, layer_activations, stage_layers
from prism_nemo.planning.flops import layer_flops
from prism_nemo.planning.hardware import GPU, Assumptions
from prism_nemo.planning.memory import Workload, state_bytes


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step and where they go.

    Attributes:
        gemm, attention, scan, elementwise: On the slowest stage, all micro-batches, recomputation included.
        tensor_parallel: Collectives of tensor parallelism on that stage.
        bubble: What the slowest stage waits for the others.
        pipeline: Sending activations between stages.
        data_parallel: Reducing gradients and gathering parameters.
        update: Of the optimizer.
    """

    gemm: float
    attention: float
    scan: float
    elementwise: float
    tensor_parallel: float
    bubble: float
    pipeline: float
    data_parallel: float
    update: float

    @property
    def step(self) -> float:
        """Seconds of the whole step."""
        return sum(asdict(self).values())

    def to_dict(self) -> dict[str, float]:
        """As plain values."""
        return {**asdict(self), "step": self.step}


@dataclass(frozen=True)
class _MicroBatch:
    """Seconds of one micro-batch on one stage, forward and backward."""

    gemm: float
    attention: float
    scan: float
    elementwise: float
    tensor_parallel: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def estimate_time(
    a: Architecture, layout: ParallelConfig, work: Workload, gpu: GPU, assumed: Assumptions, kernels: Kernels
) -> StepTime:
    """Predict the time of a step; see the module for what is assumed."""
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    many = work.micro_batches(layout)
    stages = [_micro_batch(a, layout, work, gpu, assumed, kernels, s) for s in range(pp)]
    slowest = max(stages, key=lambda s: s.total)
    shape = Shape.of(layout, work.micro_batch_size, work.seq_length)
    # Ranks are ordered tensor, data, pipeline: neighbours of a pipeline are the farthest apart.
    residual = shape.residual_tokens * a.hidden_size * kernels.value
    hop = residual / _bandwidth(gpu, assumed, layout.world_size > assumed.gpus_per_node)
    pipeline = 2 * hop * (many + pp - 1) if pp > 1 else 0.0
    return StepTime(
        many * slowest.gemm,
        many * slowest.attention,
        many * slowest.scan,
        many * slowest.elementwise,
        many * slowest.tensor_parallel,
        sum(s.total for s in stages) - slowest.total,
        pipeline,
        *_end_of_step(a, layout, work, gpu, assumed, kernels, tp),
    )


def _end_of_step(
    a: Architecture,
    layout: ParallelConfig,
    work: Workload,
    gpu: GPU,
    assumed: Assumptions,
    kernels: Kernels,
    tp: int,
) -> tuple[float, float]:
    """Seconds of the data-parallel collectives and of the update, on the stage with the most parameters."""
    pp, dp = layout.pipeline_model_parallel_size, layout.data_parallel_size
    states = [state_bytes(a, layout, s, work.distributed_optimizer, kernels.value) for s in {0, pp - 1}]
    state = max(states, key=lambda s: s.gradients)
    # Gradients are reduced in fp32; parameters are gathered only where the optimizer's state is cut.
    moved = state.gradients + state.parameters if work.distributed_optimizer else 2 * state.gradients
    speed = _bandwidth(gpu, assumed, tp * dp > assumed.gpus_per_node)
    # Adam reads and writes its copy and both moments, and reads the gradient.
    touched = 2 * state.optimizer + state.gradients // (dp if work.distributed_optimizer else 1)
    return (dp - 1) / dp * moved / speed, touched / (gpu.memory_bandwidth * assumed.memory_efficiency)


def _micro_batch(
    a: Architecture,
    layout: ParallelConfig,
    work: Workload,
    gpu: GPU,
    assumed: Assumptions,
    kernels: Kernels,
    stage: int,
) -> _MicroBatch:
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    shape = Shape.of(layout, work.micro_batch_size, work.seq_length)
    passes = 4 if work.recompute == "full" else 3  # a backward pass is two of the forward's size
    gemm = attention = scan = elementwise = collectives = 0.0
    pattern = stage_layers(a, pp, stage)
    hidden = shape.tokens * a.hidden_size * kernels.value
    for kind in sorted(set(pattern)):
        count = pattern.count(kind)
        flops = layer_flops(a, kind, [work.seq_length] * work.micro_batch_size, tp=tp)
        gemm += count * passes * flops.projections
        # Flash attention's backward pass computes the scores again: two and a half times the forward's FLOPs.
        attention += count * (passes + 0.5 + (work.recompute == "selective")) * flops.attention
        scan += count * passes * flops.scan
        # What a layer keeps it has written once and reads once; its gradients do the same in the backward pass.
        elementwise += count * (passes + 1) * sum(layer_activations(a, kind, shape, kernels).values())
        # One all-reduce (or gather and scatter) per layer and pass: two in the forward pass of a transformer's layer.
        collectives += count * (passes - 1) * 2 * (tp - 1) / tp * hidden
    if stage == pp - 1:
        columns = a.padded_vocab_size(tp)
        gemm += 3 * 2 * shape.tokens * a.hidden_size * columns
        elementwise += 6 * shape.tokens * columns // tp * 4  # softmax in fp32: three passes, and its gradient
    peak = tp * gpu.bf16_flops
    return _MicroBatch(
        gemm / (peak * assumed.gemm_efficiency),
        attention / (peak * assumed.attention_efficiency),
        scan / (peak * assumed.scan_efficiency),
        elementwise / (gpu.memory_bandwidth * assumed.memory_efficiency),
        collectives / _bandwidth(gpu, assumed, tp > assumed.gpus_per_node),
    )


def _bandwidth(gpu: GPU, assumed: Assumptions, across_nodes: bool) -> float:
    """Bytes per second and direction between ranks of a group."""
    if across_nodes:
        return gpu.network_bandwidth * assumed.network_efficiency
    return gpu.nvlink_bandwidth / 2 * assumed.nvlink_efficiency
