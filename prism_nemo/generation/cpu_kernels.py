"""What a step does between its products, on CPU: how kernels run over rows, norms, and the gate of an MLP.

Attention is in `attention_kernel`, the choice of tokens in `drawing_kernel`. A kernel reads its rows once and keeps
what it makes of them in registers; torch's parts would each read and write memory. Sums run in fp32, whatever the type
of the tensors; results are rounded once, and where training rounds on the way (queries after their rotation, the gate
of an MLP), so is here.

The functions take fp32 or bf16 tensors on the CPU, contiguous unless they say otherwise. Every row is computed by
itself: neither the other rows nor the number of threads changes it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from prism_nemo.generation.simd import (
    LANES,
    ONE,
    ZERO,
    add,
    compiled,
    div,
    exp,
    fma,
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
)

# Numbers that a thread has to go through for it to be worth waking.
_PER_THREAD = 2**17


def serves(tensor: torch.Tensor) -> bool:
    """Whether the kernels can read a tensor of this type and device."""
    return tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.bfloat16)


def flat(tensor: torch.Tensor) -> Any:
    """A tensor's numbers as numba reads them; nothing is copied."""
    flat = tensor.detach().view(-1)
    return flat.view(torch.uint16).numpy() if flat.dtype == torch.bfloat16 else flat.numpy()


def over_rows(kernel: Callable[..., None], rows: int, width: int, *arguments: Any) -> None:
    """Run a kernel over rows, each of about `width` numbers, on as many of torch's threads as are worth it."""
    threads = min(torch.get_num_threads(), rows, 1 + rows * width // _PER_THREAD)
    if threads == 1:
        kernel(*arguments, 0, rows)
        return
    bounds = [rows * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(kernel, *arguments, *bounds[i : i + 2]) for i in range(1, threads)]
        kernel(*arguments, 0, bounds[1])
        for other in others:
            other.result()


def normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm of the last dimension: ``x / sqrt(mean(x^2) + eps) * weight``."""
    out, width = torch.empty_like(x), x.shape[-1]
    rows = x.numel() // width
    over_rows(_norm, rows, width, flat(x), flat(weight), np.float32(eps), width, flat(out))
    return out


@compiled
def _norm(x: Any, weight: Any, eps: Any, width: int, out: Any, first: int, end: int) -> None:
    for row in range(first, end):
        at = row * width
        whole = width - width % LANES
        squares = splat(ZERO)
        for i in range(0, whole, LANES):
            part = load(x, at + i)
            squares = fma(part, part, squares)
        mean = total(squares)
        for i in range(whole, width):
            mean += number(x, at + i) * number(x, at + i)
        factor = ONE / np.sqrt(mean / np.float32(width) + eps)
        for i in range(0, whole, LANES):
            store(out, at + i, mul(mul(load(x, at + i), splat(factor)), load(weight, i)))
        for i in range(whole, width):
            put(out, at + i, number(x, at + i) * factor * number(weight, i))


def swiglu(hidden: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` of [..., 2 n] that holds the gate before the rest; [..., n]."""
    width = hidden.shape[-1] // 2
    out = hidden.new_empty(*hidden.shape[:-1], width)
    over_rows(_gate, out.numel() // width, 4 * width, flat(hidden), width, flat(out))
    return out


@compiled
def _gate(hidden: Any, width: int, out: Any, first: int, end: int) -> None:
    whole = width - width % LANES
    one = splat(ONE)
    for row in range(first, end):
        at, to = 2 * row * width, row * width
        for i in range(0, whole, LANES):
            gate = load(hidden, at + i)
            gate = rounded(out, div(gate, add(one, exp(sub(splat(ZERO), gate)))))
            store(out, to + i, mul(gate, load(hidden, at + width + i)))
        for i in range(whole, width):
            gate = splat(number(hidden, at + i))
            gate = rounded(out, div(gate, add(one, exp(sub(splat(ZERO), gate)))))
            put(out, to + i, largest(mul(gate, splat(number(hidden, at + width + i)))))
