"""The kinds of layers while decoding: what each adds to the residual stream, and what it remembers.

A layer gives the input of its output projection; the decoder projects and adds, which is one kernel where no
tensor-parallel sum stands between.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from prism_nemo.generation import cpu_kernels
from prism_nemo.generation.attention_kernel import attend
from prism_nemo.generation.caches import Cache, KeyValues, Memory, Nothing, PackedKeyValues, State
from prism_nemo.generation.products import Product
from prism_nemo.generation.spans import Prompts, Step
from prism_nemo.models.family import Architecture
from prism_nemo.models.layers.attention import windowed_attention
from prism_nemo.models.layers.causal_conv import causal_conv
from prism_nemo.models.layers.mamba import MambaMixer
from prism_nemo.models.layers.mamba_kernels import positive_dt
from prism_nemo.models.layers.ssd import ssd_scan

# Looks a parameter of the layer up by the name that weight tables use.
Lookup = Callable[[str], torch.Tensor]

# Bytes of Mamba state updated at a time on CPU: three kernels pass over them, and should find them in the core's cache.
_STATE_BYTES = 2**19


class Layer(ABC):
    """One addition to the residual stream.

    Attributes:
        name: Of the Megatron layer that it belongs to.
        norm: Weight of the norm before it.
        out: The projection after it, this rank's columns.
    """

    name: str
    norm: torch.Tensor
    out: Product

    @abstractmethod
    def cache(self, rows: int, capacity: int, like: torch.Tensor) -> Cache:
        """Room for `rows` responses of up to `capacity` tokens."""

    @abstractmethod
    def prefill(self, x: torch.Tensor, prompts: Prompts) -> tuple[torch.Tensor, Memory]:
        """Normalised [b, t, h] to the projection's input [b, t, ...], and what is remembered of each prompt."""

    @abstractmethod
    def step(self, x: torch.Tensor, cache: Any, step: Step) -> torch.Tensor:
        """Normalised [rows, h] to the projection's input [rows, ...]; the cache takes the token in."""


