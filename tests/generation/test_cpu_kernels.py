"""The kernels for CPU against the same mathematics in fp64, within bounds that follow from the roundings they make."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numba import njit

import prism_nemo
from prism_nemo.generation.attention_kernel import attend
from prism_nemo.generation.caches import PackedKeyValues
from prism_nemo.generation.choose import choose
from prism_nemo.generation.cpu_kernels import flat, normed, over_rows, serves, swiglu
from prism_nemo.generation.drawing_kernel import draw
from prism_nemo.generation.requests import SamplingParams
from prism_nemo.generation.simd import exp, load, number, put, store

# Unit roundoff of a type: half the distance from 1 to the next number.
U = 2.0**-24
ROUNDOFF = {torch.float32: U, torch.bfloat16: 2.0**-8}


@njit
def _exponentials(x, out):
    for i in range(0, len(x), 16):
        store(out, i, exp(load(x, i)))


@njit
def _there_and_back(x, half, out):
    for i in range(0, len(x) - 16, 16):
        store(half, i, load(x, i))
        store(out, i, load(half, i))
    for i in range(len(x) - 16, len(x)):
        put(half, i, number(x, i))
        put(out, i, number(half, i))


def exponentials(values: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(-(-len(values) // 16) * 16)
    padded = F.pad(values.float(), (0, len(out) - len(values)))
    _exponentials(padded.numpy(), out.numpy())
    return out[: len(values)]


def test_exponentials_over_the_whole_range() -> None:
    """Three units in the last place: Cephes states 1.7e-7 for its series, which is 2.9 of them."""
    x = torch.cat((torch.linspace(-87, 88, 100_003), torch.linspace(-1e-3, 1e-3, 1001))).float()
    wanted = x.double().exp()
    assert ((exponentials(x).double() - wanted).abs() / wanted).max() < 3 * 2 * U


def test_exponentials_beyond_the_range() -> None:
    nan = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    assert exponentials(torch.tensor([-87.5, -1e9, -torch.inf])).tolist() == [0.0, 0.0, 0.0]
    assert exponentials(torch.tensor([100.0, torch.inf])).isfinite().all()
    assert exponentials(nan).isnan().all()
    assert exponentials(torch.zeros(3)).tolist() == [1.0, 1.0, 1.0]


def test_bf16_is_rounded_as_torch_rounds_it() -> None:
    """Ties to even, subnormal numbers, infinities; what is no number stays so whatever its bits."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 4096, dtype=np.uint64).astype(np.uint32)
    bits[::3] = bits[::3] & 0xFFFF0000 | 0x8000
    bits[:6] = [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7F800000, 0xFF800000, 0x7F7FFFFF]
    bits[-6:] = bits[:6]
    x = torch.from_numpy(bits.view(np.float32))
    half, out = np.zeros(len(x), np.uint16), torch.zeros(len(x))
    _there_and_back(x.numpy(), half, out.numpy())
    wanted = x.bfloat16().float()
    assert torch.equal(out.isnan(), wanted.isnan())
    assert out.isnan().sum() > 10
    assert torch.equal(out[~out.isnan()], wanted[~out.isnan()])


@pytest.mark.parametrize("dtype", ROUNDOFF)
@pytest.mark.parametrize("width", [1, 16, 43, 256])
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3)])
def test_norms(dtype: torch.dtype, width: int, shape: tuple[int, ...]) -> None:
    """Roundings: of the mean of squares width / 2 (under the root), then of division, root, and two products."""
    torch.manual_seed(width)
    x, weight = 5 * torch.randn(*shape, width).to(dtype), torch.randn(width).to(dtype)
    wide = x.double()
    wanted = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    found = normed(x, weight, 1e-5)
    assert found.dtype == dtype
    assert found.shape == x.shape
    assert ((found.double() - wanted).abs() <= ((width / 2 + 6) * U + ROUNDOFF[dtype]) * wanted.abs() * 1.01).all()


