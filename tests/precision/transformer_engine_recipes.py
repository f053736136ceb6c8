"""With which recipe each layer of a GPU run would run, as Megatron tells a stand-in for Transformer Engine.

A program: ``transformer_engine_recipes.py REQUEST.json``; see tests/models/transformer_engine_layers.py.
"""

# ruff: noqa: E402

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "models" / "stand_in"), str(TESTS)]

import torch
from transformer_engine.pytorch import fp8

from prism_nemo.config import ParallelConfig, PrecisionConfig
from prism_nemo.models.build import build_model
from prism_nemo.models.family import read_hf_config
from prism_nemo.models.forward import positions
from prism_nemo.runtime import start, stop


def _told(recipe: Any) -> Any:
    return None if recipe is None else [type(recipe).__name__, recipe.told()]


def recipes(folder: str, precision: PrecisionConfig) -> dict[str, list[Any]]:
    """By linear layer, the recipe that its weights were made with and the one that it ran with."""
    runtime = replace(start(ParallelConfig(), seed=0, precision=precision), transformer_engine=True)
    model = build_model(read_hf_config(Path(folder)), runtime)
    tokens = torch.arange(16)[None]
    model(tokens, positions(tokens), None)
    names = {module: name for name, module in model.named_modules()}
    found = {names[layer]: [_told(note.made), _told(note.ran)] for layer, note in fp8.noted.items() if layer in names}
    stop()
    fp8.noted.clear()
    return found


def main() -> None:
    """Write what was found for each precision to the request's file."""
    request = json.loads(Path(sys.argv[1]).read_text())
    found = [recipes(request["folder"], PrecisionConfig(**precision)) for precision in request["precisions"]]
    Path(request["out"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
