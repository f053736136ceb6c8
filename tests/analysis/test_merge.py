"""Merging: each method against a slow form of its formula, the files forwarded, parents given back bit for bit."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import all_tensors, edited_copy
from tiny_models import hf_model, save_tiny
from tiny_stages import moved_copy
from torch import Tensor

from prism_nemo.analysis import merge, merge_methods
from prism_nemo.analysis.merge import MergeSettings, merge_models
from prism_nemo.analysis.merge_methods import METHODS, linear, merged, recipe_of, slerp, task_arithmetic, ties
from prism_nemo.checkpoint.convert import import_hf
from prism_nemo.checkpoint.files import WriteFile
from prism_nemo.checkpoint.hf import blocks_of
from prism_nemo.config import ParallelConfig
from prism_nemo.errors import InputError, PrismError


def normal(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def slow_ties(tensors: list[list[float]], weights: list[float], density: float) -> list[float]:
    """Number by number."""
    base, size = tensors[0], len(tensors[0])
    updates = []
    for other in tensors[1:]:
        update = [b - a for a, b in zip(base, other, strict=True)]
        kept = sorted(range(size), key=lambda i: -abs(update[i]))[: max(1, round(density * size))]
        updates.append([u if i in kept else 0.0 for i, u in enumerate(update)])
    result = []
    for i in range(size):
        votes = [w * u[i] for w, u in zip(weights, updates, strict=True)]
        sign = math.copysign(1, sum(votes)) if sum(votes) else 0
        agreeing = [(w, u[i]) for w, u in zip(weights, updates, strict=True) if u[i] and w * u[i] * sign > 0]
        mean = sum(w * u for w, u in agreeing) / sum(w for w, _ in agreeing) if agreeing else 0.0
        result.append(base[i] + sum(weights) / len(weights) * mean)
    return result


def test_formulas() -> None:
    a, b, c = (normal(4, 5, seed=s) for s in (1, 2, 3))
    assert torch.allclose(linear([a, b], [0.15, 0.85]), 0.15 * a + 0.85 * b)
    assert torch.allclose(task_arithmetic([a, b, c], [0.5, -0.3]), a + 0.5 * (b - a) - 0.3 * (c - a))
    for weights, density in (([1.0, 1.0], 0.3), ([0.4, 0.4], 1.0), ([0.7, 0.2], 0.5), ([1.0], 0.2)):
        parts = [a, b, c][: len(weights) + 1]
        slow = slow_ties([part.flatten().tolist() for part in parts], weights, density)
        assert ties(parts, weights, density).flatten().tolist() == pytest.approx(slow, abs=1e-12)


def test_a_model_of_weight_zero_is_left_out() -> None:
    """0 * x is not nothing: it loses the sign of a zero, and infinity becomes NaN."""
    first, second = torch.tensor([-0.0, 1.0]), torch.tensor([2.0, math.inf])
    for method, weights in (("linear", [1.0]), ("task_arithmetic", [0.0])):
        found = merged(recipe_of(method, 2, weights), [first, second])
        assert torch.equal(found.view(torch.int32), first.view(torch.int32))


def test_ties_drops_what_disagrees() -> None:
    base = torch.zeros(4)
    first, second = torch.tensor([3.0, 1.0, -0.1, 2.0]), torch.tensor([-1.0, 1.0, 4.0, 0.1])
    # Two of four kept: the first 3 and 2, the second 4 and one of its ones (the first place or the second).
    found = ties([base, first, second], [1.0, 1.0], 0.5)
    assert found[0] == 3.0  # the second one's -1 is outvoted, and not averaged in
    assert found[2] == 4.0  # the first one's -0.1 was trimmed
    assert found[3] == 2.0


def test_slerp_goes_along_the_circle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_methods, "_CHUNK", 7)  # read in three pieces
    a, b = normal(6, 3, seed=1), normal(6, 3, seed=2)
    angle = math.acos(float((a * b).sum() / (a.norm() * b.norm())))
    for weight in (0.2, 0.5, 0.9):
        found = slerp(a, b, weight)
        t = 1 - weight
        assert torch.allclose(found, (math.sin(weight * angle) * a + math.sin(t * angle) * b) / math.sin(angle))
    unit_a, unit_b = a / a.norm(), b / b.norm()
    middle = slerp(unit_a, unit_b, 0.3)
    assert float(middle.norm()) == pytest.approx(1)
    assert math.acos(float((middle * unit_a).sum())) == pytest.approx(0.7 * angle)
    # Straight where there is no circle to speak of.
    for other in (a * (1 + 1e-9), -a, torch.zeros_like(a)):
        assert torch.allclose(slerp(a, other, 0.25), 0.25 * a + 0.75 * other)
    assert torch.equal(slerp(a, b, 1.0), a)
    assert torch.equal(slerp(a, b, 0.0), b)


def test_sixteen_bit_numbers_are_rounded_once() -> None:
    a, b = normal(2000, seed=1).bfloat16(), normal(2000, seed=2).bfloat16()
    found = merged(recipe_of("linear", 2, [0.15]), [a, b])
    assert found.dtype == torch.bfloat16
    exact = 0.15 * a.double() + 0.85 * b.double()
    spacing = 2.0 ** (exact.abs().log2().floor() - 7)
    # Half a spacing of bf16, and 1e-4 of it for the arithmetic in fp32 (relative 1e-7 against 2^-8).
    assert bool(((found.double() - exact).abs() <= (0.5 + 1e-4) * spacing).all())
    in_steps = (0.15 * a + 0.85 * b).double()  # every step in bf16
    assert int(((in_steps - exact).abs() > (0.5 + 1e-4) * spacing).sum()) > 100


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("average", 2, None), "average"),
        (("linear", 1, None), "at least two"),
        (("linear", 2, [0.5, 0.6]), "add up to 1"),
        (("linear", 3, [0.5]), "add up to 1"),
        (("linear", 2, [math.nan]), "finite"),
        (("slerp", 3, None), "takes two"),
        (("slerp", 2, [1.5]), "0 to 1"),
        (("ties", 3, [1.0]), "2, not 1"),
        (("ties", 2, None, 0.0), "density"),
    ],
)
def test_recipes_refused(arguments: tuple[Any, ...], match: str) -> None:
    with pytest.raises(InputError, match=match):
        recipe_of(*arguments)


def test_recipes_filled_in() -> None:
    assert recipe_of("linear", 2, [0.15]).weights == (0.15, 0.85)
    assert recipe_of("linear", 4, None).weights == (0.25,) * 4
    assert recipe_of("task_arithmetic", 3, None).weights == (1.0, 1.0)


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("parents")
    first = save_tiny("granite-hybrid", root / "a", dtype=torch.bfloat16)  # tied, with Mamba mixers
    second = moved_copy(first, root / "b", 0.3, seed=4)
    return first, second


def run(parents: tuple[Path, ...], out: Path, **changes: Any) -> dict[str, Any]:
    return merge_models(MergeSettings(tuple(map(str, parents)), str(out), **changes))


def test_the_merge_computes_what_averaged_weights_compute(parents: tuple[Path, Path], tmp_path: Path) -> None:
    """In fp32, where averaging by hand in fp64 and rounding gives the same numbers: logits equal, not nearly equal."""
    first = save_tiny("llama", tmp_path / "a")
    second = moved_copy(first, tmp_path / "b", 0.3, seed=4)
    run((first, second), tmp_path / "out", weights=(0.15,))
    by_hand = hf_model(first)
    a, b = by_hand.state_dict(), hf_model(second).state_dict()
    by_hand.load_state_dict({name: (0.15 * a[name].double() + 0.85 * b[name].double()).float() for name in a})
    tokens = torch.arange(60).view(3, 20)
    with torch.no_grad():
        expected, found = by_hand(tokens).logits, hf_model(tmp_path / "out")(tokens).logits
        assert torch.equal(found, expected)
        assert not torch.allclose(found, hf_model(second)(tokens).logits, atol=1e-2)


@pytest.mark.parametrize("method", ["linear", "slerp", "task_arithmetic"])
def test_ends_are_the_parents_bit_for_bit(method: str, parents: tuple[Path, Path], tmp_path: Path) -> None:
    # The base comes first in task arithmetic, and its weight is that of the update.
    for weight, parent in ((1.0, 0), (0.0, 1)):
        out = tmp_path / str(parent)
        run(parents, out, method=method, weights=(1 - weight if method == "task_arithmetic" else weight,))
        ours, theirs = all_tensors(out), all_tensors(parents[parent])
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[n].view(torch.int16), theirs[n].view(torch.int16)) for n in theirs)


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_files(method: str, parents: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several files with an index, types kept, the configuration and tokenizer of the parent that was named."""
    monkeypatch.setattr(merge, "blocks_of", partial(blocks_of, limit=500))  # a few rows at a time
    (parents[0] / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    try:
        done: list[tuple[int, int]] = []
        settings = MergeSettings(
            tuple(map(str, parents)), str(tmp_path / "out"), method, carry_from=str(parents[0]), max_shard_bytes=30_000
        )
        record = merge_models(settings, lambda now, total: done.append((now, total)))
    finally:
        (parents[0] / "tokenizer.json").unlink()
    out = tmp_path / "out"
    assert len(list(out.glob("model-*.safetensors"))) > 2
    a, b, found = (all_tensors(folder) for folder in (*parents, out))
    assert found.keys() == a.keys()
    recipe = recipe_of(method, 2, None)
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, merged(recipe, [a[name], b[name]]))  # in blocks of rows or whole: the same
    assert done[-1][0] == done[-1][1] == sum(t.numel() * 2 for t in a.values())
    assert json.loads((out / "merge.json").read_text()) == record
    assert [parent["path"] for parent in record["parents"]] == [str(p) for p in parents]
    assert len({parent["hash"] for parent in record["parents"]}) == 2
    assert any("no tokenizer.json" in note for note in record["notes"])
    assert (out / "tokenizer.json").is_file()
    assert json.loads((out / "config.json").read_text())["architectures"] == ["GraniteMoeHybridForCausalLM"]
    hf_model(out)


