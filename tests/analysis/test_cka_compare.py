"""The whole of `analyze cka` on tiny models, against a comparison made by hand."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from analysis_workers import states_of
from tiny_models import save_tiny
from tiny_stages import stages

from prism_nemo.analysis.activations import pick_tokens
from prism_nemo.analysis.alignment import mutual_neighbours, procrustes_distance
from prism_nemo.analysis.cka import debiased_linear_cka, linear_cka, plain_linear_cka
from prism_nemo.analysis.cka_view import cka_figures, cka_lines, cka_map, cka_strips
from prism_nemo.analysis.representations import CKAComparison, CKASettings, compare_representations
from prism_nemo.analysis.token_rows import held_out_inputs
from prism_nemo.analysis.weights import compare_weights
from prism_nemo.checkpoint.convert import import_hf
from prism_nemo.config import ParallelConfig
from prism_nemo.errors import InputError
from prism_nemo.runtime.launch import launch

DIRECT = {
    "plain": plain_linear_cka,
    "centred": linear_cka,
    "debiased": debiased_linear_cka,
    "procrustes": procrustes_distance,
    "mutual_neighbours": lambda x, y: mutual_neighbours(x, y, 3),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Path]:
    return stages(tmp_path_factory.mktemp("stages"))


@pytest.fixture(scope="module")
def settings(models: tuple[list[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> CKASettings:
    """The second model is a native checkpoint."""
    folders, data = models
    native = tmp_path_factory.mktemp("native") / "mid"
    import_hf(folders[1], native, ParallelConfig())
    return CKASettings(
        models=(str(folders[0]), str(native)),
        data=str(data),
        rows=16,
        seq_length=24,
        tokens_per_text=2,
        massive_ratio=30.0,
        neighbours=3,
        draws=40,
        null_draws=2,
        batch_tokens=100,
    )


@pytest.fixture(scope="module")
def found(settings: CKASettings) -> CKAComparison:
    return compare_representations(settings)


def select(found: CKAComparison, **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in found.rows if all(row[key] == value for key, value in wanted.items())]


def test_values_are_those_of_the_states(
    found: CKAComparison, settings: CKASettings, models: tuple[list[Path], Path]
) -> None:
    folders, data = models
    rows = held_out_inputs(data, (), 16, 24)[0].rows
    picks = pick_tokens(rows, 2, settings.seed)
    relative = {name: c.relative_l2 for name, c in compare_weights(folders[0], folders[1]).tensors.items()}
    moves = [(relative, settings.seed), (relative, settings.seed + 1)]
    states = launch(states_of, [str(folder) for folder in folders[:2]], rows, picks, 24, moves)
    for pooling, layer in itertools.product(("mean", "token"), range(5)):
        x, y, *nulls = ((own.pooled if pooling == "mean" else own.tokens)[layer] for own in states)
        for measure, direct in DIRECT.items():
            row, *more = select(found, pooling=pooling, treatment="raw", layer=layer, measure=measure)
            assert not more
            # Batches of another size round otherwise (fp32 states); the measures themselves are fp64.
            assert row["value"] == pytest.approx(direct(x, y), abs=1e-4)
            expected = sorted(direct(x, null) for null in nulls)
            assert [row["null_low"], row["null_high"]] == pytest.approx(expected, abs=1e-4)
            assert row["null"] == pytest.approx(sum(expected) / 2, abs=1e-4)
    pooled = [own.pooled for own in states[:2]]
    debiased = next(m["values"] for m in found.maps if m["measure"] == "debiased")
    expected = [[debiased_linear_cka(x, y) for y in pooled[1]] for x in pooled[0]]
    assert torch.allclose(torch.tensor(debiased), torch.tensor(expected), atol=1e-4)
    assert not torch.allclose(
        torch.tensor(debiased), torch.tensor(debiased).T, atol=1e-3
    )  # or the sides may be swapped


def test_rows_are_complete_and_plain(found: CKAComparison) -> None:
    assert len(found.rows) == 2 * 3 * 5 * 5  # poolings, treatments, places in the stream, measures
    for row in found.rows:
        assert row["input"] == "held"
        assert row["null_low"] <= row["null"] <= row["null_high"]
        if row["measure"] in ("plain", "centred", "debiased"):
            assert row["low"] <= row["value"] <= row["high"]
        else:
            assert row["low"] is None
    assert json.loads(json.dumps(found.to_dict()))["rows"] == found.rows


def test_null_is_a_move_of_the_same_size(found: CKAComparison, models: tuple[list[Path], Path]) -> None:
    folders, _ = models
    total = compare_weights(folders[0], folders[1]).total.relative_l2
    (distances,) = found.moved.values()
    assert distances == pytest.approx([total, total], rel=1e-5)
    # The second model is itself a random move of that size from the first, so the null explains all of it.
    for layer in (2, 3, 4):
        (row,) = select(found, pooling="mean", treatment="raw", layer=layer, measure="debiased")
        # Of 12 random moves the values at these layers were 0.37 to 0.78.
        assert abs(row["value"] - row["null"]) < 0.4
        assert row["null"] < 0.9


def test_what_people_see(found: CKAComparison) -> None:
    lines = cka_lines(found)
    assert any("debiased" in line and "random update" in line for line in lines)
    assert any("mutual_neighbours" in line for line in lines)
    pair = found.rows[0]["pair"]
    assert "base" in pair
    assert "random update" in str(cka_strips(found, pair, "held"))
    headings = [heading for heading, _, _ in cka_figures(found)]
    assert headings == [f"{pair}: layer by layer, on held", f"{pair}: every layer against every other, on held"]
    assert "layer 4" in str(cka_map(found, pair, "held"))


def test_refusals(settings: CKASettings, models: tuple[list[Path], Path], tmp_path: Path) -> None:
    other = save_tiny("llama", tmp_path / "five", num_hidden_layers=5)
    small = save_tiny("llama", tmp_path / "small", vocab_size=60)
    base = settings.models[0]
    for changes, match in (
        ({"models": (base,)}, "at least two"),
        ({"models": (base, base)}, "named twice"),
        ({"models": (base, str(tmp_path))}, "neither a prism-nemo checkpoint"),
        ({"models": (base, str(other))}, "5 layers, .* has 4"),
        ({"models": (base, str(small))}, "outside the vocabulary"),
        ({"data": None}, "no text"),
        ({"rows": 4}, "at least 8"),
        ({"neighbours": 16}, "less than 16"),
        ({"treatments": ("whitened",)}, "whitened"),
        ({"draws": 5}, "draws"),
        ({"dtype": "fp8"}, "fp8"),
        ({"sources": ("nothing",)}, "nothing"),
        ({"seq_length": 500, "rows": 9}, "held-out rows"),
        ({"massive_ratio": 0.5}, "massive_ratio"),
        ({"null_draws": -1}, "null_draws"),
    ):
        with pytest.raises(InputError, match=match):
            compare_representations(dataclasses.replace(settings, **changes))
