"""The recurrence and the convolution of Mamba-2 against their definitions, token by token, in fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mamba_reference import conv, token_recurrence

from prism_nemo.models.layers.causal_conv import causal_conv, causal_conv_step
from prism_nemo.models.layers.ssd import ssd_scan, ssd_step

Tensors = dict[str, torch.Tensor]


def inputs(batch: int = 2, length: int = 21, groups: int = 2, dtype: torch.dtype = torch.float64) -> Tensors:
    """x, dt, A, B, C, D and an initial state, all with gradients. Some heads forget within a token, some remember."""
    generator = torch.Generator().manual_seed(length + 1000 * groups)
    h, p, n = 4, 3, 5

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    values = {
        "x": normal(batch, length, h, p),
        "dt": F.softplus(normal(batch, length, h) - 1.0),
        "A": -torch.logspace(-1, 1.2, h, dtype=torch.float64),
        "B": normal(batch, length, groups, n),
        "C": normal(batch, length, groups, n),
        "D": normal(h),
        "initial_state": normal(batch, h, p, n),
    }
    return {name: value.to(dtype).requires_grad_() for name, value in values.items()}


def scan(values: Tensors, chunk_size: int, seq_idx: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    return ssd_scan(**values, chunk_size=chunk_size, seq_idx=seq_idx)


def gradients(outputs: tuple[torch.Tensor, ...], values: Tensors) -> Tensors:
    """Of one random functional of y and the final state."""
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(o.shape, dtype=torch.float64, generator=generator).to(o.dtype) for o in outputs]
    total = torch.stack([(o * w).sum() for o, w in zip(outputs, weights, strict=True)]).sum()
    return dict(zip(values, torch.autograd.grad(total, list(values.values())), strict=True))


def close(ours: torch.Tensor, exact: torch.Tensor, what: str = "", bound: float = 1e-12) -> None:
    error = (ours.double() - exact.double()).abs().max().item()
    assert error <= bound * max(1.0, exact.abs().max().item()), f"{what} is off by {error}"


def equal_to_definition(values: Tensors, chunk_size: int, seq_idx: torch.Tensor | None = None) -> None:
    ours, exact = scan(values, chunk_size, seq_idx), token_recurrence(**values, seq_idx=seq_idx)
    for name, a, b in zip(("y", "state"), ours, exact, strict=True):
        close(a, b, name)
    theirs = gradients(exact, values)
    for name, gradient in gradients(ours, values).items():
        close(gradient, theirs[name], f"gradient of {name}")


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("length", "chunk"), [(21, 8), (24, 8), (5, 64), (1, 1), (7, 1), (64, 16)])
def test_scan_is_the_recurrence(length: int, chunk: int, groups: int) -> None:
    equal_to_definition(inputs(length=length, groups=groups), chunk)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), length=st.integers(1, 30), chunk=st.integers(1, 12))
def test_scan_with_documents_is_the_recurrence_with_resets(data: st.DataObject, length: int, chunk: int) -> None:
    """Boundaries anywhere, also at chunk edges, and an index that returns after another document."""
    index = st.lists(st.integers(0, 2), min_size=length, max_size=length)
    seq_idx = torch.tensor([data.draw(index), data.draw(index)], dtype=torch.int32)
    equal_to_definition(inputs(length=length), chunk, seq_idx)


def test_scan_without_skip_or_initial_state() -> None:
    values = inputs()
    bare = {name: value for name, value in values.items() if name not in ("D", "initial_state")}
    exact = token_recurrence(**bare, D=torch.zeros(4))
    for a, b in zip(scan(bare, 8), exact, strict=True):
        close(a, b)


def documents(length: int) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Four documents in a row, one that spans whole chunks of 8 and one of a single token; [1, l] and their places."""
    ends = [0, 5, 6, length - 4, length]
    seq_idx = torch.zeros(1, length, dtype=torch.int32)
    places = list(itertools.pairwise(ends))
    for i, (first, last) in enumerate(places):
        seq_idx[:, first:last] = i
    return seq_idx, places


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("changed", range(4))
def test_documents_do_not_feel_each_other_at_all(changed: int, dtype: torch.dtype) -> None:
    """Change one document, and what the others compute, forward and backward, keeps every bit.

    Log-decays of several hundred lie before some documents: the differences of sums that ran over them too would be
    rounded otherwise.
    """
    length = 40
    seq_idx, places = documents(length)
    first, last = places[changed]
    results = []
    for factor in (1.0, 37.0):
        values = {name: value.detach() for name, value in inputs(batch=1, length=length, dtype=dtype).items()}
        del values["initial_state"]
        for name in ("x", "dt", "B", "C"):
            values[name][:, first:last] *= factor
        for value in values.values():
            value.requires_grad_()
        y, _ = scan(values, 8, seq_idx)
        # The changed document's own part of the loss is left out: A and D are common to all.
        others = torch.ones(1, length, 1, 1, dtype=dtype)
        others[:, first:last] = 0.0
        results.append((y * others, gradients((y * others,), values)))
    (y, before), (y_changed, after) = results
    assert torch.equal(y, y_changed)
    for name in values:
        assert torch.equal(before[name], after[name]), name
    assert all(before[name][:, first:last].abs().max() == 0.0 for name in ("x", "dt", "B", "C"))


