"""The choice of a token for each row of logits, on CPU (see `prism_nemo.generation.cpu_kernels`)."""

from __future__ import annotations

import math
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
    exp,
    larger,
    largest,
    load,
    mul,
    number,
    splat,
    store,
    sub,
    total,
)

# Tokens whose weights are added up before one of them is looked for.
_BLOCK = 128


def draw(logits: torch.Tensor, heat: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A token for each row, as `prism_nemo.generation.choose.choose` does without top-k and nucleus.

    Args:
        logits: [n, vocab], contiguous in each row.
        heat: [n] temperatures in fp32, 0 for greedy.
        uniforms: [n] in [0, 1), fp64.

    Returns:
        Token ids [n], and the log-probability of each at temperature 1, [n] fp64; not a number where logits are none.
    """
    rows, vocab = logits.shape
    tokens, logprobs = torch.empty(rows, dtype=torch.long), torch.empty(rows, dtype=torch.float64)
    stride = logits.stride(0) if rows > 1 else vocab
    whole = logits.as_strided(((rows - 1) * stride + vocab,), (1,))
    over_rows(
        _draw, rows, 4 * vocab, flat(whole), stride, vocab, heat.numpy(), uniforms.numpy(), tokens.numpy(),
        logprobs.numpy(),
    )  # fmt: skip
    return tokens, logprobs


@compiled
def _top(logits: Any, first: int, end: int) -> Any:
    """The largest of some logits."""
    whole = end - (end - first) % LANES
    found = splat(NONE)
    for i in range(first, whole, LANES):
        found = larger(found, load(logits, i))
    for i in range(whole, end):
        found = larger(found, splat(number(logits, i)))
    return largest(found)


@compiled
def _weigh(logits: Any, first: int, end: int, top: Any, factor: Any, weights: Any) -> Any:
    """Put ``exp((logit - top) * factor)`` into `weights`; their sum."""
    whole = end - (end - first) % LANES
    sums = splat(ZERO)
    for i in range(first, whole, LANES):
        weight = exp(mul(sub(load(logits, i), splat(top)), splat(factor)))
        store(weights, i - first, weight)
        sums = add(sums, weight)
    found = total(sums)
    for i in range(whole, end):
        weight = largest(exp(splat((number(logits, i) - top) * factor)))
        weights[i - first] = weight
        found += weight
    return found


@compiled
def _passes(sums: Any, count: int, target: float) -> int:
    """The first of `count` ascending sums that exceeds a target at least 0; rounding may put it on the last one."""
    target = min(target, np.nextafter(sums[count - 1], 0.0))
    place = 0
    while place < count - 1 and not sums[place] > target:
        place += 1
    return place


@compiled
def _draw(
    logits: Any,
    stride: int,
    vocab: int,
    heat: Any,
    uniforms: Any,
    tokens: Any,
    logprobs: Any,
    first: int,
    end: int,
) -> None:
    blocks = (vocab + _BLOCK - 1) // _BLOCK
    sums, inside, weights = np.zeros(blocks), np.zeros(_BLOCK), np.zeros(_BLOCK, np.float32)
    for row in range(first, end):
        at = row * stride
        top, place = NONE, 0
        for block in range(blocks):
            begin = at + block * _BLOCK
            found = _top(logits, begin, min(begin + _BLOCK, at + vocab))
            if found > top:
                top, place = found, block
        whole = 0.0
        for block in range(blocks):
            begin = at + block * _BLOCK
            whole += _weigh(logits, begin, min(begin + _BLOCK, at + vocab), top, ONE, weights)
            sums[block] = whole
        if heat[row] == 0:
            chosen = place * _BLOCK
            while chosen < vocab - 1 and logits[at + chosen] != top:
                chosen += 1
        else:
            factor = ONE / heat[row]
            if heat[row] != 1:
                heated = 0.0
                for block in range(blocks):
                    begin = at + block * _BLOCK
                    heated += _weigh(logits, begin, min(begin + _BLOCK, at + vocab), top, factor, weights)
                    sums[block] = heated
            target = uniforms[row] * sums[blocks - 1]
            place = _passes(sums, blocks, target)
            begin = at + place * _BLOCK
            count = min(_BLOCK, at + vocab - begin)
            _weigh(logits, begin, begin + count, top, factor, weights)
            before = sums[place - 1] if place > 0 else 0.0
            within_block = 0.0
            for i in range(count):
                within_block += weights[i]
                inside[i] = within_block
            chosen = place * _BLOCK + _passes(inside, count, max(0.0, target - before))
        tokens[row] = chosen
        logprobs[row] = np.float64(logits[at + chosen]) - np.float64(top) - math.log(whole)
