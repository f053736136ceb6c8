"""Memory of a rank, by what takes it: each part a formula, none a fit.

Parameters come from the family's weight table, rank by rank; buffers are padded as
``megatron/core/distributed/param_and_grad_buffer.py:610-760`` pads them. In bf16 with the distributed optimizer a
parameter takes 2 bytes, its gradient 4 (``grad_reduce_in_fp32``), and its share of the optimizer 12 / DP: an fp32 copy
and two moments. In fp32 the copy is the parameter itself.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from functools import lru_cache

from prism_nemo.config import ParallelConfig
from prism_nemo.models.family import Architecture, table_of
from prism_nemo.models.layers.context_parallel import repeats
from prism_nemo.models.weights import expand
from prism_nemo.planning.activations import Kernels, Shape, layer_activations, stage_activations, stage_layers
from prism_nemo.planning.hardware import Assumptions


@dataclass(frozen=True)
class Workload:
    """What memory and time depend on besides model and layout.

    Attributes:
        seq_length: Tokens of a row.
        micro_batch_size: Rows of a micro-batch.
        global_batch_size: Rows of a step.
        recompute: "none", "selective" or "full".
        distributed_optimizer: Whether the optimizer's state is cut over data-parallel ranks.
        fp8_param_gather: Whether linear weights are kept and gathered in FP8.
        bf16_at_start, bf16_at_end: Layers that stay out of FP8.
    """

    seq_length: int
    micro_batch_size: int
    global_batch_size: int
    recompute: str = "none"
    distributed_optimizer: bool = True
    fp8_param_gather: bool = False
    bf16_at_start: int = 0
    bf16_at_end: int = 0

    def bf16_layers(self, a: Architecture) -> frozenset[int]:
        """Numbers of the layers that stay out of FP8."""
        return frozenset((*range(self.bf16_at_start), *range(a.num_layers - self.bf16_at_end, a.num_layers)))

    def micro_batches(self, layout: ParallelConfig) -> int:
        """Of a step, on each data-parallel rank."""
        return self.global_batch_size // (self.micro_batch_size * layout.data_parallel_size)


@dataclass(frozen=True)
class StateBytes:
    """Bytes of what lives from step to step."""

    parameters: int
    gradients: int
    optimizer: int


@dataclass(frozen=True)
class RankMemory:
    """Bytes of a rank at its peak.

    Attributes:
        stage: Of the pipeline; all ranks of a stage are alike but for less than a thousandth.
        parameters, gradients, optimizer: Formula, equal to what the rehearsal counts (of FP8: not measured).
        fp8_weights: Copies of the linear layers' weights in FP8. Not measured.
        activations: Kept by the layers for all micro-batches in flight. Formula.
        logits: Kept by the last norm and the cross entropy. Formula.
        communication: Received and sent activations of the pipeline, gathered activations of sequence parallelism.
        working: Largest tensors that live while one layer or the loss is computed. Estimate.
        reserved: Context, NCCL and fragmentation. Assumption.
    """

    stage: int
    parameters: int
    gradients: int
    optimizer: int
    fp8_weights: int
    activations: int
    logits: int
    communication: int
    working: int
    reserved: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, f.name) for f in fields(self) if f.name != "stage")

    def to_dict(self) -> dict[str, int]:
        """As plain values."""
        return {**asdict(self), "total": self.total}


def parameter_sizes(
    a: Architecture, tp: int, pp: int, tp_rank: int, stage: int, parts: int = 1, part: int | None = None
) -> list[tuple[int, bool]]:
    """Elements of each parameter of a rank, and whether it is an embedding that two stages hold.

    Args:
        a: The model.
        tp: tensor_model_parallel_size.
        pp: pipeline_model_parallel_size.
        tp_rank: Of the rank.
        stage: Of the pipeline.
        parts: virtual_pipeline_model_parallel_size.
        part: One part of the stage; None for all of them.
    """
    stretch = a.num_layers // (pp * parts)
    which = range(parts) if part is None else (part,)
    first, last = stage == 0 and 0 in which, stage == pp - 1 and parts - 1 in which
    sizes = []
    for name, layer, count in _table(_Same(a), tp, tp_rank):
        if layer is not None:
            place = layer // stretch
            if place % pp == stage and place // pp in which:
                sizes.append((count, False))
        elif name.startswith("embedding."):
            tied = a.tied_embeddings and pp > 1
            if first or (tied and last):
                sizes.append((count, tied))
        elif last:
            sizes.append((count, False))
    return sizes


def linear_elements(a: Architecture, layout: ParallelConfig, stage: int, bf16_layers: frozenset[int]) -> int:
    """Elements of a rank's linear layers that run in FP8."""
    pp, parts = layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size
    stretch = a.num_layers // (pp * parts)
    return sum(
        count
        for name, layer, count in _table(_Same(a), layout.tensor_model_parallel_size, 0)
        if layer is not None
        and layer // stretch % pp == stage
        and layer not in bf16_layers
        and ".linear_" in name
        and name.endswith(".weight")
    )


