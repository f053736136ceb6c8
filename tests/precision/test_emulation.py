"""Emulated linear layers against products of torch's float8 casts, written out; which layers are emulated; scales of
several ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from precision_workers import RECIPES, TOKENS, build, each_way, emulated

from prism_nemo.config import ParallelConfig
from prism_nemo.errors import InputError
from prism_nemo.precision.formats import E4M3
from prism_nemo.precision.linear import EmulatedColumnLinear, EmulatedRowLinear, Quantiser, _Product
from prism_nemo.runtime import stop
from prism_nemo.runtime.launch import launch


@pytest.fixture(autouse=True)
def stopped() -> Iterator[None]:
    yield
    if torch.distributed.is_initialized():
        stop()


def cast(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor) -> torch.Tensor:
    """Read back what torch's cast makes of x * scale, in fp64."""
    largest = torch.finfo(dtype).max
    return (x * scale).clamp(-largest, largest).to(dtype).double() / scale.double()


def reference(x: torch.Tensor, role: str, dim: int, recipe: str, form: str) -> torch.Tensor:
    """An operand of the product that sums over `dim`, in fp64; sizes are multiples of 128."""
    dtype = torch.float8_e5m2 if role == "gradient" and form == "hybrid" else torch.float8_e4m3fn
    largest = torch.tensor(torch.finfo(dtype).max)
    if recipe == "delayed":
        return cast(x, dtype, torch.tensor(1.0))  # the first pass
    if recipe == "tensorwise":
        return cast(x, dtype, largest / x.abs().max())
    size = 128 if recipe == "blockwise" else 32
    shape = [-1, 1, x.shape[1], 1] if dim == 0 else [x.shape[0], 1, -1, 1]
    shape[2 * dim], shape[2 * dim + 1] = x.shape[dim] // size, size
    if recipe == "blockwise" and role == "weight":
        shape = [x.shape[0] // 128, 128, x.shape[1] // 128, 128]
    blocks = x.reshape(shape)
    amax = blocks.abs().amax((1, 3), keepdim=True)
    # Rounding the scale down and its inverse up to a power of two are the same thing.
    return cast(blocks, dtype, torch.exp2(torch.floor(torch.log2(largest.double() / amax.double()))).float()).view(
        x.shape
    )


@pytest.mark.parametrize("form", ["hybrid", "e4m3"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_all_three_products_against_torchs_casts(recipe: str, form: str) -> None:
    """Forward, input gradient and weight gradient, each from operands quantised along its own summed dimension.

    The emulation sums n terms in fp32, the reference in fp64: an error of at most n 2^-24 sum |a b|, and the fp32
    inverse of the scale adds 2^-22 of it. Unquantised operands would be off by up to 2^-4 of it."""
    layer = build("llama", emulated(recipe, form)).decoder.layers[1].mlp.linear_fc1
    assert type(layer) is EmulatedColumnLinear
    g = torch.Generator().manual_seed(1)
    x = (torch.randn(128, 2, 128, generator=g) * torch.exp2(torch.arange(128) % 9 - 4)).requires_grad_()
    weight = torch.nn.Parameter(torch.randn(256, 128, generator=g) * torch.exp2(torch.arange(256)[:, None] % 7 - 3))
    grad = torch.randn(128, 2, 256, generator=g) * torch.exp2(torch.arange(256) % 5 - 2) * 0.01
    out = layer._forward_impl(x, weight)
    out.backward(grad)
    flat, flat_grad, w = x.detach().view(-1, 128), grad.view(-1, 256), weight.detach()

    def operand(t: torch.Tensor, role: str, dim: int) -> torch.Tensor:
        return reference(t, role, dim, recipe, form)

    assert x.grad is not None
    assert weight.grad is not None
    for found, a, b, plain in (
        (out.view(-1, 256), operand(flat, "input", 1), operand(w, "weight", 1).t(), flat @ w.t()),
        (x.grad.view(-1, 128), operand(flat_grad, "gradient", 1), operand(w, "weight", 0), flat_grad @ w),
        (weight.grad, operand(flat_grad, "gradient", 0).t(), operand(flat, "input", 0), flat_grad.t() @ flat),
    ):
        size = a.abs() @ b.abs()
        limit = (a.shape[1] * 2.0**-24 + 2.0**-22) * size
        assert bool(((found.double() - a @ b).abs() <= limit).all())
        assert bool(((found - plain).abs().double() > limit).float().mean() > 0.5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_are_quantised_too(recipe: str) -> None:
    """A gradient that E5M2 has no number for comes back changed, although weights and inputs are representable."""
    layer = build("llama", emulated(recipe)).decoder.layers[0].mlp.linear_fc2
    assert type(layer) is EmulatedRowLinear
    x = torch.eye(128).unsqueeze(1).requires_grad_()
    weight = torch.nn.Parameter(torch.eye(128))
    grad = torch.zeros(128, 1, 128)
    grad[:, 0] = torch.diag(torch.full((128,), 1.125))  # between E5M2's 1 and 1.25, a tie: to even
    grad[5, 0, 5] = 1.75  # largest of its row and column, so that power-of-two scales do not shift the tie
    layer._forward_impl(x, weight).backward(grad)
    assert x.grad is not None
    found = float(x.grad[0, 0, 0])
    if recipe == "tensorwise":  # scale 57344 / 1.75 = 2^15: as without a scale
        assert found == 1.0
    assert found != 1.125
    assert abs(found / 1.125 - 1) <= 2.0**-3


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_forward_equals_torchs_scaled_product(device: str) -> None:
    """torch._scaled_mm takes float8 operands and per-tensor scales, on CPU as on GPUs.

    On a GPU its sums have fewer bits than fp32: 2^-10 of the sum of magnitudes is allowed."""
    g = torch.Generator().manual_seed(2)
    x, w = (torch.randn(n, 64, generator=g).to(device) for n in (32, 48))
    found = _Product.apply(x, w, Quantiser(emulated("tensorwise"), x.device), False)
    sx, sw = (E4M3.largest / t.abs().max() for t in (x, w))
    expected = torch._scaled_mm(
        (x * sx).to(E4M3.dtype),
        (w * sw).to(E4M3.dtype).t(),
        scale_a=1 / sx,
        scale_b=1 / sw,
        out_dtype=torch.float32,
    )
    tolerance = 64 * 2.0**-22 if device == "cpu" else 2.0**-10
    assert bool(((found - expected).abs() <= tolerance * (x.abs() @ w.abs().t())).all())


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_against_transformer_engine(recipe: str) -> None:
    """A Transformer Engine layer under the recipe, forward and both gradients, two passes (delayed needs a second).

    The tensor cores sum with fewer bits than fp32, so 2^-10 of the sum of magnitudes is allowed."""
    te = pytest.importorskip("transformer_engine.pytorch")
    recipes = pytest.importorskip("transformer_engine.common.recipe")
    from prism_nemo.precision.check import recipes_of

    if recipe not in recipes_of(torch.cuda.get_device_capability()):
        pytest.skip(f"this GPU has no {recipe}")
    form = recipes.Format.HYBRID
    made = {
        "delayed": lambda: recipes.DelayedScaling(fp8_format=form, amax_history_len=1, amax_compute_algo="most_recent"),
        "tensorwise": lambda: recipes.Float8CurrentScaling(fp8_format=form),
        "blockwise": lambda: recipes.Float8BlockScaling(fp8_format=form),
        "mxfp8": lambda: recipes.MXFP8BlockScaling(fp8_format=form),
    }[recipe]()
    theirs = te.Linear(256, 384, bias=False, params_dtype=torch.bfloat16, device="cuda")
    quantise = Quantiser(emulated(recipe), torch.device("cuda"))
    for step in range(2):
        g = torch.Generator("cuda").manual_seed(step)
        x = torch.randn(512, 256, generator=g, device="cuda", dtype=torch.bfloat16).requires_grad_()
        grad = torch.randn(512, 384, generator=g, device="cuda", dtype=torch.bfloat16)
        theirs.weight.grad = None
        with te.fp8_autocast(enabled=True, fp8_recipe=made):
            out = theirs(x)
        out.backward(grad)
        mine_x, mine_w = x.detach().clone().requires_grad_(), theirs.weight.detach().clone().requires_grad_()
        mine = _Product.apply(mine_x, mine_w, quantise, True)
        mine.backward(grad)
        w = mine_w.detach().float().abs()
        for a, b, size in (
            (out, mine, x.detach().float().abs() @ w.t()),
            (x.grad, mine_x.grad, grad.float().abs() @ w),
            (theirs.weight.grad, mine_w.grad, grad.float().abs().t() @ x.detach().float().abs()),
        ):
            rounding = 2.0**-8 * b.detach().float().abs()
            assert bool(((a.detach().float() - b.detach().float()).abs() <= 2.0**-10 * size + rounding).all())


def names_of(model: torch.nn.Module) -> set[str]:
    return {
        name for name, module in model.named_modules() if isinstance(module, (EmulatedColumnLinear, EmulatedRowLinear))
    }


def test_which_layers_are_emulated() -> None:
    """Attention's and the MLP's projections, nothing else: not the embedding, not the output layer, not norms."""
    names = names_of(build("llama", emulated()))
    kinds = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    assert names == {f"decoder.layers.{i}.{kind}" for i in range(4) for kind in kinds}


def test_which_layers_of_a_hybrid_are_emulated() -> None:
    """The mixers' projections too; first and last layers stay as asked."""
    everything = names_of(build("nemotron-h", emulated()))
    assert {name.rpartition(".")[2] for name in everything} == {
        "in_proj", "out_proj", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2",
    }  # fmt: skip
    stop()
    some = emulated(first_last_layers_bf16=True, num_layers_at_start_in_bf16=2, num_layers_at_end_in_bf16=3)
    kept = names_of(build("nemotron-h", some))
    assert kept == {name for name in everything if 2 <= int(name.split(".")[2]) < 5}


@pytest.mark.parametrize("case", ["llama", "granite-hybrid", "granite-hybrid-one-group"])
def test_emulation_is_active(case: str) -> None:
    """Loss and gradients move by about what FP8 rounding gives, in every kind of layer, replicated B and C included."""
    results = []
    for precision in (emulated(), None):
        model = build(case, precision or emulated(first_last_layers_bf16=True, num_layers_at_start_in_bf16=4))
        tokens = torch.arange(TOKENS)[None]
        losses = model(tokens, tokens, None, labels=tokens + 1)
        losses.sum().backward()
        results.append(
            (losses.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        )
        stop()
    (loss, grads), (plain, plain_grads) = results
    assert 1e-6 < float((loss - plain).abs().mean() / plain.mean()) < 0.05
    for name, grad in grads.items():
        assert not torch.equal(grad, plain_grads[name]), name


def test_a_validation_does_not_move_delayed_scales() -> None:
    model = build("llama", emulated("delayed"))
    tokens = torch.arange(TOKENS)[None]
    scales = [s for m in model.modules() if hasattr(m, "quantiser") for s in m.quantiser.delayed.values()]
    assert len(scales) == 3 * 16
    with torch.no_grad():
        model(tokens, tokens, None, labels=tokens)
    assert all(float(s.scale) == 1.0 for s in scales)
    model(tokens, tokens, None, labels=tokens).sum().backward()
    assert all(float(s.scale) != 1.0 for s in scales)


def test_recomputation_gives_the_same_gradients_or_is_refused() -> None:
    """Recipes without memory may be recomputed; a delayed scale has moved by then."""
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    with pytest.raises(InputError, match="delayed scales move between a forward pass and its recomputation"):
        build("llama", emulated("delayed"), **recompute)
    stop()
    found = []
    for overrides in ({}, recompute):
        model = build("llama", emulated("blockwise"), **overrides).train()
        tokens = torch.arange(TOKENS)[None]
        model(tokens, tokens, None, labels=tokens + 1).sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
        stop()
    assert all(torch.equal(found[0][name], grad) for name, grad in found[1].items())


def test_sequence_parallelism_keeps_the_scales() -> None:
    """The scales are those of the whole sequence: loss and gradients are what TP2 without it gives.

    Both add the same two partial sums. A scale from a rank's own half would move values by up to 2^-4."""
    layouts = [ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=sp) for sp in (False, True)]
    ways = [
        ("llama", emulated(recipe), layout) for recipe in ("delayed", "tensorwise", "blockwise") for layout in layouts
    ]
    results = launch(each_way, ways, processes=2)
    for plain, sequence in zip(results[::2], results[1::2], strict=True):
        for a, b in zip(plain, sequence, strict=True):
            assert abs(a["loss"] - b["loss"]) <= 2.0**-20 * a["loss"]
            for name, grad in a["grads"].items():
                assert float((grad - b["grads"][name]).norm() / grad.norm()) < 1e-3, name


def test_delayed_scales_are_one_over_all_ranks() -> None:
    """The largest amax over data- and tensor-parallel ranks decides, and each rank's own differs from it somewhere."""
    dp, tp = ParallelConfig(data_parallel_size=2), ParallelConfig(tensor_model_parallel_size=2)
    delayed = emulated("delayed")
    # The hybrid has its B and C replicated, by a product with another weight than in_proj's.
    ways = [("llama", delayed, dp), ("llama", delayed, tp), ("granite-hybrid-one-group", delayed, tp)]
    for first, second in launch(each_way, ways, processes=2):
        assert len(first["amax"]) == len(second["amax"]) == 3 * len(first["scales"])
        assert first["amax"] != second["amax"]
        histories = []
        for name, roles in first["scales"].items():
            for role, state in roles.items():
                other = second["scales"][name][role]
                assert torch.equal(state["scale"], other["scale"])
                assert torch.equal(state["history"], other["history"])
                histories.append(float(state["history"][0]))
        assert sorted(histories) == sorted(map(max, first["amax"], second["amax"]))


def test_megatrons_own_fp8_stays_off_under_emulation() -> None:
    """Otherwise it would be on as soon as Transformer Engine is installed, on top of the emulation."""
    model = build("llama", emulated())
    assert model.config.fp8 is None
