"""Every resolved value of a recipe, and where it came from.

python -m recipes.show midtrain checkpoint=CKPT data=TOKENS run_dir=runs/mid model=granite-3.3-8b hardware=h100x64
python -m recipes.show rl checkpoint=CKPT tokenizer=HF_DIR run_dir=runs/rl optimizer.lr=1e-6 --json
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from typing import Any

from omegaconf import OmegaConf

from prism_nemo.config import MidtrainConfig, RLConfig, resolve
from prism_nemo.errors import InputError, PrismError
from prism_nemo.evaluation.settings import EvaluateConfig
from prism_nemo.recipe import split_overrides
from recipes.provenance import DEFAULT, Line, explain, fill

RECIPES: dict[str, Any] = {
    "midtrain": MidtrainConfig,
    "longcontext": MidtrainConfig,
    "rl": RLConfig,
    "evaluate": EvaluateConfig,
}


def lines_of(recipe: str, overrides: list[str]) -> list[Line]:
    """Resolve a recipe as its verb does.

    Args:
        recipe: Key of `RECIPES`.
        overrides: ``key=value``, of the recipe's arguments or of fields.

    Raises:
        InputError: For a recipe, argument or key that is unknown, or an argument that is missing.
    """
    if recipe not in RECIPES:
        raise InputError(f"recipe '{recipe}' is unknown; choose one of {', '.join(RECIPES)}")
    module, schema = importlib.import_module(f"recipes.{recipe}"), RECIPES[recipe]
    arguments, rest, missing = split_overrides(module.values, overrides)
    if missing:
        raise InputError(f"{recipe} needs {', '.join(f'{name}=...' for name in missing)}")
    values = module.values(**arguments)
    config = fill(schema, values)
    if rest and schema is EvaluateConfig:
        raise InputError(f"override '{rest[0]}': an evaluation takes its settings as options of prism-nemo eval")
    if rest:
        nested = OmegaConf.to_container(OmegaConf.structured(config))
        config = resolve(schema, {k: v for k, v in dict(nested).items() if v != "???"}, rest, recipe)  # type: ignore
    return explain(config, values)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in given
    given = [argument for argument in given if argument != "--json"]
    try:
        if not given:
            raise InputError(f"name a recipe: {', '.join(RECIPES)}")
        lines = lines_of(given[0], given[1:])
    except PrismError as error:
        print(f"recipes.show: {error}", file=sys.stderr)
        return error.exit_code
    if as_json:
        print(json.dumps([dataclasses.asdict(line) for line in lines]))
        return 0
    width = max(len(line.key) for line in lines)
    # Values that somebody decided for this recipe first; the library's defaults after them.
    for line in sorted(lines, key=lambda line: line.origin == DEFAULT):
        print(f"{line.key:<{width}}  {line.value!s:<24}  {line.origin:<8}  {line.where}".rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
