"""The layers that replace Transformer Engine's, against plain formulas and against transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from tiny_llama import LINEAR, LLAMA3
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from prism_nemo.models.family import Rope
from prism_nemo.models.layers.attention import RotateToHeads, SDPACoreAttention, windowed_attention
from prism_nemo.models.layers.mlp import SwiGLU
from prism_nemo.models.layers.norm import RMSNorm
from prism_nemo.models.layers.rope import inverse_frequencies


def config(**values: Any) -> TransformerConfig:
    return TransformerConfig(**{"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, **values})


def attention(scale: float | None = None, rope: Rope | None = None, **values: Any) -> SDPACoreAttention:
    settings = config(**{"attention_dropout": 0.0, **values})
    inv_freq = None if rope is None else inverse_frequencies(rope, 8)
    return SDPACoreAttention(settings, 1, AttnMaskType.causal, "self", softmax_scale=scale, inv_freq=inv_freq)


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention, one head at a time: query head h reads key/value head h // (heads / groups)."""
    s, b, heads, d = q.shape
    out = torch.empty(s, b, heads, d, dtype=q.dtype)
    mask = torch.ones(s, s, dtype=torch.bool).tril()
    for i in range(b):
        for h in range(heads):
            g = h // (heads // k.shape[2])
            scores = (q[:, i, h] @ k[:, i, g].T * scale).masked_fill(~mask, -math.inf)
            out[:, i, h] = scores.softmax(-1) @ v[:, i, g]
    return out.flatten(2)


def rotated(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    """[s, b, h, d] rotated by transformers' function, in the angles' fp32 that it uses."""
    angles = torch.outer(torch.arange(len(x)).float(), inverse_frequencies(rope, x.shape[-1]))
    angles = torch.cat((angles, angles), dim=-1)[None]
    heads_first = x.permute(1, 2, 0, 3)
    turned, _ = apply_rotary_pos_emb(heads_first, heads_first, angles.cos().to(x), angles.sin().to(x))
    return turned.permute(2, 0, 1, 3)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.0625])
