"""What the forward pass keeps for the backward pass: a table of tensors per layer, for three sets of kernels.

The tables say what the layers in ``prism_nemo.models.layers`` (sets "cpu" and "torch") or Transformer Engine's ("te")
keep, each tensor with its size. Storages count, not views: what is kept as two views of one tensor is kept once.
"cpu" is checked against hooks in real CPU runs (without a window, whose masks torch's CPU kernel keeps) and "torch"
against the rehearsal, to the byte; "te" is written down from what Transformer Engine is known to keep, and not
measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from prism_nemo.config import ParallelConfig
from prism_nemo.models.family import Architecture, Mamba

KINDS = ("cpu", "torch", "te")
_INDEX = 8  # bytes of a token id


@dataclass(frozen=True)
class Kernels:
    """Which kernels run the layers.

    Attributes:
        name: "cpu" (torch's CPU kernels in fp32), "torch" (the same layers in bf16 with the kernels that torch,
            mamba_ssm and causal_conv1d have for a GPU) or "te" (Transformer Engine's layers in bf16).
        value: Bytes of an activation.
    """

    name: str
    value: int

    @classmethod
    def named(cls, name: str) -> Kernels:
        """One of `KINDS`."""
        return cls(name, 4 if name == "cpu" else 2)

    @classmethod
    def on_gpu(cls, a: Architecture) -> Kernels:
        """What this project builds on a GPU: Transformer Engine's layers for a transformer, torch's for a hybrid."""
        return cls.named("torch" if a.mamba is not None else "te")


@dataclass(frozen=True)
class Shape:
    """Sizes of a micro-batch on one tensor-parallel rank.

    Attributes:
        rows: Rows of the micro-batch.
        length: Tokens of a row.
        tp: tensor_model_parallel_size.
        sequence_parallel: Whether norms and residuals are cut over the tensor-parallel ranks, along the sequence.
    """

    rows: int
    length: int
    tp: int
    sequence_parallel: bool

    @classmethod
    def of(cls, layout: ParallelConfig, rows: int, length: int) -> Shape:
        """For this layout."""
        return cls(rows, length, layout.tensor_model_parallel_size, layout.sequence_parallel)

    @property
    def tokens(self) -> int:
        """Of the micro-batch."""
        return self.rows * self.length

    @property
    def residual_tokens(self) -> int:
        """Tokens of the residual stream on this rank."""
        return self.tokens // self.tp if self.sequence_parallel else self.tokens


Kept = dict[str, int]


def layer_activations(a: Architecture, kind: str, shape: Shape, kernels: Kernels) -> Kept:
    """Bytes that one layer of a kind ("M" mixer, "*" attention, "-" MLP) keeps for a micro-batch, by tensor."""
    kept = norm_activations(a, shape, kernels)
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
    q, kv = (tokens * n * d * kernels.value for n in (heads, groups))
    kept = {"values": kv, "output": q, "log-sum-exp": tokens * heads * 4, "output, as the projection reads it": q}
    if kernels.name == "te":
        # Rotation makes new queries and keys; the values stay a view of the projection's result.
        del kept["output, as the projection reads it"], kept["values"]
        return kept | {"queries, keys and values": q + 2 * kv, "rotated queries and keys": q + kv}
    if kernels.name == "torch":
        blocks = 1
        if a.sliding_window is not None and shape.length > a.sliding_window:
            blocks = -(-shape.length // max(a.sliding_window, 128))  # see `windowed_attention`
        kept["random state of the dropout"] = 24 * blocks
    if a.rope is not None:
        angles = 2 * shape.length * (d // 2) * kernels.value
        return kept | {"rotated queries": q, "rotated keys": kv, "cosines and sines": angles}
    # Keys stay a view of the projection's result; queries of several groups cannot. Unrotated queries lie token by
    # token, and so does the output: the projection reads it where it is.
    del kept["output, as the projection reads it"]
    copied = {"queries": q} if groups > 1 else {}
    return kept | copied | {"queries, keys and values": q + 2 * kv}


def _mlp(a: Architecture, shape: Shape, kernels: Kernels) -> Kept:
    width = shape.tokens * (a.ffn_hidden_size // shape.tp) * kernels.value
    if a.activation != "swiglu":
        return {"relu": width, "input of the second projection": width}
    kept = {"gate and up": 2 * width, "input of the second projection": width}
    return kept if kernels.name == "te" else {**kept, "silu of the gate": width}


def _mixer(a: Architecture, m: Mamba, shape: Shape, kernels: Kernels) -> Kept:
    tokens, value, tp = shape.tokens, kernels.value, shape.tp
    heads, groups = m.heads // tp, max(1, m.groups // tp)
    inner, bc = heads * m.head_dim, groups * m.state_size
    channels, rows = inner + 2 * bc, 2 * inner + 2 * bc + heads
    kept = {
        "projected": tokens * rows * value,
        "x, B, C": tokens * channels * value,
        "scanned": tokens * inner * value,
        "gated and normed, fp32": tokens * inner * 4,
        "norm's 1/rms of groups": tokens * max(1, inner // (m.inner_size // m.groups)) * 4,
        "input of the second projection": tokens * inner * value,
        # exp(A_log) and its negative; D and the step sizes' bias where they are bf16 and the kernel wants fp32.
        "numbers of each head": (2 if kernels.name == "cpu" else 4) * heads * 4,
    }
    if m.groups % tp:
        # The rank's own rows of B and C are put together with its others for each pass: weights that are no parameter.
        kept["assembled projection"] = rows * a.hidden_size * value
        kept["assembled convolution"] = channels * (m.conv_kernel + m.conv_bias) * value
    chunks = -(-shape.length // m.chunk_size)
    if kernels.name == "cpu":
        states = chunks * shape.rows * heads * m.head_dim * m.state_size * 4
        steps = tokens * heads * 4
        kept |= {"before silu": tokens * channels * value, "states of chunks": states}
        return kept | {"step sizes before and after softplus": 2 * steps}
    padded = chunks * m.chunk_size * shape.rows
    return kept | {"input of the convolution": tokens * channels * value, "decays of chunks": padded * heads * 4}


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
    if kernels.name == "te":
        del kept["log-sum-exp"]
        return kept
    d, groups = a.kv_channels, a.num_query_groups // shape.tp
    q, kv = (shape.tokens * n * d * kernels.value for n in (a.num_attention_heads // shape.tp, groups))
    core = {"queries, keys and values": q + 2 * kv, "output, as the projection reads it": q, "kind of mask": 4}
    if groups > 1:
        core["queries"] = q
    return norm_activations(a, shape, kernels) | core


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
    a: Architecture, pp: int, stage: int, shape: Shape, kernels: Kernels, recompute: str = "none"
) -> tuple[int, int]:
    """Bytes that a pipeline stage keeps for one micro-batch: of its layers (and the embedding), and of its output."""
    pattern = stage_layers(a, pp, stage)
    layers = sum(
        pattern.count(kind) * sum(recomputed_activations(a, kind, shape, kernels, recompute).values())
        for kind in set(pattern)
    )
    if stage == 0:
        layers += sum(embedding_activations(shape).values())
    return layers, sum(output_activations(a, shape, kernels).values()) if stage == pp - 1 else 0


def stage_layers(a: Architecture, pp: int, stage: int) -> str:
    """Kinds of the layers of a pipeline stage, in order; each layer of a transformer is "*" and "-"."""
    pattern = a.layer_pattern or "*-" * a.num_layers
    share = len(pattern) // pp
    return pattern[stage * share : (stage + 1) * share]