@pytest.mark.parametrize("dtype", ROUNDOFF)
@pytest.mark.parametrize("width", [1, 16, 43, 768])
def test_gates(dtype: torch.dtype, width: int) -> None:
    """Roundings of exponential, sum, quotient and product; the gate and the result to the type."""
    torch.manual_seed(width)
    hidden = 10 * torch.randn(5, 2 * width).to(dtype)
    hidden[0] = torch.tensor([-200.0, 200.0]).repeat(width).to(dtype)
    gate, up = hidden.double().chunk(2, dim=-1)
    wanted = F.silu(gate) * up
    found = swiglu(hidden)
    bound = (12 * U + 2 * ROUNDOFF[dtype]) * wanted.abs() * 1.01 + 1e-30
    assert found.dtype == dtype
    assert found.shape == (5, width)
    assert ((found.double() - wanted).abs() <= bound).all()


def attention_case(
    dtype: torch.dtype, groups: int, per_group: int, d: int, lengths: list[int]
) -> tuple[PackedKeyValues, torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """A cache whose rows hold prompts of these lengths, one more token for each, and the keys and values in fp64."""
    torch.manual_seed(d)
    cache = PackedKeyValues((len(lengths), groups, max(lengths) + 1, d), torch.zeros(1, dtype=dtype))
    # What was there before must not be seen.
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    keys, values = [], []
    for row, length in enumerate(lengths):
        k, v = (torch.randn(1, groups, length, d).to(dtype) for _ in range(2))
        if length:
            cache.fill((k, v), torch.zeros(1, dtype=torch.long), row)
        keys.append(k[0].double())
        values.append(v[0].double())
    return cache, torch.randn(len(lengths), groups, per_group + 2, d).to(dtype), keys, values


LENGTHS = [0, 1, 14, 15, 16, 17, 31, 32, 47, 90]


@pytest.mark.parametrize("dtype", ROUNDOFF)
@pytest.mark.parametrize(("groups", "per_group", "d"), [(2, 2, 32), (1, 1, 16), (3, 5, 12), (1, 4, 128), (2, 3, 72)])
@pytest.mark.parametrize("window", [None, 1, 5, 16, 40])
@pytest.mark.parametrize("rotated", [True, False])
def test_attention(dtype: torch.dtype, groups: int, per_group: int, d: int, window: int | None, rotated: bool) -> None:
    """Rows of any length, empty ones included; odd groups and head sizes.

    A score is a sum of d products, so its error is at most (d + 4) u times the sum of their magnitudes (four roundings
    for rotation and scale); a weight has twice that as relative error, and a sum of n values another (n + 8) u. A
    rotated query or key that rounds to the other side in bf16 moves by 2 units of roundoff; a quarter of them does so
    at most.
    """
    cache, qkv, keys, values = attention_case(dtype, groups, per_group, d, LENGTHS)
    angles = None
    if rotated:
        turn = torch.outer(torch.arange(100.0), 0.5 ** torch.arange(d // 2))[:, None, None]
        angles = turn.cos().to(dtype), turn.sin().to(dtype)
    positions = torch.tensor(LENGTHS)
    found = attend(qkv, angles, positions, cache.keys, cache.values, 0.3 * d**-0.5, window).double()
    assert found.shape == (len(LENGTHS), groups * per_group * d)
    for row, length in enumerate(LENGTHS):
        q, k, v = qkv[row, :, :-2].double(), qkv[row, :, -2:-1].double(), qkv[row, :, -1:].double()
        if angles is not None:
            cos, sin = (angle[length, 0].double() for angle in angles)

            def turned(x: torch.Tensor, cos: torch.Tensor = cos, sin: torch.Tensor = sin) -> torch.Tensor:
                a, b = x.chunk(2, dim=-1)
                return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

            q, k = turned(q).to(dtype).double(), turned(k).to(dtype).double()
        k, v = torch.cat((keys[row], k), dim=1), torch.cat((values[row], v), dim=1)
        if window is not None:
            k, v = k[:, -window:], v[:, -window:]
        scores = 0.3 * d**-0.5 * q @ k.mT
        size = 0.3 * d**-0.5 * q.abs() @ k.abs().mT
        weights = scores.softmax(-1)
        wanted = (weights @ v).flatten()
        off = 2 * (
            (d + 4) * U * size.max() + (ROUNDOFF[dtype] * 0.5 * size.max() if rotated and dtype != torch.float32 else 0)
        )
        bound = (off + (v.shape[1] + 8) * U + ROUNDOFF[dtype]) * (weights @ v.abs()).flatten() * 1.01
        assert ((found[row] - wanted).abs() <= bound).all(), length


def test_attention_over_several_steps_remembers_what_it_was_given() -> None:
    """Token by token from an empty row, over two borders of blocks, after another response in the same row."""
    d, groups, count = 20, 2, 37
    cache = PackedKeyValues((3, groups, 40, d), torch.zeros(1))
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    for seed in (0, 1):
        torch.manual_seed(seed)
        steps = torch.randn(count, 3, groups, 4, d)
        for at, qkv in enumerate(steps):
            found = attend(qkv, None, torch.full((3,), at), cache.keys, cache.values, None, None)
        q, k, v = steps[-1, :, :, :2], steps[:, :, :, 2].movedim(0, 2), steps[:, :, :, 3].movedim(0, 2)
        torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v).flatten(1), atol=2e-6, rtol=1e-5)


def test_a_row_that_is_no_number_does_not_touch_the_others() -> None:
    cache, qkv, _, _ = attention_case(torch.float32, 2, 2, 32, [20, 20, 20])
    wanted = attend(qkv, None, torch.full((3,), 20), cache.keys, cache.values, None, None)
    cache.keys[1, 0, 0, 5] = torch.nan
    found = attend(qkv, None, torch.full((3,), 20), cache.keys, cache.values, None, None)
    assert torch.equal(found[[0, 2]], wanted[[0, 2]])
    assert found[1].isnan().any()


def test_rows_of_a_packed_cache_move_and_grow() -> None:
    cache, qkv, _, _ = attention_case(torch.float32, 2, 2, 12, [20, 33, 7])
    wanted = attend(qkv, None, torch.tensor([20, 33, 7]), cache.keys, cache.values, None, None)
    cache.grow(70)
    cache.move(torch.tensor([2, 1]), torch.tensor([1, 2]), 33)
    order = [0, 2, 1]
    found = attend(qkv[order], None, torch.tensor([20, 7, 33]), cache.keys, cache.values, None, None)
    assert torch.equal(found, wanted[order])
    assert cache.nbytes() == 2 * 3 * 5 * 2 * 16 * 16 * 4


@pytest.mark.parametrize("vocab", [1, 5, 16, 128, 149, 300, 8192])
@pytest.mark.parametrize("heat", [0.0, 1.0, 0.7, 3.0])
def test_draws(vocab: int, heat: float) -> None:
    """Where the cumulative distribution in fp64 passes the number, unless that lies on a border."""
    torch.manual_seed(vocab)
    rows = 200
    logits = (4 * torch.randn(rows, vocab + 3))[:, :vocab]  # as a vocabulary with padding
    uniforms = torch.rand(rows, dtype=torch.float64)
    tokens, logprobs = draw(logits, torch.full((rows,), heat), uniforms)
    scores = logits.double().log_softmax(-1)
    torch.testing.assert_close(logprobs, scores.gather(1, tokens[:, None])[:, 0], atol=3e-6, rtol=0)
    if heat == 0.0:
        assert torch.equal(tokens, logits.argmax(-1))
        return
    sums = (logits.double() / heat).softmax(-1).cumsum(-1)
    sums /= sums[:, -1:]
    before = F.pad(sums, (1, 0)).gather(1, tokens[:, None])[:, 0]
    after = sums.gather(1, tokens[:, None])[:, 0]
    assert ((before - 1e-6 <= uniforms) & (uniforms < after + 1e-6)).all()
    if vocab > 100 and heat == 1.0:
        assert len(tokens.unique()) > 30


def test_the_first_of_equal_logits_is_drawn() -> None:
    logits = torch.randn(60, 300, generator=torch.Generator().manual_seed(0)).round()
    tokens, _ = draw(logits, torch.zeros(60), torch.zeros(60, dtype=torch.float64))
    assert torch.equal(tokens, torch.stack([(row == row.max()).nonzero()[0, 0] for row in logits]))


@pytest.mark.parametrize("heat", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 130, 298])
def test_logits_that_are_no_numbers_give_none(heat: float, bad: float, place: int) -> None:
    """And leave the other rows as they are."""
    torch.manual_seed(0)
    logits, heats, uniforms = torch.randn(3, 299), torch.full((3,), heat), torch.rand(3, dtype=torch.float64)
    wanted = draw(logits, heats, uniforms)
    logits[1, place] = bad
    tokens, logprobs = draw(logits, heats, uniforms)
    assert not logprobs[1] <= 0
    assert 0 <= tokens[1] < 299
    assert torch.equal(tokens[[0, 2]], wanted[0][[0, 2]])
    assert torch.equal(logprobs[[0, 2]], wanted[1][[0, 2]])


