"""What the forward pass keeps for the backward pass: a table of tensors per layer, for three sets of kernels.

The tables say what the layers in ``prism_nemo.models.layers`` (sets "cpu" and "torch") or Transformer Engine's ("te")
keep, each tensor with its size. Storages count, not views: what is kept as two views of one tensor is kept once.
"cpu" is checked against hooks in real CPU runs (without a window, whose masks torch's CPU kernel keeps) and "torch"
against the rehearsal, to the byte; "te" is written down from what Transformer Engine is known to keep, and not
measured. Under context parallelism "torch" is checked against the rehearsal too; "te" then has torch's attention among
Transformer Engine's projections (`prism_nemo.models.layers.context_parallel`). With FP8 the inputs of linear layers are
kept in FP8 alone, as Transformer Engine keeps them for the weights' gradients; not measured.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from prism_nemo.config import ParallelConfig
from prism_nemo.models.family import Architecture, Mamba
from prism_nemo.models.layers.context_parallel import repeats

KINDS = ("cpu", "torch", "te")
_INDEX = 8  # bytes of a token id
# Of scales per number: one of fp32 for 128 numbers, one byte for 32; one for a whole tensor is nothing.
_SCALE_BYTES = {"delayed": 0.0, "tensorwise": 0.0, "blockwise": 4 / 128, "mxfp8": 1 / 32}


@dataclass(frozen=True)
class Kernels:
    """Which kernels run the layers.

    Attributes:
        name: "cpu" (torch's CPU kernels in fp32), "torch" (the same layers in bf16 with the kernels that torch,
            mamba_ssm and causal_conv1d have for a GPU) or "te" (Transformer Engine's layers in bf16).
        value: Bytes of an activation.
        fp8_recipe: Of the linear layers of "te"; None for none.
    """

    name: str
    value: int
    fp8_recipe: str | None = None

    @classmethod
    def named(cls, name: str) -> Kernels:
        """One of `KINDS`."""
        return cls(name, 4 if name == "cpu" else 2)

    @classmethod
    def on_gpu(cls, a: Architecture, fp8_recipe: str | None = None) -> Kernels:
        """What this project builds on a GPU: Transformer Engine's layers for a transformer, torch's for a hybrid."""
        return replace(cls.named("torch" if a.mamba is not None else "te"), fp8_recipe=fp8_recipe)

    @property
    def in_bf16(self) -> Kernels:
        """The same without FP8, for the layers that stay out of it."""
        return replace(self, fp8_recipe=None)

    def linear_inputs(self, count: int) -> int:
        """Bytes of so many numbers that a linear layer keeps of its input, scales included."""
        if self.fp8_recipe is None:
            return count * self.value
        return count + int(count * _SCALE_BYTES[self.fp8_recipe])


@dataclass(frozen=True)
class Shape:
    """Sizes of a micro-batch on one tensor-parallel rank.

    Attributes:
        rows: Rows of the micro-batch.
        length: Tokens of a row.
        tp: tensor_model_parallel_size.
        sequence_parallel: Whether norms and residuals are cut over the tensor-parallel ranks, along the sequence.
        cp: context_parallel_size.
    """

    rows: int
    length: int
    tp: int
    sequence_parallel: bool
    cp: int = 1

    @classmethod
    def of(cls, layout: ParallelConfig, rows: int, length: int) -> Shape:
        """For this layout."""
        return cls(
            rows,
            length,
            layout.tensor_model_parallel_size,
            layout.sequence_parallel,
            layout.context_parallel_size,
        )

    @property
    def tokens(self) -> int:
        """Of the micro-batch, on this rank."""
        return self.rows * self.length // self.cp

    @property
    def residual_tokens(self) -> int:
        """Tokens of the residual stream on this rank."""
        return self.tokens // self.tp if self.sequence_parallel else self.tokens


Kept = dict[str, int]


def layer_activations(a: Architecture, kind: str, shape: Shape, kernels: Kernels) -> Kept:
    """Bytes that one layer of a kind ("M" mixer, "*" attention, "-" MLP) keeps for a micro-batch, by tensor."""
    kept = norm_activations(a, shape, kernels)
    kept["normed"] = kernels.linear_inputs(shape.residual_tokens * a.hidden_size)
    if kind == "M":
        if a.mamba is None:
            raise ValueError(f"{a.family} has no Mamba layers")
        return kept | _mixer(a, a.mamba, shape, kernels)
    return kept | (_attention(a, shape, kernels) if kind == "*" else _mlp(a, shape, kernels))


def norm_activations(a: Architecture, shape: Shape, kernels: Kernels) -> Kept:
    """A norm and the input of the linear layer behind it, which is the norm's output."""
    width = shape.residual_tokens * a.hidden_size * kernels.value
    # Fused kernels keep what came in; the CPU's own backward works from the normed values before their weight.
    came = "normed, without weight" if kernels.name == "cpu" else "residual stream"
    return {came: width, "norm's 1/rms": shape.residual_tokens * 4, "normed": width}


def _attention(a: Architecture, shape: Shape, kernels: Kernels) -> Kept:
    d, tokens = a.kv_channels, shape.tokens
    heads, groups = a.num_attention_heads // shape.tp, a.num_query_groups // shape.tp
    # Context parallelism: all tokens of a share of the heads are as many numbers, but for copied keys and values.
    groups *= repeats(groups, shape.cp)
    q, kv = (tokens * n * d * kernels.value for n in (heads, groups))
    read = kernels.linear_inputs(tokens * heads * d)
    kept = {"values": kv, "output": q, "log-sum-exp": tokens * heads * 4, "output, as the projection reads it": read}
    if kernels.name == "te" and shape.cp == 1:
        # Rotation makes new queries and keys; the values stay a view of the projection's result.
        del kept["values"]
        if kernels.fp8_recipe is None:
            del kept["output, as the projection reads it"]
        return kept | {"queries, keys and values": q + 2 * kv, "rotated queries and keys": q + kv}
    if kernels.name != "cpu":
        blocks = 1
        if a.sliding_window is not None and shape.length > a.sliding_window:
            blocks = -(-shape.length // max(a.sliding_window, 128))  # see `windowed_attention`
        kept["random state of the dropout"] = 24 * blocks
    if a.rope is not None:
        angles = 2 * shape.length * (d // 2) * kernels.value
        return kept | {"rotated queries": q, "rotated keys": kv, "cosines and sines": angles}
    if shape.cp > 1:
        return kept | {"queries, keys and values, received": q + 2 * kv}
    # Keys stay a view of the projection's result; queries of several groups cannot. Unrotated queries lie token by
    # token, and so does the output: the projection reads it where it is.
    del kept["output, as the projection reads it"]
    copied = {"queries": q} if groups > 1 else {}
    return kept | copied | {"queries, keys and values": q + 2 * kv}


def _mlp(a: Architecture, shape: Shape, kernels: Kernels) -> Kept:
    count = shape.tokens * (a.ffn_hidden_size // shape.tp)
    width, read = count * kernels.value, kernels.linear_inputs(count)
    if a.activation != "swiglu":
        return {"relu": width, "input of the second projection": read}
    kept = {"gate and up": 2 * width, "input of the second projection": read}
    return kept if kernels.name == "te" else {**kept, "silu of the gate": width}


def _mixer(a: Architecture, m: Mamba, shape: Shape, kernels: Kernels) -> Kept:
    tokens, value, tp = shape.tokens, kernels.value, shape.tp
    heads, groups = m.heads // tp, max(1, m.groups // tp)
    inner, bc = heads * m.head_dim, groups * m.state_size
    rows = 2 * inner + 2 * bc + heads
    shared = bc * repeats(groups, shape.cp)  # of each rank's share of the heads, B and C of groups that are copied
    channels = inner + 2 * shared
    kept = {
        "projected": tokens * rows * value,
        "x, B, C": tokens * channels * value,
        "scanned": tokens * inner * value,
        "gated and normed, fp32": tokens * inner * 4,
        "norm's 1/rms of groups": tokens * max(1, inner // (m.inner_size // m.groups)) * 4,
        "input of the second projection": tokens * inner * value,
        # exp(A_log) and its negative; D and the step sizes' bias where they are bf16 and the kernel wants fp32.
        "numbers of each head": (2 if kernels.name == "cpu" else 4) * (heads // shape.cp) * 4,
    }
    if shape.cp > 1:
        # Step sizes stay a view of what was received; what was scanned is sent back, and the kernel is cut.
        kept["received"] = tokens * (channels + heads) * value
        kept["scanned, of this rank's tokens"] = tokens * inner * value
        kept["kernel of this rank's heads"] = channels // shape.cp * (m.conv_kernel + m.conv_bias) * value
    if m.groups % tp:
        # The rank's own rows of B and C are put together with its others for each pass: weights that are no parameter.
        kept["assembled projection"] = rows * a.hidden_size * value
        if shape.cp == 1:
            kept["assembled convolution"] = channels * (m.conv_kernel + m.conv_bias) * value
    chunks = -(-shape.length // m.chunk_size)
    if kernels.name == "cpu":
        states = chunks * shape.rows * heads // shape.cp * m.head_dim * m.state_size * 4
        steps = tokens * heads * 4
        kept |= {"before silu": tokens * channels * value, "states of chunks": states}
        return kept | {"step sizes before and after softplus": 2 * steps}
    padded = chunks * m.chunk_size * shape.rows
    return kept | {
        "input of the convolution": tokens * channels * value,
        "decays of chunks": padded * heads // shape.cp * 4,
    }


def recomputed_activations(a: Architecture, kind: str, shape: Shape, kernels: Kernels, recompute: str) -> Kept:
    """As `layer_activations` where the pass is computed again.

    Args:
        a: The model.
        kind: Of the layer.
        shape: Of the micro-batch.
        kernels: That run it.
        recompute: "none"; "selective", which computes the core of the attention again (Megatron-Core's default modules)
            and with flash kernels saves little; "full", which keeps the input of every Megatron layer: a transformer's
            is attention and MLP together, so there its MLP keeps nothing.
    """
    if recompute == "full":
        entered = kind != "-" or bool(a.layer_pattern)
        return {"layer's input": shape.residual_tokens * a.hidden_size * kernels.value} if entered else {}
    kept = layer_activations(a, kind, shape, kernels)
    if recompute == "none" or kind != "*":
        return kept
    if kernels.name == "te" and shape.cp == 1:
        del kept["log-sum-exp"]
        return kept
    d, groups = a.kv_channels, a.num_query_groups // shape.tp
    q, kv = (shape.tokens * n * d * kernels.value for n in (a.num_attention_heads // shape.tp, groups))
    read = kernels.linear_inputs(q // kernels.value)
    core = {"queries, keys and values": q + 2 * kv, "output, as the projection reads it": read, "kind of mask": 4}
    if groups > 1:
        core["queries"] = q
    normed = {name: kept[name] for name in norm_activations(a, shape, kernels)}
    return normed | core


def embedding_activations(shape: Shape) -> Kept:
    """The token ids, which the first stage looks up."""
    kept = {"token ids": shape.tokens * _INDEX}
    return kept if shape.tp == 1 else {**kept, "ids of other ranks": shape.tokens}


def output_activations(a: Architecture, shape: Shape, kernels: Kernels) -> Kept:
    """The last norm, and the cross entropy, whose probabilities are in fp32 in every set of kernels."""
    tp, tokens = shape.tp, shape.tokens
    columns = a.padded_vocab_size(tp) // tp
    kept = norm_activations(a, shape, kernels)
    kept |= {"probabilities, fp32": tokens * columns * 4, "targets": tokens * _INDEX}
    if kernels.name == "cpu":
        kept["sums of probabilities"] = tokens * 4
        if tp > 1:  # the sums are reduced together with the targets' logits, as one tensor
            kept |= {"targets of this rank": tokens * 4, "logits of the targets": tokens * 4}
    else:
        kept["targets of this rank"] = tokens
    if a.padded_vocab_size(tp) != a.vocab_size:
        kept["mask of the padding"] = columns  # on ranks that have padding
    return kept


def stage_activations(
    a: Architecture,
    pp: int,
    stage: int,
    shape: Shape,
    kernels: Kernels,
    recompute: str = "none",
    parts: int = 1,
    part: int | None = None,
    bf16_layers: frozenset[int] = frozenset(),
) -> tuple[int, int]:
    """Bytes that a pipeline stage keeps for one micro-batch: of its layers (and the embedding), and of its output.

    Args:
        a: The model.
        pp: pipeline_model_parallel_size.
        stage: Of the pipeline.
        shape: Of the micro-batch.
        kernels: That run it.
        recompute: See `recomputed_activations`.
        parts: virtual_pipeline_model_parallel_size.
        part: One part of the stage; None for all of them.
        bf16_layers: Layers that stay out of FP8.
    """
    which = range(parts) if part is None else (part,)
    numbered = [layer for index in which for layer in part_layers(a, pp, stage, parts, index)]
    counts = Counter((kind, number in bf16_layers) for number, kinds in numbered for kind in kinds)
    layers = sum(
        count * sum(recomputed_activations(a, kind, shape, kernels.in_bf16 if bf16 else kernels, recompute).values())
        for (kind, bf16), count in counts.items()
    )
    if stage == 0 and 0 in which:
        layers += sum(embedding_activations(shape).values())
    last = stage == pp - 1 and parts - 1 in which
    return layers, sum(output_activations(a, shape, kernels).values()) if last else 0


def part_layers(a: Architecture, pp: int, stage: int, parts: int = 1, part: int = 0) -> list[tuple[int, str]]:
    """Numbers of the layers of one part of a pipeline stage, and what each consists of, in order.

    A model is cut into pp x parts equal stretches; the stages take them in turns.
    """
    kinds = list(a.layer_pattern) or ["*-"] * a.num_layers
    share = len(kinds) // (pp * parts)
    first = (part * pp + stage) * share
    return list(enumerate(kinds[first : first + share], first))


def stage_layers(a: Architecture, pp: int, stage: int, parts: int = 1) -> str:
    """Kinds of the layers of a pipeline stage, in order; each layer of a transformer is "*" and "-"."""
    return "".join(kinds for part in range(parts) for _, kinds in part_layers(a, pp, stage, parts, part))