def test_native_parents(parents: tuple[Path, Path], tmp_path: Path) -> None:
    native = tmp_path / "native"
    import_hf(parents[1], native, ParallelConfig())
    run((parents[0], native), tmp_path / "mixed", weights=(0.4,))
    run(parents, tmp_path / "folders", weights=(0.4,))
    mixed, folders = all_tensors(tmp_path / "mixed"), all_tensors(tmp_path / "folders")
    assert mixed.keys() == folders.keys()
    assert all(torch.equal(mixed[name], folders[name]) for name in folders)
    hf_model(tmp_path / "mixed")


def test_parents_that_do_not_fit_are_listed(parents: tuple[Path, Path], tmp_path: Path) -> None:
    a = save_tiny("llama", tmp_path / "a")
    deeper = save_tiny("llama", tmp_path / "deeper", num_hidden_layers=5)
    wider = save_tiny("llama", tmp_path / "wider", vocab_size=151)
    half = save_tiny("llama", tmp_path / "half", dtype=torch.bfloat16)
    tied = save_tiny("llama", tmp_path / "tied", tie_word_embeddings=True)
    for other, match in (
        (deeper, r"num_layers: 4, 5(.|\n)*has model.layers.4"),
        (wider, r"vocab_size: 149, 151(.|\n)*lm_head.weight has shape"),
        (half, "has type BF16, in .* F32"),
        (tied, "tied_embeddings: False, True"),
        (parents[0], "family: llama, granite_hybrid"),
    ):
        with pytest.raises(InputError, match=match):
            run((a, other), tmp_path / "out")
    other = edited_copy(a, tmp_path / "other")
    (a / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 1}}}')
    (other / "tokenizer.json").write_text('{"model": {"vocab": {"a": 1, "b": 0}}}')
    with pytest.raises(InputError, match="another vocabulary"):
        run((a, other), tmp_path / "out")
    with pytest.raises(InputError, match="none of the models"):
        run(parents, tmp_path / "out", carry_from=str(a))
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="already exists"):
        run(parents, tmp_path / "there")
    assert not (tmp_path / "out").exists()


def test_a_merge_that_fails_leaves_nothing(
    parents: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.post_attention_layernorm.weight"][3] = math.nan

    bad = edited_copy(parents[1], tmp_path / "bad", spoil)
    for method in METHODS:
        with pytest.raises(PrismError, match=r"layers\.1\.post_attention_layernorm\.weight is NaN"):
            run((parents[0], bad), tmp_path / "out", method=method)

    def full(self: WriteFile, data: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(WriteFile, "write", full)
    with pytest.raises(PrismError, match="the disk is full"):
        run(parents, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]