@pytest.mark.parametrize("rope", [None, Rope(100.0)], ids=["not rotated", "rotated"])
def test_core_attention_is_masked_softmax_attention(groups: int, scale: float | None, rope: Rope | None) -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(9, 2, 4, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    k, v = (
        torch.randn(9, 2, groups, 8, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2)
    )
    ours = attention(scale, rope)(q, k, v, None)
    theirs = naive(*(t if rope is None else rotated(t, rope) for t in (q, k)), v, 8**-0.5 if scale is None else scale)
    assert ours.shape == (9, 2, 32)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn(ours.shape, dtype=torch.float64, generator=generator)
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), (q, k, v)),
        torch.autograd.grad((theirs * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_core_attention_drops_only_in_training() -> None:
    q = torch.randn(16, 1, 4, 8, generator=torch.Generator().manual_seed(0))
    layer = attention(attention_dropout=0.5)
    dropped = layer.train()(q, q, q, None)
    kept = layer.eval()(q, q, q, None)
    torch.testing.assert_close(kept, naive(q, q, q, 8**-0.5))
    assert not torch.allclose(dropped, kept, atol=1e-3)


def test_core_attention_refuses_what_it_would_ignore() -> None:
    q = torch.zeros(2, 1, 4, 8)
    packing = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="documents end at 1, but the row has 2 tokens"):
        attention()(q[:, 0], q[:, 0], q[:, 0], None, packed_seq_params=packing)
    with pytest.raises(NotImplementedError, match="biases"):
        attention()(q, q, q, None, attention_bias=torch.zeros(1))
    with pytest.raises(NotImplementedError, match="only causal"):
        SDPACoreAttention(config(), 1, AttnMaskType.padding, "self")


def test_rotation_remembers_no_other_length_or_type() -> None:
    """Cosines are kept between calls; a longer sequence or another type must not meet the old ones."""
    layer = attention(rope=Rope(100.0))
    for length, dtype in ((9, torch.bfloat16), (4, torch.float32), (9, torch.float32), (5, torch.float64)):
        q = torch.randn(length, 1, 4, 8, dtype=dtype, generator=torch.Generator().manual_seed(length))
        turned = rotated(q, Rope(100.0))
        tolerance = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(layer(q, q, q, None), naive(turned, turned, q, 8**-0.5), **tolerance)


def test_rotation_has_the_right_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 2, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    angles = torch.randn(3, 2, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(RotateToHeads.apply, (x, angles.cos(), angles.sin()))


@pytest.mark.parametrize("shape", [(5, 16), (3, 2, 16)])
def test_swiglu_is_silu_of_gate_times_up(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    gate, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(SwiGLU.apply(x), torch.nn.functional.silu(gate) * up)
    assert torch.autograd.gradcheck(SwiGLU.apply, (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_norm_is_rms_norm_with_the_given_epsilon(dtype: torch.dtype, transposed: bool) -> None:
    """Forward and backward, also where activations arrive as a view with its dimensions exchanged."""
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(config(params_dtype=dtype), 32, eps=0.5)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5, generator=generator)
    x = torch.randn(3, 5, 32, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(3, 5, 32, generator=generator, dtype=torch.float64).to(dtype)
    if transposed:
        x, weight = x.transpose(0, 1), weight.transpose(0, 1)
    x.requires_grad_()
    exact_x, exact_w = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    expected = exact_x / (exact_x.pow(2).mean(-1, keepdim=True) + 0.5).sqrt() * exact_w
    ours = norm(x)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(ours, expected.to(dtype), **tolerance)
    gradients = torch.autograd.grad((ours * weight).sum(), (x, norm.weight))
    exact = torch.autograd.grad((expected * weight.double()).sum(), (exact_x, exact_w))
    for a, b in zip(gradients, exact, strict=True):
        torch.testing.assert_close(a, b.to(dtype), **tolerance)


@pytest.mark.parametrize("on", [False, True])
def test_norm_marks_its_weight_for_sequence_parallelism(on: bool) -> None:
    """Without the mark, Megatron never sums the norms' gradients over tensor-parallel ranks."""
    settings = config(sequence_parallel=on, tensor_model_parallel_size=2 if on else 1)
    assert RMSNorm(settings, 32).weight.sequence_parallel is on


def test_norm_has_the_parameter_type_of_the_configuration() -> None:
    assert RMSNorm(config(params_dtype=torch.bfloat16), 32).weight.dtype == torch.bfloat16


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": LINEAR,
    "llama3, low 2, high 8, original 64": LLAMA3,
    "llama3 of Llama 3.1": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "llama3 of Llama 3.2": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("parameters", ROPES.values(), ids=ROPES)
def test_frequencies_equal_those_of_transformers(parameters: dict[str, Any], head_dim: int) -> None:
    theirs = LlamaRotaryEmbedding(LlamaConfig(head_dim=head_dim, rope_parameters=dict(parameters))).inv_freq
    scaling = None if parameters["rope_type"] == "default" else parameters
    ours = inverse_frequencies(Rope(parameters["rope_theta"], scaling), head_dim)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_llama3_example_uses_all_three_bands() -> None:
    """Kept, interpolated and divided: else the comparison above would not test the formula."""
    plain = inverse_frequencies(Rope(100.0), 16)
    ratio = plain / inverse_frequencies(Rope(100.0, LLAMA3), 16)
    assert ratio[0] == 1.0
    assert ratio[-1] == 4.0
    assert any(1.01 < r < 3.99 for r in ratio.tolist())


@pytest.mark.parametrize(("length", "window"), [(40, 7), (128, 40), (700, 5), (700, 127), (700, 300), (257, 128)])
def test_windowed_attention_is_a_band(length: int, window: int) -> None:
    """In blocks or not: each token sees itself and window - 1 before it, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 4, length, 8), (1, 2, length, 8), (1, 2, length, 8))
    ours = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    out = windowed_attention(*ours, window=window, scale=0.3, dropout=0.0)
    q, k, v = theirs[0], theirs[1].repeat_interleave(2, 1), theirs[2].repeat_interleave(2, 1)
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    scores = (q @ k.mT * 0.3).masked_fill((distance < 0) | (distance >= window), -torch.inf)
    wanted = scores.softmax(-1) @ v
    torch.testing.assert_close(out, wanted)
    weights = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    (out * weights).sum().backward()
    (wanted * weights).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