class _Same:
    """An architecture as a key of a cache: it cannot be hashed itself, and a plan looks it up thousands of times."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture

    def __hash__(self) -> int:
        return id(self.architecture)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.architecture is self.architecture


@lru_cache(maxsize=64)
def _table(same: _Same, tp: int, tp_rank: int) -> list[tuple[str, int | None, int]]:
    """Name, layer and elements of every parameter of all stages."""
    table = table_of(same.architecture, tp)
    return [(m.megatron, layer, math.prod(m.local_shape(tp_rank, tp))) for m, layer in expand(table)]


def buffer_elements(sizes: list[tuple[int, bool]], dp: int, distributed_optimizer: bool) -> int:
    """Elements of the parameter and gradient buffers of a rank.

    Each parameter begins at a multiple of 64 elements and each bucket ends at one of lcm(DP, 128). Without overlap of
    the gradients' reduction there is one bucket, and another for an embedding that two stages hold.
    """
    if not distributed_optimizer:
        return sum(count for count, _ in sizes)
    divisor = math.lcm(dp, 128)
    total = 0
    for shared in (False, True):
        bucket = sum(-(-count // 64) * 64 for count, is_shared in sizes if is_shared == shared)
        total += -(-bucket // divisor) * divisor
    return total


def state_bytes(
    a: Architecture, layout: ParallelConfig, stage: int, distributed_optimizer: bool, value: int
) -> StateBytes:
    """Parameters, gradients and optimizer of a rank.

    The optimizer's state is cut over data- and context-parallel ranks. The share is that of the rank with the most:
    padding, which no optimizer keeps, lies with the others. Each part of a virtual pipeline has buffers of its own.

    Args:
        a: The model.
        layout: Over processes.
        stage: Of the pipeline.
        distributed_optimizer: Whether the optimizer's state is cut.
        value: Bytes of a parameter: 2 in bf16, 4 in fp32.
    """
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    parts, shards = layout.virtual_pipeline_model_parallel_size, replicas(layout)
    elements = mine = 0
    for part in range(parts):
        sizes = parameter_sizes(a, tp, pp, 0, stage, parts, part)
        held, real = buffer_elements(sizes, shards, distributed_optimizer), sum(count for count, _ in sizes)
        elements += held
        mine += min(real, held // shards) if distributed_optimizer else real
    return StateBytes(elements * value, elements * 4, mine * (12 if value < 4 else 8))


def replicas(layout: ParallelConfig) -> int:
    """Ranks that hold the same weights and share the optimizer's state."""
    return layout.data_parallel_size * layout.context_parallel_size


def in_flight(pp: int, parts: int, stage: int, micro_batches: int) -> list[list[int]]:
    """How many micro-batches of each part a stage holds whenever it has just run one forward, over a whole step.

    The schedule is Megatron's (pipeline_parallel/schedules.py:738): one forward, one backward, after warm-up passes;
    with several parts they take turns in rounds of `pp` micro-batches.
    """
    total = micro_batches * parts
    warmup = pp - stage - 1 if parts == 1 else 2 * (pp - stage - 1) + (parts - 1) * pp

    def part_of(passed: int) -> int:
        return passed % (pp * parts) // pp if parts > 1 else 0

    held, states = [0] * parts, []
    for i in range(total):
        held[part_of(i)] += 1
        states.append(list(held))
        if i >= warmup:
            held[parts - 1 - part_of(i - warmup)] -= 1
    return states


