"""Time of a step from a roofline: each kernel takes its FLOPs or its bytes, whichever takes longer at what is assumed.

    step = (micro-batches + (stages - 1) / parts) x slowest stage + reduction of gradients + gathering of parameters
           + update

The first factor is the one-forward-one-backward schedule with its bubble (arXiv 2104.04473, section 2.2), which virtual
pipelines of several parts on each stage divide by their number, and send that many times as much. In FP8 the linear
layers' products run at a share of the FP8 peak, after their operands were rounded, once for every pass. Collectives
over n ranks move 2 (n - 1) / n of an all-reduced tensor through each rank, half of that for a reduce-scatter or an
all-gather. Nothing overlaps: neither the trainer's reduction of gradients nor Megatron's tensor-parallel collectives
are set to. Every efficiency is an assumption (`prism_nemo.planning.hardware.Assumptions`); nothing here was measured on
a GPU.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass

from prism_nemo.config import ParallelConfig
from prism_nemo.models.family import Architecture
from prism_nemo.planning.activations import Kernels, Shape, layer_activations, part_layers
from prism_nemo.planning.flops import layer_flops
from prism_nemo.planning.hardware import GPU, Assumptions
from prism_nemo.planning.memory import Workload, exchanged, linear_elements, replicas, state_bytes


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step and where they go.

    Attributes:
        gemm, attention, scan, elementwise: On the slowest stage, all micro-batches, recomputation included.
        tensor_parallel: Collectives of tensor parallelism on that stage.
        context_parallel: Exchanges of tokens for heads on that stage.
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
    context_parallel: float
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
    context_parallel: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def estimate_time(
    a: Architecture, layout: ParallelConfig, work: Workload, gpu: GPU, assumed: Assumptions, kernels: Kernels
) -> StepTime:
    """Predict the time of a step; see the module for what is assumed."""
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    parts, many = layout.virtual_pipeline_model_parallel_size, work.micro_batches(layout)
    stages = [_micro_batch(a, layout, work, gpu, assumed, kernels, s) for s in range(pp)]
    slowest = max(stages, key=lambda s: s.total)
    shape = Shape.of(layout, work.micro_batch_size, work.seq_length)
    # Ranks are ordered tensor, context, data, pipeline: neighbours of a pipeline are the farthest apart.
    residual = shape.residual_tokens * a.hidden_size * kernels.value
    hop = residual / _bandwidth(gpu, assumed, layout.world_size > assumed.gpus_per_node)
    pipeline = 2 * hop * (many * parts + pp - 1) if pp > 1 else 0.0
    return StepTime(
        many * slowest.gemm,
        many * slowest.attention,
        many * slowest.scan,
        many * slowest.elementwise,
        many * slowest.tensor_parallel,
        many * slowest.context_parallel,
        (sum(s.total for s in stages) - slowest.total) / parts,
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
    pp, shards = layout.pipeline_model_parallel_size, replicas(layout)
    states = [state_bytes(a, layout, s, work.distributed_optimizer, kernels.value) for s in sorted({0, pp - 1})]
    stage, state = max(enumerate(states), key=lambda pair: pair[1].gradients)
    gathered = state.parameters
    if kernels.fp8_recipe is not None and work.fp8_param_gather:
        linear = linear_elements(a, layout, stage * (pp - 1), work.bf16_layers(a))
        gathered += kernels.linear_inputs(linear) - linear * kernels.value
    # Gradients are reduced in fp32; parameters are gathered only where the optimizer's state is cut.
    moved = state.gradients + gathered if work.distributed_optimizer else 2 * state.gradients
    speed = _bandwidth(gpu, assumed, tp * shards > assumed.gpus_per_node)
    # Adam reads and writes its copy and both moments, and reads the gradient.
    touched = 2 * state.optimizer + state.gradients // (shards if work.distributed_optimizer else 1)
    return (shards - 1) / shards * moved / speed, touched / (gpu.memory_bandwidth * assumed.memory_efficiency)


def _micro_batch(
    a: Architecture,
    layout: ParallelConfig,
    work: Workload,
    gpu: GPU,
    assumed: Assumptions,
    kernels: Kernels,
    stage: int,
) -> _MicroBatch:
    tp, pp, cp = (
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
        layout.context_parallel_size,
    )
    parts, outside = layout.virtual_pipeline_model_parallel_size, work.bf16_layers(a)
    shape = Shape.of(layout, work.micro_batch_size, work.seq_length)
    passes = 4 if work.recompute == "full" else 3  # a backward pass is two of the forward's size
    # FLOPs of all tensor- and context-parallel ranks together; bytes of this one.
    gemm = fp8_gemm = attention = scan = elementwise = collectives = exchanges = 0.0
    hidden = shape.tokens * a.hidden_size * kernels.value
    numbered = [layer for part in range(parts) for layer in part_layers(a, pp, stage, parts, part)]
    counts = Counter((kind, number in outside) for number, kinds in numbered for kind in kinds)
    for (kind, in_bf16), count in sorted(counts.items()):
        used = kernels.in_bf16 if in_bf16 else kernels
        flops = layer_flops(a, kind, [work.seq_length] * work.micro_batch_size, tp=tp, cp=cp)
        if used.fp8_recipe is None:
            gemm += count * passes * flops.projections
        else:
            fp8_gemm += count * passes * flops.projections
            elementwise += count * _rounding(a, kind, shape, used, passes)
        # Flash attention's backward pass computes the scores again: two and a half times the forward's FLOPs.
        attention += count * (passes + 0.5 + (work.recompute == "selective")) * flops.attention
        scan += count * passes * flops.scan
        # What a layer keeps it has written once and reads once; its gradients do the same in the backward pass.
        elementwise += count * (passes + 1) * sum(layer_activations(a, kind, shape, used).values())
        # One all-reduce (or gather and scatter) per layer and pass: two in the forward pass of a transformer's layer.
        collectives += count * (passes - 1) * 2 * (tp - 1) / tp * hidden
        # The same numbers come back in the backward pass.
        exchanges += count * (passes - 1) * (cp - 1) / cp * sum(exchanged(a, kind, shape, kernels))
    if stage == pp - 1:
        columns = a.padded_vocab_size(tp)
        gemm += 3 * 2 * cp * shape.tokens * a.hidden_size * columns
        elementwise += 6 * shape.tokens * columns // tp * 4  # softmax in fp32: three passes, and its gradient
    peak = tp * cp * gpu.bf16_flops
    fp8_peak = tp * cp * (gpu.fp8_flops or gpu.bf16_flops)
    return _MicroBatch(
        gemm / (peak * assumed.gemm_efficiency) + fp8_gemm / (fp8_peak * assumed.fp8_efficiency),
        attention / (peak * assumed.attention_efficiency),
        scan / (peak * assumed.scan_efficiency),
        elementwise / (gpu.memory_bandwidth * assumed.memory_efficiency),
        collectives / _bandwidth(gpu, assumed, tp > assumed.gpus_per_node),
        exchanges / _bandwidth(gpu, assumed, tp * cp > assumed.gpus_per_node),
    )


def _rounding(a: Architecture, kind: str, shape: Shape, kernels: Kernels, passes: int) -> int:
    """Bytes read and written to round a layer's operands to FP8, for the product along each of their dimensions: what
    goes into its two linear layers in each forward pass, and the gradients of what comes out. Weights are rounded once
    a step, which is little."""
    if kind == "*":
        heads = a.num_attention_heads * a.kv_channels // shape.tp
        groups = a.num_query_groups * a.kv_channels // shape.tp
        inputs, outputs = a.hidden_size + heads, heads + 2 * groups + a.hidden_size
    else:
        width = a.ffn_hidden_size // shape.tp
        inputs, outputs = a.hidden_size + width, (2 if a.activation == "swiglu" else 1) * width + a.hidden_size
    return shape.tokens * (kernels.value + 2) * ((passes - 2) * inputs + outputs)


def _bandwidth(gpu: GPU, assumed: Assumptions, across_nodes: bool) -> float:
    """Bytes per second and direction between ranks of a group."""
    if across_nodes:
        return gpu.network_bandwidth * assumed.network_efficiency
    return gpu.nvlink_bandwidth / 2 * assumed.nvlink_efficiency
