"""`prism-nemo midtrain` and `rl`: a training stage."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer


def midtrain(
    recipe: Annotated[Path, typer.Argument(help="A recipe (.py) or a resolved config.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, by dotted name.")] = None,
) -> None:
    """Run or continue a mid-training stage."""
    from prism_nemo.config import MidtrainConfig
    from prism_nemo.training.midtrain import check
    from prism_nemo.training.midtrain import midtrain as run

    config = _recipe(recipe, "midtrain", MidtrainConfig, overrides or [])
    check(config)
    _stage(run, config, "midtrain")


def rl(
    recipe: Annotated[Path, typer.Argument(help="A recipe (.py) or a resolved config.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, by dotted name.")] = None,
) -> None:
    """Run or continue an RL stage."""
    from prism_nemo.config import RLConfig
    from prism_nemo.rl.train import check, train

    config = _recipe(recipe, "rl", RLConfig, overrides or [])
    check(config)
    _stage(train, config, "rl")


def _recipe(path: Path, name: str, schema: type, overrides: list[str]) -> Any:
    from prism_nemo.recipe import load_recipe

    return load_recipe(path, name, schema, overrides)


def _stage(function: Any, config: Any, name: str) -> None:
    """Run in the processes that torchrun or Slurm started; start them here otherwise."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        result = function(config, name)
    else:
        from prism_nemo.runtime.launch import launch

        result = launch(function, config, name, processes=config.parallel.world_size)
    if int(os.environ.get("RANK", "0")) == 0:
        typer.echo(json.dumps(result))
