"""Memory of a rank, by what takes it: each part a formula, none a fit.

Parameters come from the family's weight table, rank by rank; buffers are padded as
``megatron/core/distributed/param_and_grad_buffer.py:610-760`` pads them. In bf16 with the distributed optimizer a
parameter takes 2 bytes, its gradient 4 (``grad_reduce_in_fp32``), and its share of the optimizer 12 / DP: an fp32 copy
and two moments. In fp32 the copy is the parameter itself.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from functools import lru_cache

from prism_nemo.config import ParallelConfig
from prism_nemo.models.family import Architecture, table_of
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
    """

    seq_length: int
    micro_batch_size: int
    global_batch_size: int
    recompute: str = "none"
    distributed_optimizer: bool = True

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
        parameters, gradients, optimizer: Formula, equal to what the rehearsal counts.
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


def parameter_sizes(a: Architecture, tp: int, pp: int, tp_rank: int, stage: int) -> list[tuple[int, bool]]:
    """Elements of each parameter of a rank, and whether it is an embedding that two stages hold."""
    per_stage = a.num_layers // pp
    sizes = []
    for name, layer, count in _table(json.dumps(a.to_dict()), tp, tp_rank):
        if layer is not None:
            if layer // per_stage == stage:
                sizes.append((count, False))
        elif name.startswith("embedding."):
            tied = a.tied_embeddings and pp > 1
            if stage == 0 or (tied and stage == pp - 1):
                sizes.append((count, tied))
        elif stage == pp - 1:
            sizes.append((count, False))
    return sizes


@lru_cache(maxsize=64)
def _table(architecture: str, tp: int, tp_rank: int) -> list[tuple[str, int | None, int]]:
    """Name, layer and elements of every parameter of all stages. An architecture cannot be hashed, its JSON can."""
    table = table_of(Architecture.from_dict(json.loads(architecture)), tp)
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

    The optimizer's share is that of the rank with the most: padding, which no optimizer keeps, lies with the others.

    Args:
        a: The model.
        layout: Over processes.
        stage: Of the pipeline.
        distributed_optimizer: Whether the optimizer's state is cut over data-parallel ranks.
        value: Bytes of a parameter: 2 in bf16, 4 in fp32.
    """
    dp = layout.data_parallel_size
    sizes = parameter_sizes(a, layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size, 0, stage)
    elements = buffer_elements(sizes, dp, distributed_optimizer)
    real = sum(count for count, _ in sizes)
    mine = min(real, elements // dp) if distributed_optimizer else real
    return StateBytes(elements * value, elements * 4, mine * (12 if value < 4 else 8))


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
    shape = Shape.of(layout, work.micro_batch_size, work.seq_length)
    state = state_bytes(a, layout, stage, work.distributed_optimizer, kernels.value)
    # One forward, one backward: a stage starts as many micro-batches as there are stages from it to the end.
    in_flight = min(work.micro_batches(layout), pp - stage)
    layers, output = stage_activations(a, pp, stage, shape, kernels, work.recompute)
    residual = shape.residual_tokens * a.hidden_size * kernels.value
    # Megatron keeps what a stage received and sent until its backward pass, and receives into new buffers. What came in
    # is counted already where a layer keeps its input.
    received = stage > 0 and kernels.name == "cpu" and work.recompute != "full"
    held = received + (stage < pp - 1)
    communication = residual * (held * in_flight + 2 * (pp > 1))
    if layout.sequence_parallel:
        communication += shape.tokens * a.hidden_size * kernels.value
    activations = layers * in_flight
    return RankMemory(
        stage,
        state.parameters,
        state.gradients,
        state.optimizer,
        activations,
        output,
        communication,
        _working(a, tp, pp, stage, shape, kernels, work.recompute),
        int(assumed.reserved_bytes + assumed.fragmentation * (activations + output)),
    )


def _working(a: Architecture, tp: int, pp: int, stage: int, shape: Shape, kernels: Kernels, recompute: str) -> int:
    """Largest of: the logits beside their fp32 copy and gradient; one layer's gradients, with the layer itself where
    it is computed again."""
    columns = a.padded_vocab_size(tp) // tp
    # The logits in their own type, then their gradient in it (fp32 logits are overwritten in place), and the gradient
    # of the output layer before it joins the buffer.
    copies = 0 if kernels.value == 4 else shape.tokens * columns * kernels.value
    logits = copies + a.hidden_size * columns * kernels.value if stage == pp - 1 else 0
    kinds = set(stage_layers(a, pp, stage))
    again = 0
    if recompute == "full":
        each = {k: sum(layer_activations(a, k, shape, kernels).values()) for k in kinds}
        # A transformer's layer is attention and MLP together.
        again = max(each.values()) if a.layer_pattern else sum(each.values())
    wide = shape.tokens * (3 * a.ffn_hidden_size // tp + 2 * a.hidden_size) * kernels.value
    weight = 2 * a.hidden_size * a.ffn_hidden_size // tp * kernels.value  # a gradient before it joins the buffer
    return max(logits, again + wide + weight)
