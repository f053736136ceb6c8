"""Attention of one token for each of some rows, on CPU (see `prism_nemo.generation.cpu_kernels`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from prism_nemo.generation.cpu_kernels import flat, over_rows
from prism_nemo.generation.simd import (
    LANES,
    NONE,
    ONE,
    ZERO,
    add,
    compiled,
    copy,
    exp,
    fma,
    larger,
    largest,
    load,
    mul,
    number,
    put,
    rounded,
    splat,
    store,
    sub,
    total,
    within,
)


def attend(
    qkv: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor] | None,
    positions: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """One token's attention for each of some rows: rotate its queries and key, remember key and value, attend.

    A row is read up to its own length, first its keys and then its values, each once.

    Args:
        qkv: [rows, groups, per group + 2, d]: the group's queries, its key, its value.
        angles: Cosines and sines by position, [positions, d / 2] each; None without rotary embedding. The halves of a
            head form the pairs (Llama's order).
        positions: [rows], where each token stands.
        keys: Of `prism_nemo.generation.caches.PackedKeyValues`, whose first rows are these.
        values: The same.
        scale: Of the scores; None for ``1 / sqrt(d)``.
        window: Positions that a token sees, itself included; None for all before it.

    Returns:
        [rows, groups * per group * d].
    """
    rows, groups, parts, d = qkv.shape
    out = qkv.new_empty(rows, groups * (parts - 2) * d)
    cos, sin = angles or (qkv.new_empty(0), qkv.new_empty(0))
    places = positions.numpy()
    sizes = groups, parts - 2, d, keys.shape[-1] // LANES
    seen = 2**62 if window is None else window
    over_rows(
        _attend,
        rows,
        int(places.mean() + 1) * groups * d * 2,
        flat(qkv),
        flat(cos),
        flat(sin),
        places,
        flat(keys),
        flat(values),
        keys.stride(0),
        sizes,
        np.float32(d**-0.5 if scale is None else scale),
        seen,
        flat(out),
    )
    return out


@compiled
def _attend(
    qkv: Any,
    cos: Any,
    sin: Any,
    positions: Any,
    keys: Any,
    values: Any,
    stride: int,
    sizes: tuple[int, int, int, int],
    scale: Any,
    window: int,
    out: Any,
    first: int,
    end: int,
) -> None:
    groups, per_group, d, width = sizes
    heads, size = groups * per_group, LANES * width
    # A token's numbers in fp32, after the rotation, each head `width` wide; then as they are kept, one head at a time.
    token = np.zeros(groups * (per_group + 2) * width, np.float32)
    kept = np.zeros(width, keys.dtype)
    sums = np.zeros(heads * width, np.float32)
    most = 0
    for row in range(first, end):
        most = max(most, min(positions[row] + 1, window + LANES))
    room = (most // LANES + 2) * LANES
    scores = np.zeros(heads * room, np.float32)
    for row in range(first, end):
        position = positions[row]
        _rotate(qkv, row * groups * (per_group + 2) * d, cos, sin, position * (d // 2), sizes, keys, token)
        last, lane = row * stride + position // LANES * groups * size, position % LANES
        for group in range(groups):
            key, at = (group * (per_group + 2) + per_group) * width, last + group * size
            if lane == 0:  # a value that is not there yet weighs 0, which must not meet what is no number
                for i in range(0, size, LANES):
                    store(values, at + i, splat(ZERO))
            for i in range(0, width, LANES):
                store(kept, i, load(token, key + i))
                store(values, at + lane * width + i, load(token, key + width + i))
            for i in range(width):
                copy(keys, at + i * LANES + lane, kept, i)
        start = max(0, position - window + 1)
        begin = start - start % LANES
        count = position - begin + 1
        _score(token, keys, row * stride + begin // LANES * groups * size, count, sizes, scores, room)
        for head in range(heads):
            _soften(scores, head * room, start - begin, count, scale)
        _sum(scores, room, values, row * stride + begin // LANES * groups * size, count, sizes, sums)
        for head in range(heads):
            for i in range(0, width, LANES):
                store(kept, i, load(sums, head * width + i))
            for i in range(d):
                copy(out, (row * heads + head) * d + i, kept, i)


@compiled
def _rotate(
    qkv: Any, source: int, cos: Any, sin: Any, angle: int, sizes: tuple[int, int, int, int], like: Any, token: Any
) -> None:
    """A token's queries and keys rotated, and its values, rounded to the type of `like`; see `_attend`."""
    groups, per_group, d, width = sizes
    half = d // 2
    whole = half - half % LANES
    for head in range(groups * (per_group + 2)):
        at, to = source + head * d, head * width
        if len(cos) > 0 and head % (per_group + 2) != per_group + 1:
            for i in range(0, whole, LANES):
                a, b = load(qkv, at + i), load(qkv, at + half + i)
                c, s = load(cos, angle + i), load(sin, angle + i)
                store(token, to + i, sub(mul(a, c), mul(b, s)))
                store(token, to + half + i, fma(b, c, mul(a, s)))
            for i in range(whole, half):
                u, v = number(qkv, at + i), number(qkv, at + half + i)
                p, q = number(cos, angle + i), number(sin, angle + i)
                put(token, to + i, u * p - v * q)
                put(token, to + half + i, v * p + u * q)
        else:
            for i in range(d):
                put(token, to + i, number(qkv, at + i))
        for i in range(0, width, LANES):
            store(token, to + i, rounded(like, load(token, to + i)))


@compiled
def _score(
    token: Any, keys: Any, at: int, count: int, sizes: tuple[int, int, int, int], scores: Any, room: int
) -> None:
    """Products of each query with `count` keys, from the block at `at` on; those behind them are undefined."""
    groups, per_group, _, width = sizes
    for begin in range(0, count, LANES):
        for group in range(groups):
            for member in range(0, per_group, 2):
                # Two queries at a time read the keys once; a last one without a partner is its own.
                x, y = group * per_group + member, group * per_group + min(member + 1, per_group - 1)
                qx, qy = (x + 2 * group) * width, (y + 2 * group) * width
                # Two sums for each, so that none waits for the one before.
                x0 = x1 = y0 = y1 = splat(ZERO)
                for i in range(0, width, 2):
                    k0, k1 = load(keys, at + i * LANES), load(keys, at + (i + 1) * LANES)
                    x0 = fma(splat(number(token, qx + i)), k0, x0)
                    y0 = fma(splat(number(token, qy + i)), k0, y0)
                    x1 = fma(splat(number(token, qx + i + 1)), k1, x1)
                    y1 = fma(splat(number(token, qy + i + 1)), k1, y1)
                store(scores, x * room + begin, add(x0, x1))
                store(scores, y * room + begin, add(y0, y1))
            at += LANES * width


@compiled
def _soften(scores: Any, at: int, first: int, count: int, scale: Any) -> None:
    """Scores at `at` to their softmax over those from `first` to before `count`; to 0 beside them, in whole blocks."""
    top = splat(NONE)
    for begin in range(0, count, LANES):
        scaled = mul(load(scores, at + begin), splat(scale))
        if begin < first or begin + LANES > count:
            scaled = within(scaled, first - begin, count - begin, NONE)
        store(scores, at + begin, scaled)
        top = larger(top, scaled)
    highest = splat(largest(top))
    sums = splat(ZERO)
    for begin in range(0, count, LANES):
        weight = exp(sub(load(scores, at + begin), highest))
        store(scores, at + begin, weight)
        sums = add(sums, weight)
    factor = splat(ONE / total(sums))
    for begin in range(0, count, LANES):
        store(scores, at + begin, mul(load(scores, at + begin), factor))


@compiled
def _sum(
    weights: Any, room: int, values: Any, at: int, count: int, sizes: tuple[int, int, int, int], sums: Any
) -> None:
    """For each head the sum of `count` values, from the block at `at` on, by their weights."""
    groups, per_group, _, width = sizes
    for i in range(0, groups * per_group * width, LANES):
        store(sums, i, splat(ZERO))
    for begin in range(0, count, LANES):
        for group in range(groups):
            for member in range(0, per_group, 2):
                x, y = group * per_group + member, group * per_group + min(member + 1, per_group - 1)
                wx, wy = x * room + begin, y * room + begin
                for i in range(0, width, LANES):
                    x0, y0 = load(sums, x * width + i), load(sums, y * width + i)
                    x1 = y1 = splat(ZERO)
                    for j in range(0, LANES, 2):
                        v0, v1 = load(values, at + j * width + i), load(values, at + (j + 1) * width + i)
                        x0 = fma(splat(number(weights, wx + j)), v0, x0)
                        y0 = fma(splat(number(weights, wy + j)), v0, y0)
                        x1 = fma(splat(number(weights, wx + j + 1)), v1, x1)
                        y1 = fma(splat(number(weights, wy + j + 1)), v1, y1)
                    store(sums, y * width + i, add(y0, y1))
                    store(sums, x * width + i, add(x0, x1))
            at += LANES * width
