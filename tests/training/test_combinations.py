"""Recomputation, precision and overlap together with context parallelism and virtual pipelines.

Each is compared with the same model in one process in the same precision. Tolerances:

- fp32: those of test_parity.py, where the same sums are taken in another order.
- bf16: a virtual pipeline runs the same kernels on the same numbers: fp32's tolerance. Context parallelism rounds a
  weight's gradient once for each rank's share of the tokens; numbers differ by one rounding (2^-9 of the value) here
  and there, and the loss, a mean, by less than that.
- FP8, virtual pipeline: again the same numbers, rounded alike.
- FP8, context parallelism: the scale belongs to what a rank holds. ``delayed`` takes the largest amax over the ranks,
  mxfp8's blocks of 32 tokens do not cross the cut (micro-batches of 2 rows of 32 tokens, 2 ranks), and with blockwise's
  powers of two another scale rounds alike unless numbers underflow: the operands are those of one process (seen: 4e-7).
  A number that sums in another order leave on the other side of a rounding boundary moves by up to 2^-3 of itself, as
  far as any number that is rounded; it is one of thousands, so a fiftieth of the recipe's own effect is allowed.
  ``tensorwise`` rounds with other scales, which is another draw of the rounding: by the triangle inequality at most as
  far away as two such draws are from no rounding.
"""

from __future__ import annotations

import pytest
from combination_workers import Found, Setting, train_each
from test_parity import GRAD_NORM, LOSS, _masked_rows
from tiny_models import save_tiny
from tiny_training import LAYOUTS

from prism_nemo.config import ParallelConfig, PrecisionConfig, RecomputeConfig
from prism_nemo.runtime.launch import launch

CASES = ("mistral-window", "granite-hybrid-one-group")
BF16 = 2.0**-9
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
Results = dict[tuple[str, str], Found]


def emulated(recipe: str) -> PrecisionConfig:
    return PrecisionConfig(dtype="fp32", fp8="emulate", fp8_recipe=recipe)


BOTH = ["core_attn", "mlp"]
SETTINGS = {
    "none": Setting(),
    "selective": Setting(RecomputeConfig("selective", modules=BOTH)),
    "uniform": Setting(RecomputeConfig("full")),
    "block": Setting(RecomputeConfig("full", "block", 1)),
    "bf16": Setting(precision=PrecisionConfig(dtype="bf16")),
    "bf16 full": Setting(RecomputeConfig("full"), PrecisionConfig(dtype="bf16")),
    **{recipe: Setting(precision=emulated(recipe)) for recipe in RECIPES},
    "mxfp8 full": Setting(RecomputeConfig("full"), emulated("mxfp8")),
    "overlap": Setting(overlap=True),
    "overlap full bf16": Setting(RecomputeConfig("full"), PrecisionConfig(dtype="bf16"), overlap=True),
}
PLAIN = {name: SETTINGS[name] for name in ("none", "bf16", *RECIPES)}
# The setting of one process that a setting is compared with, where it is not itself.
BESIDE = {"selective": "none", "uniform": "none", "block": "none", "overlap": "none", "mxfp8 full": "mxfp8"}
BESIDE |= {"bf16 full": "bf16", "overlap full bf16": "bf16"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {case: str(save_tiny(case, root / case)) for case in CASES}


def train(folders: dict[str, str], settings: dict[str, Setting], parallel: ParallelConfig) -> Results:
    runs = {case: (folder, settings) for case, folder in folders.items()}
    found = launch(train_each, runs, _masked_rows(2, 149), parallel, 2, processes=parallel.world_size)
    return dict(found)


@pytest.fixture(scope="module")
def plain(folders: dict[str, str]) -> Results:
    return train(folders, PLAIN, ParallelConfig())


@pytest.fixture(scope="module")
def context(folders: dict[str, str]) -> Results:
    return train(folders, SETTINGS, LAYOUTS["CP2"])


@pytest.fixture(scope="module")
def virtual(folders: dict[str, str]) -> Results:
    return train(folders, SETTINGS, LAYOUTS["PP2 VPP2"])


def equal(found: Found, wanted: Found, loss: float, norm: float) -> None:
    assert found.loss == pytest.approx(wanted.loss, abs=loss)
    assert found.grad_norm == pytest.approx(wanted.grad_norm, rel=norm)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["none", "selective", "uniform", "block", "overlap"])
def test_recomputation_and_overlap_change_nothing(
    name: str, case: str, plain: Results, context: Results, virtual: Results
) -> None:
    for results in (context, virtual):
        equal(results[case, name], plain[case, "none"], LOSS, GRAD_NORM)
        if name in ("selective", "uniform", "block"):
            # Bit for bit what the layout gives without; and less is kept: the setting was not ignored.
            assert results[case, name].loss == results[case, "none"].loss
            assert results[case, name].grad_norm == results[case, "none"].grad_norm
            assert results[case, name].kept < 0.9 * results[case, "none"].kept


@pytest.mark.parametrize("case", CASES)
def test_bf16(case: str, plain: Results, context: Results, virtual: Results) -> None:
    wanted = plain[case, "bf16"]
    assert wanted.loss != plain[case, "none"].loss
    for results, loss, norm in ((context, BF16 * wanted.loss[0], 2 * BF16), (virtual, LOSS, GRAD_NORM)):
        for name in ("bf16", "bf16 full", "overlap full bf16"):
            equal(results[case, name], wanted, loss, norm)
        assert results[case, "bf16 full"].loss == results[case, "bf16"].loss


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8(recipe: str, case: str, plain: Results, context: Results, virtual: Results) -> None:
    wanted, unrounded = plain[case, recipe], plain[case, "none"]
    gap = max(abs(a - b) for a, b in zip(wanted.loss, unrounded.loss, strict=True))
    norm_gap = max(abs(a - b) / b for a, b in zip(wanted.grad_norm, unrounded.grad_norm, strict=True))
    assert gap > 100 * LOSS  # FP8 is on
    equal(virtual[case, recipe], wanted, LOSS + 0.02 * gap, GRAD_NORM + 0.02 * norm_gap)
    share = 2.0 if recipe == "tensorwise" else 0.02
    equal(context[case, recipe], wanted, LOSS + share * gap, GRAD_NORM + share * norm_gap)
    if recipe == "mxfp8":
        for results in (context, virtual):
            assert results[case, "mxfp8 full"].loss == results[case, recipe].loss
            assert results[case, "mxfp8 full"].kept < 0.9 * results[case, recipe].kept


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["PP2 VPP2 DP2", "CP2 PP2 VPP2", "CP2 DP2", "TP2 CP2"])
def test_four_ranks(layout: str, folders: dict[str, str], plain: Results) -> None:
    """Overlap where a virtual pipeline has replicas; context parallelism inside a virtual pipeline."""
    sizes = {name[:-1]: int(name[-1]) for name in layout.split()}
    parallel = ParallelConfig(
        sizes.get("TP", 1),
        sizes.get("PP", 1),
        sizes.get("DP", 1),
        context_parallel_size=sizes.get("CP", 1),
        virtual_pipeline_model_parallel_size=sizes.get("VPP", 1),
    )
    names = ("none", "uniform", "selective", "overlap", "bf16", "overlap full bf16")
    found = train(folders, {name: SETTINGS[name] for name in names}, parallel)
    for (case, name), result in found.items():
        wanted = plain[case, BESIDE.get(name, name)]
        if "bf16" in name:
            equal(result, wanted, BF16 * wanted.loss[0], 2 * BF16)
        else:
            equal(result, wanted, LOSS, GRAD_NORM)
