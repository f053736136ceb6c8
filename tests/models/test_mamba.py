"""The Mamba mixer and the hybrid stack: by definition, in every layout, through checkpoints."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import mamba_reference
import mamba_workers as workers
import pytest
import torch
from mamba_reference import Sizes
from transformers import LlamaConfig

from prism_nemo.config import ParallelConfig
from prism_nemo.errors import InputError
from prism_nemo.models.layers.mamba_layout import MambaLayout
from prism_nemo.runtime.launch import launch

ONE, TP2, TP2_SP = ParallelConfig(), ParallelConfig(2), ParallelConfig(2, sequence_parallel=True)
CUT, REPLICATED = Sizes(groups=2), Sizes(groups=1)
LENGTH = 14  # three chunks of four and a rest


def batch(rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and the weights of the loss, [l, b, hidden]."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, LENGTH, rows, Sizes().hidden, dtype=torch.float64, generator=generator)
    return hidden, weight


def close(ours: torch.Tensor, exact: torch.Tensor, what: str, bound: float = 1e-11) -> None:
    error = (ours.double() - exact.double()).abs().max().item()
    assert error <= bound * max(1.0, exact.abs().max().item()), f"{what} is off by {error}"


@functools.cache
def run_mixer(sizes: Sizes, tp: int, sp: bool = False, ends: tuple[int, ...] | None = None) -> workers.MixerRun:
    """One pass over `batch`; packed documents, if `ends` has some, are one row."""
    args = (sizes, ParallelConfig(tp, sequence_parallel=sp), *batch(1 if ends else 2), ends)
    return launch(workers.run_mixer, *args, processes=tp)


def equal_to_definition(sizes: Sizes, parallel: ParallelConfig, ends: tuple[int, ...] | None = None) -> None:
    """Outputs, every gradient and the gradient norm of one pass."""
    run = run_mixer(sizes, parallel.tensor_model_parallel_size, parallel.sequence_parallel, ends)
    hidden, weight = batch(1 if ends else 2)
    parameters = mamba_reference.whole(run.parameters, sizes)
    leaves = {name: p.double().requires_grad_() for name, p in parameters.items()}
    hidden.requires_grad_()
    exact = mamba_reference.mixer(leaves, hidden, sizes, ends)
    (exact * weight).sum().backward()
    close(run.output, exact, "output")
    close(run.hidden_gradient, hidden.grad, "gradient of the input")
    gradients = mamba_reference.whole(run.gradients, sizes)
    assert gradients.keys() == leaves.keys()
    for name, leaf in leaves.items():
        fp32 = name in ("A_log", "D")
        close(gradients[name], leaf.grad, f"gradient of {name}", 1e-6 if fp32 else 1e-11)
    norm = torch.cat([leaf.grad.flatten() for leaf in leaves.values()]).norm().item()
    assert run.gradient_norm == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize(
    ("sizes", "parallel"),
    [
        (CUT, ONE),
        (CUT, TP2),
        (CUT, TP2_SP),
        (REPLICATED, ONE),
        (REPLICATED, TP2),
        (REPLICATED, TP2_SP),
        (CUT, ParallelConfig(4)),  # each group on two of the four ranks
        (dataclasses.replace(REPLICATED, conv_bias=False, dt_limit=(0.2, 1.0)), TP2),
        (dataclasses.replace(CUT, conv_bias=False, dt_limit=(0.2, 1.0)), ONE),
    ],
    ids=lambda value: value.describe() if isinstance(value, ParallelConfig) else f"{value.groups} groups",
)
def test_mixer_is_its_definition(sizes: Sizes, parallel: ParallelConfig) -> None:
    equal_to_definition(sizes, parallel)


@pytest.mark.parametrize("sizes", [CUT, REPLICATED], ids=["cut", "replicated"])
@pytest.mark.parametrize("parallel", [ONE, TP2_SP], ids=["one process", "TP 2 with SP"])
def test_packed_documents_are_each_alone(sizes: Sizes, parallel: ParallelConfig) -> None:
    equal_to_definition(sizes, parallel, ends=(3, 4, 9, LENGTH))


@pytest.mark.parametrize("sizes", [CUT, REPLICATED], ids=["cut", "replicated"])
def test_initial_values_do_not_depend_on_the_layout(sizes: Sizes) -> None:
    one, two = (mamba_reference.whole(run_mixer(sizes, tp).parameters, sizes) for tp in (1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert one["A_log"].exp().min() >= 1.0
    assert one["A_log"].exp().max() <= 16.0
    dt = torch.nn.functional.softplus(one["dt_bias"])
    assert dt.min() >= 0.1 - 1e-6
    assert dt.max() <= 2.0 + 1e-6
    # conv1d within 4^-1/2 and the projection with the config's standard deviation, in all of their parts.
    assert 0.4 < one["conv1d.weight"].abs().max() <= 0.5
    for part in one["in_proj.weight"].split(list(sizes.rows.values())):
        assert 0.3 < part.std() < 0.7


@pytest.mark.parametrize(
    ("heads", "groups", "tp", "message"),
    [
        (12, 4, 3, r"12 heads and 4 groups; 1, 2, 4, 12 would"),
        (8, 2, 3, r"8 heads and 2 groups; 1, 2, 4, 8 would"),
        (8, 1, 16, r"1, 2, 4, 8 would"),
        (6, 4, 1, r"6 heads cannot be shared out among 4 groups"),
    ],
)
def test_layouts_that_do_not_fit_name_those_that_do(heads: int, groups: int, tp: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        MambaLayout(heads, 4, groups, 4, tp, 0)


@pytest.mark.parametrize("sizes", [CUT, REPLICATED], ids=["cut", "replicated"])
@pytest.mark.parametrize(("saved", "loaded"), [(ONE, TP2), (TP2, ONE), (TP2, ParallelConfig(4))])
def test_checkpoint_of_a_mixer_loads_at_another_size(
    sizes: Sizes, saved: ParallelConfig, loaded: ParallelConfig, tmp_path: Path
) -> None:
    written = launch(workers.save_mixer, sizes, saved, str(tmp_path), processes=saved.world_size)
    read = launch(workers.load_mixer, sizes, loaded, str(tmp_path), processes=loaded.world_size)
    ours, theirs = mamba_reference.whole(read, sizes), mamba_reference.whole(written, sizes)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_checkpoint_has_megatrons_keys_in_every_layout() -> None:
    """Those of MambaMixer.sharded_state_dict: whatever else reads such a checkpoint finds them."""
    inner, bc, heads, hidden = 32, 6, 8, 12
    expected = {
        **{f"in_proj.weight.{part}": (rows, hidden) for part, rows in zip("zxBC", (inner, inner, bc, bc), strict=True)},
        "in_proj.weight.dt": (heads, hidden),
        **{f"conv1d.weight.{part}": (rows, 1, 4) for part, rows in zip("xBC", (inner, bc, bc), strict=True)},
        **{f"conv1d.bias.{part}": (rows,) for part, rows in zip("xBC", (inner, bc, bc), strict=True)},
        **dict.fromkeys(("A_log", "D", "dt_bias"), (heads,)),
        "norm.weight": (inner,),
        "out_proj.weight": (hidden, inner),
    }
    for parallel in (ONE, TP2):
        found = launch(workers.checkpoint_keys, REPLICATED, parallel, processes=parallel.world_size)
        assert {name.removeprefix("mixer."): tuple(shape) for name, shape in found.items()} == expected


def test_bf16_mixer_computes_in_fp32() -> None:
    """Its parameters are rounded, A_log from fp32; what lies between them is not: decays, state, norm."""
    hidden = batch()[0].bfloat16()
    before, output, parameters, gradients, wide = launch(workers.cast_mixer, CUT, hidden)
    assert before == torch.float32
    assert wide == {"A", "D"}
    assert {t.dtype for t in (output, *parameters.values(), *gradients.values())} == {torch.bfloat16}
    leaves = {name: p.double().requires_grad_() for name, p in parameters.items()}
    exact = mamba_reference.mixer(leaves, hidden.double(), CUT)
    exact.sum().backward()
    close(output, exact, "output", 0.02)
    for name, leaf in leaves.items():
        close(gradients[name], leaf.grad, f"gradient of {name}", 0.05)


PATTERN = "M-*MM-"
HF_CONFIG: dict[str, Any] = LlamaConfig(architectures=["LlamaForCausalLM"]).to_dict()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """By (sizes, layout, type): a checkpoint of a model after two updates, and what its next three updates gave."""
    folder = tmp_path_factory.mktemp("hybrid")
    made: dict[Any, Any] = {}
    for number, (sizes, parallel, dtype) in enumerate(
        [
            (CUT, ONE, torch.float32),
            (REPLICATED, ONE, torch.float32),
            (REPLICATED, TP2_SP, torch.float32),
            (REPLICATED, TP2, torch.bfloat16),
        ]
    ):
        path = str(folder / str(number))
        args = (sizes, parallel, PATTERN, path, dtype, HF_CONFIG)
        made[sizes.groups, parallel.tensor_model_parallel_size, dtype] = (
            path,
            launch(workers.train_and_save, *args, processes=parallel.world_size),
        )
    return made


@pytest.mark.parametrize(
    ("sizes", "saved", "loaded"),
    [
        (CUT, 1, TP2),
        (CUT, 1, TP2_SP),
        (REPLICATED, 1, TP2),
        (REPLICATED, 1, TP2_SP),
        (REPLICATED, 1, ParallelConfig(1, 2)),
        (REPLICATED, 1, ParallelConfig(2, data_parallel_size=2)),
        (REPLICATED, 2, ONE),
        (REPLICATED, 2, TP2),
    ],
    ids=lambda value: f"{value.groups} groups" if isinstance(value, Sizes) else str(value),
)
def test_training_goes_on_in_another_layout(
    trained: dict[Any, Any], sizes: Sizes, saved: int, loaded: ParallelConfig
) -> None:
    """Losses and gradient norms of three more updates: weights, moments and reductions are all in them."""
    path, expected = trained[sizes.groups, saved, torch.float32]
    args = (sizes, loaded, PATTERN, path, torch.float32)
    found = launch(workers.load_and_train, *args, processes=loaded.world_size)
    for (loss, norm), (expected_loss, expected_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)
    assert expected[0][0] != pytest.approx(expected[2][0], rel=1e-2)


def test_training_in_bf16_goes_on_in_another_layout(trained: dict[Any, Any]) -> None:
    path, expected = trained[1, 2, torch.bfloat16]
    found = launch(workers.load_and_train, REPLICATED, ONE, PATTERN, path, torch.bfloat16)
    for (loss, norm), (expected_loss, expected_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-2)
        assert norm == pytest.approx(expected_norm, rel=5e-2)


def test_recomputation_changes_memory_and_nothing_else(trained: dict[Any, Any]) -> None:
    """Against the same step without it; the fractions are of the bytes that the forward pass keeps."""
    path, _ = trained[1, 1, torch.float32]
    names = ("recompute_granularity", "recompute_method", "recompute_num_layers")
    cases = [("full", "uniform", 1, 0.4), ("full", "uniform", 4, 0.3), ("full", "block", 3, 0.7)]
    settings = [{}, *(dict(zip(names, case[:3], strict=True)) for case in cases)]
    plain, *others = launch(workers.first_steps, REPLICATED, TP2, PATTERN, path, settings, processes=2)
    for (*_, fraction), other in zip(cases, others, strict=True):
        assert other.loss == plain.loss
        assert all(torch.equal(other.gradients[name], gradient) for name, gradient in plain.gradients.items())
        assert other.kept < fraction * plain.kept


def test_recomputation_that_would_be_ignored_is_refused() -> None:
    with pytest.raises(InputError, match="distribute_saved_activations"):
        launch(workers.build_hybrid, REPLICATED, PATTERN, {"distribute_saved_activations": True})
