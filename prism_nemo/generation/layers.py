"""The kinds of layers while decoding: what each adds to the residual stream, and what it remembers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from prism_nemo.models.family import Architecture
from prism_nemo.models.layers.causal_conv import causal_conv, causal_conv_step
from prism_nemo.models.layers.mamba import MambaMixer
from prism_nemo.models.layers.mamba_kernels import positive_dt
from prism_nemo.models.layers.ssd import ssd_scan, ssd_step

# Looks a parameter of the layer up by the name that weight tables use.
Lookup = Callable[[str], torch.Tensor]


@dataclass
class Span:
    """Where the tokens of a step stand, computed once for all layers.

    Attributes:
        start: First cache position.
        end: Last cache position plus one.
        real: [b, end] whether a cache position holds a token of the row, not padding on its left.
        mask: [b, 1, t or 1, end] which keys a query may see.
        cos: [b, 1, t, d / 2], or None without rotary embedding.
        sin: The same.
    """

    start: int
    end: int
    real: torch.Tensor
    mask: torch.Tensor
    cos: torch.Tensor | None
    sin: torch.Tensor | None


class Layer(ABC):
    """One addition to the residual stream."""

    norm: torch.Tensor

    def begin(self, batch: int, capacity: int, like: torch.Tensor) -> None:
        """Make room for `capacity` tokens in each of `batch` rows."""
        return

    @abstractmethod
    def __call__(self, x: torch.Tensor, span: Span) -> torch.Tensor:
        """Normalised [b, t, h] to this rank's part of what is added, [b, t, h]."""

    def select(self, rows: torch.Tensor) -> None:
        """Keep (or repeat) the given rows of what is remembered."""
        return


class Attention(Layer):
    """Grouped-query attention with a preallocated key/value cache."""

    def __init__(self, get: Lookup, a: Architecture, tp: int) -> None:
        self.norm = get("input_layernorm.weight")
        self.qkv, self.proj = get("self_attention.linear_qkv.weight"), get("self_attention.linear_proj.weight")
        self.heads, self.groups, self.d = a.num_attention_heads // tp, a.num_query_groups // tp, a.kv_channels
        self.scale = a.attention_multiplier
        self.keys = self.values = torch.empty(0)

    def begin(self, batch: int, capacity: int, like: torch.Tensor) -> None:
        """See `Layer.begin`."""
        shape = (batch, self.groups, capacity, self.d)
        self.keys, self.values = like.new_empty(shape), like.new_empty(shape)

    def __call__(self, x: torch.Tensor, span: Span) -> torch.Tensor:
        """See `Layer`."""
        b, t, _ = x.shape
        per_group = self.heads // self.groups
        qkv = F.linear(x, self.qkv).view(b, t, self.groups, per_group + 2, self.d)
        q = qkv[:, :, :, :per_group].reshape(b, t, self.heads, self.d).transpose(1, 2)
        k, v = qkv[:, :, :, per_group].transpose(1, 2), qkv[:, :, :, per_group + 1].transpose(1, 2)
        if span.cos is not None and span.sin is not None:
            q, k = _rotate(q, span.cos, span.sin), _rotate(k, span.cos, span.sin)
        self.keys[:, :, span.start : span.end] = k
        self.values[:, :, span.start : span.end] = v
        k, v = self.keys[:, :, : span.end], self.values[:, :, : span.end]
        if t == 1:
            # The queries of a group become query positions of their shared key/value head: nothing is expanded.
            q = q.reshape(b, self.groups, per_group, self.d)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=span.mask, scale=self.scale)
            out = out.reshape(b, self.heads, 1, self.d)
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=span.mask, scale=self.scale, enable_gqa=per_group > 1
            )
        return F.linear(out.transpose(1, 2).reshape(b, t, -1), self.proj)

    def select(self, rows: torch.Tensor) -> None:
        """See `Layer.select`."""
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class MLP(Layer):
    """SwiGLU, or a squared ReLU without a gate."""

    def __init__(self, get: Lookup, a: Architecture) -> None:
        self.norm = get("pre_mlp_layernorm.weight")
        self.fc1, self.fc2 = get("mlp.linear_fc1.weight"), get("mlp.linear_fc2.weight")
        self.gated = a.activation == "swiglu"

    def __call__(self, x: torch.Tensor, span: Span) -> torch.Tensor:
        """See `Layer`."""
        hidden = F.linear(x, self.fc1)
        if self.gated:
            gate, up = hidden.chunk(2, dim=-1)
            return F.linear(F.silu(gate) * up, self.fc2)
        return F.linear(F.relu(hidden).square(), self.fc2)


class Mamba(Layer):
    """A Mamba-2 mixer that remembers its state and the last inputs of its convolution.

    Padding on the left must leave both untouched: it enters the convolution as zeros and the recurrence with a step
    of zero, which neither adds to the state nor decays it.
    """

    def __init__(self, get: Lookup, mixer: MambaMixer) -> None:
        self.norm = get("norm.weight")
        self.mixer = mixer
        self.projection, self.kernel, self.bias = mixer.local_weights()
        self.A, self.out = -torch.exp(mixer.A_log), mixer.out_proj.weight
        self.window = self.state = torch.empty(0)

    def __call__(self, x: torch.Tensor, span: Span) -> torch.Tensor:
        """See `Layer`."""
        m, layout = self.mixer, self.mixer.layout
        inner, _, bc, _, heads = layout.local_rows
        z, xbc, dt = F.linear(x, self.projection).split([inner, inner + 2 * bc, heads], dim=-1)
        dt = positive_dt(dt, m.dt_bias, m.dt_limit)
        if span.start > 0:  # one token more; the first read may be of one token too
            mixed = causal_conv_step(self.window, xbc[:, 0], self.kernel, self.bias)
            xs, b, c = self._parts(mixed, [inner, bc, bc])
            y = ssd_step(self.state, xs, dt[:, 0], self.A, b, c, m.D).unsqueeze(1)
        else:
            real = span.real.unsqueeze(-1)
            xbc, dt = xbc * real, dt * real
            width = self.kernel.shape[-1] - 1
            self.window = F.pad(xbc, (0, 0, max(0, width - xbc.shape[1]), 0))[:, -width:].clone()
            xs, b, c = self._parts(causal_conv(xbc, self.kernel, self.bias), [inner, bc, bc])
            y, self.state = ssd_scan(xs, dt, self.A, b, c, m.D, chunk_size=m.chunk_size)
        return F.linear(m.norm(y.flatten(2), z), self.out)

    def _parts(self, mixed: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, b, c = mixed.split(sizes, dim=-1)
        groups = self.mixer.layout.local_groups
        heads = self.mixer.layout.local_heads
        return x.unflatten(-1, (heads, -1)), b.unflatten(-1, (groups, -1)), c.unflatten(-1, (groups, -1))

    def select(self, rows: torch.Tensor) -> None:
        """See `Layer.select`."""
        self.window, self.state = self.window.index_select(0, rows), self.state.index_select(0, rows)


def layers_of(a: Architecture, index: int, layer: Any, get: Lookup, tp: int) -> list[Layer]:
    """A Megatron layer as one addition, or two for a transformer's.

    Args:
        a: The architecture.
        index: Of the layer.
        layer: The module.
        get: Looks up a parameter of it.
        tp: Tensor-parallel size.
    """
    if not a.layer_pattern:
        return [Attention(get, a, tp), MLP(get, a)]
    kind = a.layer_pattern[index]
    return [Mamba(get, layer.mixer) if kind == "M" else Attention(get, a, tp) if kind == "*" else MLP(get, a)]