@pytest.mark.parametrize("chunk", [4, 8, 64])
@pytest.mark.parametrize("cut", [1, 8, 13])
def test_state_hands_a_sequence_over(cut: int, chunk: int) -> None:
    values = inputs()
    whole, state = scan(values, chunk)
    parts, carried = [], values["initial_state"]
    for piece in (slice(None, cut), slice(cut, None)):
        part = {name: value[:, piece] if name in ("x", "dt", "B", "C") else value for name, value in values.items()}
        y, carried = scan({**part, "initial_state": carried}, chunk)
        parts.append(y)
    joined = (torch.cat(parts, dim=1), carried)
    close(joined[0], whole)
    close(carried, state)
    exact = gradients((whole, state), values)
    for name, gradient in gradients(joined, values).items():
        close(gradient, exact[name], f"gradient of {name}")


def test_state_after_documents_is_the_last_ones() -> None:
    values = inputs(batch=1, length=24)
    seq_idx = torch.tensor([[0] * 10 + [1] * 14], dtype=torch.int32)
    last = {name: value[:, 10:] if name in ("x", "dt", "B", "C") else value for name, value in values.items()}
    last["initial_state"] = torch.zeros_like(values["initial_state"])
    close(scan(values, 8, seq_idx)[1], scan(last, 8)[1])


def test_fp32_is_exact_to_rounding() -> None:
    """Forward and backward, although the log-decays of a chunk add up to thousands and only differences count."""
    values = inputs(length=512, dtype=torch.float32)
    exact = {name: value.detach().double().requires_grad_() for name, value in values.items()}
    ours, theirs = scan(values, 256), scan(exact, 256)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, bound=1e-6)
    exact_gradients = gradients(theirs, exact)
    for name, gradient in gradients(ours, values).items():
        close(gradient, exact_gradients[name], f"gradient of {name}", bound=2e-6)


def test_bf16_is_computed_in_fp32() -> None:
    values = {name: value.detach() for name, value in inputs(length=64, dtype=torch.float32).items()}
    values.update({name: values[name].bfloat16() for name in ("x", "B", "C")})
    y, state = scan(values, 16)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    exact = token_recurrence(**{name: value.double() for name, value in values.items()})
    close(state, exact[1], bound=1e-6)
    close(y, exact[0], bound=2**-8)


def test_long_decays_neither_overflow_nor_leave_nan() -> None:
    """Log-decays of thousands within a chunk, as A = -16 and dt of several give them."""
    values = inputs(batch=1, length=32, dtype=torch.float32)
    with torch.no_grad():
        values["dt"].mul_(0).add_(50.0)
    seq_idx = torch.tensor([[0] * 9 + [1] * 23], dtype=torch.int32)
    for index in (None, seq_idx):
        outputs = scan(values, 32, index)
        exact = token_recurrence(**{name: v.detach().double() for name, v in values.items()}, seq_idx=index)
        close(outputs[0], exact[0], bound=1e-5)
        assert all(gradient.isfinite().all() for gradient in gradients(outputs, values).values())


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_steps_are_the_scan(groups: int) -> None:
    values = {name: value.detach() for name, value in inputs(groups=groups).items()}
    whole, final = scan(values, 8)
    state = values["initial_state"].clone()
    for t in range(whole.shape[1]):
        x, dt, B, C = (values[name][:, t] for name in ("x", "dt", "B", "C"))
        close(ssd_step(state, x, dt, values["A"], B, C, values["D"]), whole[:, t])
    close(state, final)
    skipped = ssd_step(state.clone(), x, dt, values["A"], B, C, values["D"])
    close(ssd_step(state, x, dt, values["A"], B, C), skipped - values["D"][:, None] * x)


def conv_inputs(length: int, width: int, bias: bool = True) -> Tensors:
    generator = torch.Generator().manual_seed(length)
    shapes = {"x": (2, length, 6), "weight": (6, 1, width), **({"bias": (6,)} if bias else {})}
    return {
        name: torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("length", "width"), [(11, 4), (2, 4), (1, 4), (9, 2), (9, 1)])
def test_conv_is_torchs(length: int, width: int, bias: bool) -> None:
    values = conv_inputs(length, width, bias)
    ours, exact = causal_conv(**{"bias": None, **values}), conv(**values)
    close(ours, exact)
    theirs = gradients((exact,), values)
    for name, gradient in gradients((ours,), values).items():
        close(gradient, theirs[name], f"gradient of {name}")


@pytest.mark.parametrize("ends", [(3, 5, 11), (1, 2, 3, 4, 11), (10, 11), (11,)])
def test_conv_of_documents_is_that_of_each_alone(ends: tuple[int, ...]) -> None:
    """One index returns, which must not join two documents across a short one."""
    values = conv_inputs(11, 4)
    places = list(itertools.pairwise((0, *ends)))
    seq_idx = torch.cat([torch.full((b - a,), i % 2, dtype=torch.int32) for i, (a, b) in enumerate(places)])
    ours = causal_conv(**values, seq_idx=seq_idx.expand(2, -1))
    exact = torch.cat([conv(values["x"][:, a:b], values["weight"], values["bias"]) for a, b in places], dim=1)
    close(ours, exact)
    theirs = gradients((exact,), values)
    for name, gradient in gradients((ours,), values).items():
        close(gradient, theirs[name], f"gradient of {name}")


@pytest.mark.parametrize("bias", [True, False])
def test_conv_steps_are_the_convolution(bias: bool) -> None:
    values: dict[str, torch.Tensor | None] = {"bias": None}
    values.update({name: value.detach() for name, value in conv_inputs(9, 4, bias).items()})
    x, weight = values["x"], values["weight"]
    assert x is not None
    assert weight is not None
    whole = causal_conv(x, weight, values["bias"])
    window = torch.zeros(2, 3, 6, dtype=torch.float64)
    for t in range(9):
        close(causal_conv_step(window, x[:, t], weight, values["bias"]), whole[:, t])
    assert torch.equal(window, x[:, -3:])
