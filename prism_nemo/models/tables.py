"""Rows that the families' weight tables share: attention, MLP, Mamba mixer, embedding."""

from __future__ import annotations

from typing import Any

from prism_nemo.models.family import Architecture
from prism_nemo.models.weights import (
    ColumnParallel,
    FusedQKV,
    GatedMLP,
    Replicated,
    RowParallel,
    VocabParallel,
    WeightMapping,
)

_LAYER = "decoder.layers.{layer}."


def norm(a: Architecture, megatron: str, hf: str, layers: tuple[int, ...] | None = None, **at: Any) -> WeightMapping:
    """A norm over the hidden size; in a layer if `layers` are given."""
    prefix = "" if layers is None else _LAYER
    return Replicated(f"{prefix}{megatron}.weight", (f"{hf}.weight",), (a.hidden_size,), layers=layers, **at)


def vocabulary(a: Architecture, tp: int, embedding: str, head: str, final_norm: str) -> list[WeightMapping]:
    """Embedding, final norm and, unless it is tied, the output layer, by their Hugging Face names."""
    shape = (a.padded_vocab_size(tp), a.hidden_size)
    names = [("embedding.word_embeddings", embedding)] + ([] if a.tied_embeddings else [("output_layer", head)])
    final = "decoder.final_norm" if a.layer_pattern else "decoder.final_layernorm"
    return [
        *(VocabParallel(f"{ours}.weight", (f"{hf}.weight",), shape, vocab_size=a.vocab_size) for ours, hf in names),
        norm(a, final, final_norm),
    ]


def attention(a: Architecture, hf: str, layers: tuple[int, ...], **at: Any) -> list[WeightMapping]:
    """Grouped-query attention without biases; `hf` is the prefix of q_proj, k_proj, v_proj and o_proj."""
    h, heads, groups, d = a.hidden_size, a.num_attention_heads, a.num_query_groups, a.kv_channels
    return [
        FusedQKV(
            f"{_LAYER}self_attention.linear_qkv.weight",
            tuple(f"{hf}{x}_proj.weight" for x in "qkv"),
            ((heads + 2 * groups) * d, h),
            heads=heads,
            groups=groups,
            head_dim=d,
            layers=layers,
            **at,
        ),
        RowParallel(
            f"{_LAYER}self_attention.linear_proj.weight", (f"{hf}o_proj.weight",), (h, heads * d), layers=layers, **at
        ),
    ]


def mlp(a: Architecture, up: tuple[str, ...], down: str, layers: tuple[int, ...], **at: Any) -> list[WeightMapping]:
    """The MLP; `up` names gate and up projection (or one tensor that holds both), or the only input projection."""
    h, ffn = a.hidden_size, a.ffn_hidden_size
    name, sources = f"{_LAYER}mlp.linear_fc1.weight", tuple(f"{x}.weight" for x in up)
    first: WeightMapping
    if a.activation == "swiglu":
        first = GatedMLP(name, sources, (2 * ffn, h), layers=layers, **at)
    else:
        first = ColumnParallel(name, sources, (ffn, h), layers=layers, **at)
    return [
        first,
        RowParallel(f"{_LAYER}mlp.linear_fc2.weight", (f"{down}.weight",), (h, ffn), layers=layers, **at),
    ]


def mixer(a: Architecture, tp: int, hf: str, layers: tuple[int, ...], **at: Any) -> list[WeightMapping]:
    """A Mamba-2 mixer; `hf` is the prefix of in_proj, conv1d and the rest.

    Where a group has fewer heads than a rank holds groups, B and C are every rank's own: see
    `prism_nemo.models.layers.mamba`, which then keeps their rows in parameters of their own.
    """
    m = a.mamba
    if m is None:
        return []
    h, inner, bc = a.hidden_size, m.inner_size, m.groups * m.state_size
    at = {**at, "layers": layers}
    ours = f"{_LAYER}mixer."
    z, x, b, c, dt = (0, inner), (inner, inner), (2 * inner, bc), (2 * inner + bc, bc), (2 * inner + 2 * bc, m.heads)
    conv_parts = ["weight", "bias"] if m.conv_bias else ["weight"]
    tails: dict[str, tuple[int, ...]] = {"weight": (1, m.conv_kernel), "bias": ()}
    projection = (f"{hf}in_proj.weight",)
    split = m.groups % tp != 0
    rows: list[WeightMapping] = []
    if split:
        rows += [
            ColumnParallel(f"{ours}in_proj.weight", projection, (2 * inner + m.heads, h), sections=(z, x, dt), **at),
            Replicated(f"{ours}in_proj_bc.weight", projection, (2 * bc, h), start=b[0], **at),
        ]
    else:
        shape = (2 * inner + 2 * bc + m.heads, h)
        rows.append(ColumnParallel(f"{ours}in_proj.weight", projection, shape, sections=(z, x, b, c, dt), **at))
    for part in conv_parts:
        name, tail = f"conv1d.{part}", tails[part]
        if split:
            rows += [
                ColumnParallel(f"{ours}{name}", (f"{hf}{name}",), (inner, *tail), **at),
                Replicated(f"{ours}conv1d_bc.{part}", (f"{hf}{name}",), (2 * bc, *tail), start=inner, **at),
            ]
        else:
            sections = ((0, inner), (inner, bc), (inner + bc, bc))
            whole: tuple[int, ...] = (inner + 2 * bc, *tail)
            rows.append(ColumnParallel(f"{ours}{name}", (f"{hf}{name}",), whole, sections=sections, **at))
    rows += [ColumnParallel(f"{ours}{name}", (f"{hf}{name}",), (m.heads,), **at) for name in ("dt_bias", "A_log", "D")]
    rows.append(ColumnParallel(f"{ours}norm.weight", (f"{hf}norm.weight",), (inner,), **at))
    rows.append(RowParallel(f"{ours}out_proj.weight", (f"{hf}out_proj.weight",), (h, inner), **at))
    return rows