class Attention(Layer):
    """Grouped-query attention."""

    def __init__(self, get: Lookup, a: Architecture, tp: int) -> None:
        self.norm, self.out = get("input_layernorm.weight"), Product(get("self_attention.linear_proj.weight"))
        self.qkv = Product(get("self_attention.linear_qkv.weight"))
        self.groups, self.d = a.num_query_groups // tp, a.kv_channels
        self.per_group = a.num_attention_heads // a.num_query_groups
        self.scale, self.window = a.attention_multiplier, a.sliding_window

    def cache(self, rows: int, capacity: int, like: torch.Tensor) -> KeyValues | PackedKeyValues:
        """See `Layer.cache`."""
        kind = PackedKeyValues if cpu_kernels.serves(like) else KeyValues
        return kind((rows, self.groups, capacity, self.d), like)

    def project(
        self, x: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[..., h] to rotated queries and keys [..., groups, per group + 1, d] and values [..., groups, d]."""
        qkv = self.qkv(x).unflatten(-1, (self.groups, self.per_group + 2, self.d))
        qk, v = qkv[..., :-1, :], qkv[..., -1, :]
        return qk if cos is None or sin is None else _rotate(qk, cos, sin), v

    def prefill(self, x: torch.Tensor, prompts: Prompts) -> tuple[torch.Tensor, Memory]:
        """See `Layer.prefill`."""
        qk, v = self.project(x, prompts.cos, prompts.sin)
        q = qk[..., :-1, :].flatten(2, 3).transpose(1, 2)
        k, v = qk[..., -1, :].transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
        if self.window is not None and x.shape[1] > self.window:
            out = windowed_attention(q, k, v, window=self.window, scale=self.scale, dropout=0.0)
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.scale, enable_gqa=self.per_group > 1
            )
        return out.transpose(1, 2).flatten(2), (k, v)

    def step(self, x: torch.Tensor, cache: KeyValues | PackedKeyValues, step: Step) -> torch.Tensor:
        """See `Layer.step`."""
        if isinstance(cache, PackedKeyValues):
            qkv = self.qkv(x).view(step.rows, self.groups, self.per_group + 2, self.d)
            return attend(qkv, step.angles, step.positions, cache.keys, cache.values, self.scale, self.window)
        return self._attend(*self.project(x, *step.rotation()), cache, step)

    def _attend(self, qk: torch.Tensor, v: torch.Tensor, cache: KeyValues, step: Step) -> torch.Tensor:
        """In torch's kernels, band by band."""
        capacity = cache.keys.shape[2]
        heads = torch.arange(step.rows * self.groups, device=v.device).view(-1, self.groups)
        places = (heads * capacity + step.positions.unsqueeze(-1)).flatten()
        cache.keys.view(-1, self.d).index_copy_(0, places, qk[:, :, -1].reshape(-1, self.d))
        cache.values.view(-1, self.d).index_copy_(0, places, v.reshape(-1, self.d))
        out = v.new_empty(step.rows, self.groups, self.per_group, self.d)
        for band in step.bands:
            rows, columns = slice(band.first, band.end), slice(band.start, band.stop)
            # The queries of a group become query positions of their shared key/value head: nothing is expanded.
            out[rows] = F.scaled_dot_product_attention(
                qk[rows, :, :-1],
                cache.keys[rows, :, columns],
                cache.values[rows, :, columns],
                attn_mask=band.mask,
                scale=self.scale,
            )
        return out.flatten(1)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """[..., groups, heads, d] rotated by the angles; the halves of a head form the pairs (Llama's order)."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    (a, b), (out_a, out_b) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(a, cos, out=out_a)
    out_a.addcmul_(b, sin, value=-1.0)
    torch.mul(b, cos, out=out_b)
    out_b.addcmul_(a, sin)
    return out


class MLP(Layer):
    """SwiGLU, or a squared ReLU without a gate."""

    def __init__(self, get: Lookup, a: Architecture) -> None:
        self.norm, self.out = get("pre_mlp_layernorm.weight"), Product(get("mlp.linear_fc2.weight"))
        self.fc1, self.gated = Product(get("mlp.linear_fc1.weight")), a.activation == "swiglu"

    def cache(self, rows: int, capacity: int, like: torch.Tensor) -> Nothing:
        """See `Layer.cache`."""
        return Nothing()

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        """[..., h] to what the second matrix takes, [..., inner]."""
        hidden = self.fc1(x)
        if self.gated:
            if cpu_kernels.serves(hidden):
                return cpu_kernels.swiglu(hidden)
            gate, up = hidden.chunk(2, dim=-1)
            return F.silu(gate).mul_(up)
        return hidden.relu_().square_()

    def prefill(self, x: torch.Tensor, prompts: Prompts) -> tuple[torch.Tensor, Memory]:
        """See `Layer.prefill`."""
        return self.inner(x), ()

    def step(self, x: torch.Tensor, cache: Nothing, step: Step) -> torch.Tensor:
        """See `Layer.step`."""
        return self.inner(x)


class Mamba(Layer):
    """A Mamba-2 mixer that remembers its state and the last inputs of its convolution.

    Padding on the right of a prompt must leave the state untouched: it enters the recurrence with a step of zero,
    which neither adds to the state nor decays it. The window is read from where the prompt ends.
    """

    def __init__(self, get: Lookup, mixer: MambaMixer) -> None:
        self.norm, self.out = get("norm.weight"), Product(mixer.out_proj.weight)
        self.mixer = mixer
        projection, self.kernel, self.bias = mixer.local_weights()
        self.projection = Product(projection)
        self.taps = self.kernel.squeeze(1).T.contiguous()  # [width, c]; a few kilobytes
        self.A, self.D = -torch.exp(mixer.A_log.float()), mixer.D.float()

    def cache(self, rows: int, capacity: int, like: torch.Tensor) -> State:
        """See `Layer.cache`."""
        layout, (channels, _, width) = self.mixer.layout, self.kernel.shape
        wide = layout.local_heads // layout.local_groups * layout.head_dim
        state = (rows, layout.local_groups, layout.d_state, wide)
        return State((rows, width - 1, channels), state, like)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[..., h] to the gate [..., inner], the convolution's input [..., channels] and the steps [..., heads]."""
        m = self.mixer
        inner, _, bc, _, heads = m.layout.local_rows
        z, xbc, dt = self.projection(x).split([inner, inner + 2 * bc, heads], dim=-1)
        return z, xbc, positive_dt(dt, m.dt_bias, m.dt_limit)

    def split_mixed(self, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The convolution's output [..., channels] as x [..., heads, p], B and C [..., groups, n]."""
        layout = self.mixer.layout
        inner, _, bc, _, _ = layout.local_rows
        x, b, c = mixed.split([inner, bc, bc], dim=-1)
        groups = layout.local_groups
        return x.unflatten(-1, (layout.local_heads, -1)), b.unflatten(-1, (groups, -1)), c.unflatten(-1, (groups, -1))

    def prefill(self, x: torch.Tensor, prompts: Prompts) -> tuple[torch.Tensor, Memory]:
        """See `Layer.prefill`."""
        z, xbc, dt = self.project(x)
        width = self.kernel.shape[-1] - 1
        ends = prompts.lengths.view(-1, 1, 1) + torch.arange(width, device=x.device).view(1, -1, 1)
        window = F.pad(xbc, (0, 0, width, 0)).gather(1, ends.expand(-1, -1, xbc.shape[-1]))
        xs, b, c = self.split_mixed(causal_conv(xbc, self.kernel, self.bias))
        y, state = ssd_scan(xs, dt * prompts.real, self.A, b, c, self.D, chunk_size=self.mixer.chunk_size)
        return self.mixer.norm(y.flatten(2), z), (window, state.view(len(x), b.shape[2], -1, b.shape[3]).mT)

    def step(self, x: torch.Tensor, cache: State, step: Step) -> torch.Tensor:
        """See `Layer.step`."""
        z, xbc, dt = self.project(x)
        window = cache.window[: step.rows]
        mixed = xbc * self.taps[-1] if self.bias is None else torch.addcmul(self.bias, xbc, self.taps[-1])
        for i in range(window.shape[1]):
            mixed.addcmul_(window[:, i], self.taps[i])
            window[:, i] = window[:, i + 1] if i + 1 < window.shape[1] else xbc
        xs, b, c = self.split_mixed(F.silu(mixed))
        y = _recur(cache.state[: step.rows], xs, dt, self.A, b, c)
        y.addcmul_(xs, self.D.unsqueeze(-1))
        return self.mixer.norm(y.to(x.dtype).flatten(1), z)


def _recur(
    state: torch.Tensor, x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor
) -> torch.Tensor:
    """One token of the recurrence (`prism_nemo.models.layers.ssd.ssd_step` without D), some rows after others.

    The heads of a group lie side by side in the state: C times a group's state is then a product that runs along memory
    (eight times faster on CPU than one with a column for each head).

    Args:
        state: [n, groups, s, heads / groups * p]; updated in place.
        x: [n, heads, p].
        dt: [n, heads], in the state's type.
        A: [heads].
        B: [n, groups, s].
        C: [n, groups, s].

    Returns:
        [n, heads, p] in the state's type.
    """
    (n, groups), p = state.shape[:2], x.shape[-1]
    decay = torch.exp(dt * A).unsqueeze(-1).expand(-1, -1, p).reshape(n, groups, 1, -1)
    added = (x.to(state.dtype) * dt.unsqueeze(-1)).view(n, groups, 1, -1)
    inputs, outputs = B.to(state.dtype).unsqueeze(-1), C.to(state.dtype).unsqueeze(-2)
    y = torch.empty_like(added)
    rows = n if state.is_cuda else max(1, _STATE_BYTES // (state[0].numel() * state.element_size()))
    parts = (t.split(rows) for t in (state, decay, added, inputs, outputs, y))
    for own, faded, new, along, read, result in zip(*parts, strict=True):
        own.mul_(faded).addcmul_(along, new)
        torch.matmul(read, own, out=result)
    return y.view(n, -1, p)


def layers_of(a: Architecture, layer: Any, get: Lookup, tp: int) -> list[Layer]:
    """A Megatron layer as one addition, or two for a transformer's.

    Args:
        a: The architecture.
        layer: The module.
        get: Looks up a parameter of it.
        tp: Tensor-parallel size.
    """
    if not a.layer_pattern:
        return [Attention(get, a, tp), MLP(get, a)]
    kind = a.layer_pattern[layer.layer_number - 1]
    return [Mamba(get, layer.mixer) if kind == "M" else Attention(get, a, tp) if kind == "*" else MLP(get, a)]