def estimate_memory(
    a: Architecture,
    layout: ParallelConfig,
    work: Workload,
    kernels: Kernels,
    assumed: Assumptions,
    stage: int,
) -> RankMemory:
    """Memory of a rank of a pipeline stage while training."""
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    parts = layout.virtual_pipeline_model_parallel_size
    shape = Shape.of(layout, work.micro_batch_size, work.seq_length)
    state = state_bytes(a, layout, stage, work.distributed_optimizer, kernels.value)
    parameters, copies = _fp8_weights(a, layout, work, stage, kernels, state.parameters)
    bf16_layers = work.bf16_layers(a)
    kept = [
        stage_activations(a, pp, stage, shape, kernels, work.recompute, parts, part, bf16_layers)
        for part in range(parts)
    ]
    # After a few rounds nothing new happens.
    states = in_flight(pp, parts, stage, min(work.micro_batches(layout), 4 * pp))
    most = max(states, key=lambda held: sum(n * layers for n, (layers, _) in zip(held, kept, strict=True)))
    activations = sum(n * layers for n, (layers, _) in zip(most, kept, strict=True))
    output = sum(logits for _, logits in kept)  # of one micro-batch: the last part's backward pass follows at once
    residual = shape.residual_tokens * a.hidden_size * kernels.value
    # Megatron keeps what a stage received and sent until its backward pass, and receives into new buffers. What came in
    # is counted already where a layer keeps its input.
    received = kernels.name == "cpu" and work.recompute != "full"
    communication = 2 * (pp > 1) * residual
    for part, n in enumerate(most):
        held = (received and (stage > 0 or part > 0)) + (stage < pp - 1 or part < parts - 1)
        communication += residual * held * n * (pp > 1)
    if layout.sequence_parallel:
        communication += shape.tokens * a.hidden_size * kernels.value
    if layout.context_parallel_size > 1:  # the widest exchange of tokens for heads, sent and received
        communication += 2 * max(
            exchanged(a, kind, shape, kernels)[0] for kind in set(stage_layers(a, pp, stage, parts))
        )
    return RankMemory(
        stage,
        parameters,
        state.gradients,
        state.optimizer,
        copies,
        activations,
        output,
        communication,
        _working(a, tp, pp, stage, shape, kernels, work.recompute, parts),
        int(assumed.reserved_bytes + assumed.fragmentation * (activations + output)),
    )


def exchanged(a: Architecture, kind: str, shape: Shape, kernels: Kernels) -> tuple[int, int]:
    """Bytes that a layer's tokens and heads are exchanged in under context parallelism: in front, and behind."""
    tokens = shape.tokens * kernels.value
    if kind == "*":
        groups = a.num_query_groups // shape.tp
        groups *= repeats(groups, shape.cp)
        heads = a.num_attention_heads // shape.tp
        return tokens * (heads + 2 * groups) * a.kv_channels, tokens * heads * a.kv_channels
    if kind == "M" and a.mamba is not None:
        m = a.mamba
        groups = max(1, m.groups // shape.tp)
        groups *= repeats(groups, shape.cp)
        heads = m.heads // shape.tp
        inner = heads * m.head_dim
        return tokens * (inner + 2 * groups * m.state_size + heads), tokens * inner
    return 0, 0


def _fp8_weights(
    a: Architecture, layout: ParallelConfig, work: Workload, stage: int, kernels: Kernels, parameters: int
) -> tuple[int, int]:
    """Bytes of the parameters, and of the linear weights' FP8 copies that Transformer Engine keeps from micro-batch to
    micro-batch: as the forward pass and as the backward pass read them. With fp8_param_gather the first of the two is
    the parameter itself."""
    if kernels.fp8_recipe is None:
        return parameters, 0
    linear = linear_elements(a, layout, stage, work.bf16_layers(a))
    one = kernels.linear_inputs(linear)
    if work.fp8_param_gather:
        return parameters - linear * kernels.value + one, one
    return parameters, 2 * one


def _working(
    a: Architecture, tp: int, pp: int, stage: int, shape: Shape, kernels: Kernels, recompute: str, parts: int
) -> int:
    """Largest of: the logits beside their fp32 copy and gradient; one layer's gradients, with the layer itself where
    it is computed again."""
    columns = a.padded_vocab_size(tp) // tp
    # The logits in their own type, then their gradient in it (fp32 logits are overwritten in place), and the gradient
    # of the output layer before it joins the buffer.
    copies = 0 if kernels.value == 4 else shape.tokens * columns * kernels.value
    logits = copies + a.hidden_size * columns * kernels.value if stage == pp - 1 else 0
    kinds = set(stage_layers(a, pp, stage, parts))
    again = 0
    if recompute == "full":
        each = {k: sum(layer_activations(a, k, shape, kernels).values()) for k in kinds}
        # A transformer's layer is attention and MLP together.
        again = max(each.values()) if a.layer_pattern else sum(each.values())
    wide = shape.tokens * (3 * a.ffn_hidden_size // tp + 2 * a.hidden_size) * kernels.value
    weight = 2 * a.hidden_size * a.ffn_hidden_size // tp * kernels.value  # a gradient before it joins the buffer
    return max(logits, again + wide + weight)
