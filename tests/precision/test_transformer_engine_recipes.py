"""What Transformer Engine is asked for by each setting, by layer; it is a stand-in that notes it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_tiny

PROGRAM = Path(__file__).with_name("transformer_engine_recipes.py")
LINEAR = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
PRECISIONS: dict[str, dict[str, Any]] = {
    "delayed": {"fp8_format": "hybrid", "fp8_margin": 1, "fp8_amax_history_len": 7, "fp8_amax_compute_algo": "max"},
    "tensorwise": {
        "fp8_format": "hybrid",
        "fp8_param_gather": True,
        "first_last_layers_bf16": True,
        "num_layers_at_start_in_bf16": 1,
        "num_layers_at_end_in_bf16": 2,
    },
    "blockwise": {"fp8_format": "e4m3"},
    "mxfp8": {"fp8_format": "e4m3"},
    "off": {},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """See `transformer_engine_recipes.recipes`, by recipe."""
    root = tmp_path_factory.mktemp("recipes")
    precisions = [
        {"dtype": "bf16", "fp8": "off" if name == "off" else "on", **settings}
        | ({} if name == "off" else {"fp8_recipe": name})
        for name, settings in PRECISIONS.items()
    ]
    request = {"folder": str(save_tiny("llama", root / "hf")), "precisions": precisions, "out": str(root / "out.json")}
    (root / "request.json").write_text(json.dumps(request))
    done = subprocess.run([sys.executable, str(PROGRAM), str(root / "request.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    answers = dict(zip(PRECISIONS, json.loads((root / "out.json").read_text()), strict=True))
    names = {f"decoder.layers.{layer}.{linear}" for layer in range(4) for linear in LINEAR}
    assert all(answer.keys() == names for answer in answers.values())
    return answers


@pytest.mark.parametrize(
    ("name", "recipe", "told"),
    [
        (
            "delayed",
            "TEDelayedScaling",  # as Megatron derives it
            {"margin": 1, "fp8_format": "HYBRID", "amax_history_len": 7, "amax_compute_algo": "max"},
        ),
        ("blockwise", "Float8BlockScaling", {"fp8_format": "E4M3"}),
        ("mxfp8", "MXFP8BlockScaling", {"fp8_format": "E4M3"}),
    ],
)
def test_every_layer_runs_with_the_recipe(
    name: str, recipe: str, told: dict[str, Any], found: dict[str, dict[str, Any]]
) -> None:
    for layer, (made, ran) in found[name].items():
        assert made is None, layer
        assert ran[0] == recipe, layer
        assert ran[1].items() >= told.items(), layer
        assert (ran[1]["fp8_dpa"], ran[1]["fp8_mha"]) == (False, False), "attention is in bf16"


def test_first_and_last_layers_stay_in_bf16_and_weights_are_made_in_fp8(found: dict[str, dict[str, Any]]) -> None:
    for layer, (made, ran) in found["tensorwise"].items():
        if int(layer.split(".")[2]) == 1:  # one at the start and two at the end are not
            assert made == ran, layer
            assert ran[0] == "Float8CurrentScaling", layer
            assert ran[1]["fp8_format"] == "HYBRID", layer
        else:
            assert made is ran is None, layer


def test_off_is_off(found: dict[str, dict[str, Any]]) -> None:
    assert all(made is ran is None for made, ran in found["off"].values())