def test_choices_do_not_depend_on_neighbours_that_are_cut() -> None:
    """Bit for bit: rows with top-k or a nucleus are drawn by other code."""
    torch.manual_seed(0)
    logits, uniforms = torch.randn(20, 500), torch.rand(20).tolist()
    plain = choose(logits, [SamplingParams(1)] * 20, uniforms)
    mixed = choose(logits, [SamplingParams(1, top_k=3 if i % 2 else 0) for i in range(20)], uniforms)
    for own, wanted in zip(mixed, plain, strict=True):
        assert torch.equal(own[::2], wanted[::2])
    assert not torch.equal(mixed[0], plain[0])


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor the order of rows; each row is done once."""
    monkeypatch.setattr("prism_nemo.generation.cpu_kernels._PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    torch.manual_seed(0)
    x, logits = torch.randn(13, 40), torch.randn(13, 300)
    heat, uniforms = torch.ones(13), torch.rand(13, dtype=torch.float64)
    one = normed(x, torch.ones(40), 1e-5), *draw(logits, heat, uniforms)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    done: list[tuple[int, int]] = []
    over_rows(lambda first, end: done.append((first, end)), 13, 40)
    assert sorted(done) == [(0, 3), (3, 6), (6, 9), (9, 13)]
    for a, b in zip((normed(x, torch.ones(40), 1e-5), *draw(logits, heat, uniforms)), one, strict=True):
        assert torch.equal(a, b)


def test_a_failure_in_another_thread_is_one_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)

    def fails(first: int, end: int) -> None:
        if first:
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        over_rows(fails, 8, 2**20)


def test_what_the_kernels_serve() -> None:
    assert serves(torch.zeros(1))
    assert serves(torch.zeros(1).bfloat16())
    assert not serves(torch.zeros(1).double())
    assert not serves(torch.zeros(1).half())
    assert not serves(torch.zeros(1, device="meta"))
    x = torch.randn(3, 4)
    assert np.shares_memory(flat(x), x.numpy())


PROGRAM = """
import sys, torch
from prism_nemo.generation.cpu_kernels import normed
dtype = getattr(torch, sys.argv[1])
print(normed(torch.ones(2, 20, dtype=dtype), torch.ones(20, dtype=dtype), 0.0).sum().item())
"""


def test_processes_may_compile_at_the_same_time(tmp_path: Path) -> None:
    """Of one type and of another, with an empty place for compiled code; then all of it is there, for each its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(prism_nemo.__file__).parent.parent),
        "OMP_NUM_THREADS": "1",
        "NUMBA_CACHE_DIR": str(tmp_path),
    }

    def run_all(dtypes: list[str]) -> None:
        running = [
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, dtype], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            for dtype in dtypes
        ]
        for process in running:
            out, err = process.communicate(timeout=180)
            assert (process.returncode, out.strip()) == (0, b"40.0"), err.decode()

    run_all(["float32", "bfloat16", "bfloat16"])
    kept = sorted(path.name for path in tmp_path.rglob("*.nb?"))
    assert len([name for name in kept if "_norm" in name and name.endswith("nbc")]) == 2
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb?")}
    run_all(["float32", "bfloat16"])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb?")} == before
