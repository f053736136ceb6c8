"""Recipes: what to run, as a function that returns a configuration, or as the config.yaml of an earlier run."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf

from prism_nemo.config import load_yaml, resolve
from prism_nemo.errors import InputError, PrismError

ConfigType = TypeVar("ConfigType")


def load_recipe(
    path: Path, function: str, schema: type[ConfigType], overrides: list[str], not_given: str | None = None
) -> ConfigType:
    """Resolve a recipe.

    Args:
        path: A Python file that defines `function`, or a YAML file of values.
        function: Name of the function, such as ``midtrain``. Overrides that name one of its parameters
            (``model=...``) are passed to it; all others override fields of the configuration that it returns.
        schema: Type of the configuration.
        overrides: ``key=value``.
        not_given: Passed for the function's parameters that have no value, and for those that are None where nobody
            gives them; None refuses a recipe with the first.

    Raises:
        InputError: For a missing file, a recipe without the function, or an unknown key.
    """
    if path.suffix in (".yaml", ".yml"):
        return resolve(schema, load_yaml(path, schema), overrides, source=str(path))
    if path.suffix != ".py":
        raise InputError(f"{path}: a recipe is a .py file or a config.yaml")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    # A name of its own: a recipe called json.py must not take that module's place.
    spec = importlib.util.spec_from_file_location(f"prism_nemo_recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path}: cannot be loaded as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where a dataclass of the recipe looks its types up
    _run(path, lambda: spec.loader.exec_module(module))  # type: ignore[union-attr]
    build = getattr(module, function, None)
    if build is None:
        raise InputError(f"{path}: defines no function '{function}'")
    arguments, rest, missing = split_overrides(build, overrides)
    if not_given is not None:
        optional = [name for name, one in inspect.signature(build).parameters.items() if one.default is None]
        arguments = dict.fromkeys([*missing, *optional], not_given) | arguments
    elif missing:
        raise InputError(f"{path}: {function}() needs {', '.join(f'{name}=...' for name in missing)}")
    config = _run(path, lambda: build(**arguments))
    if not isinstance(config, schema):
        raise InputError(f"{path}: {function}() returned {type(config).__name__}, not {schema.__name__}")
    values = OmegaConf.to_container(OmegaConf.structured(config))
    given = {str(k): v for k, v in values.items() if v != "???"} if isinstance(values, dict) else {}
    return resolve(schema, given, rest, source=str(path))


def split_overrides(build: Callable[..., Any], overrides: list[str]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Those that name a parameter of a function, the others, and the parameters without a value that none names.

    Raises:
        InputError: For one that is not ``key=value``.
    """
    parameters = inspect.signature(build).parameters
    arguments: dict[str, Any] = {}
    rest = []
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise InputError(f"override '{override}' is not of the form key=value")
        if key in parameters:
            arguments[key] = value
        else:
            rest.append(override)
    missing = [n for n, p in parameters.items() if p.default is inspect.Parameter.empty and n not in arguments]
    return arguments, rest, missing


def argument_of(overrides: list[str], name: str) -> str | None:
    """The value of ``name=value``, the last one if there are several."""
    values = [value for key, _, value in (override.partition("=") for override in overrides) if key == name]
    return values[-1] if values else None


def _run(path: Path, call: Callable[[], Any]) -> Any:
    """Run a recipe's code; whatever it raises is a fault of the recipe."""
    try:
        return call()
    except PrismError:
        raise
    except Exception as error:
        raise InputError(f"{path}: {type(error).__name__}: {error}") from error
