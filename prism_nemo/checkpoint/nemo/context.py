"""The model that a NeMo context describes: class names and configuration values, from ``io.json`` and ``model.yaml``.

``io.json`` is what NeMo itself loads; ``model.yaml`` says the same in text, defaults included. Where NeMo could not
express an object (a lambda in the configuration is enough) ``io.json`` only points to a pickle, which is not opened:
then ``model.yaml`` is all there is. Where both say something they must agree, since only one can be right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from prism_nemo.checkpoint.nemo.folder import NemoFolder
from prism_nemo.checkpoint.nemo.io_json import Call, IoJson, Opaque, Symbol
from prism_nemo.errors import InputError

IO_JSON, MODEL_YAML = "io.json", "model.yaml"


@dataclass(frozen=True)
class ModelContext:
    """A model as its context describes it.

    Attributes:
        source: The file that was read, for messages.
        model_class: Dotted name of the model's class.
        config_class: Dotted name of its configuration's class.
        values: The configuration: numbers, strings, lists, `Symbol`, `Call` and `Opaque`.
        tokenizer: How the tokenizer is made; None if there is none.
        transform: What changes the model after it was built; None if nothing does.
    """

    source: Path
    model_class: str
    config_class: str
    values: Mapping[str, Any]
    tokenizer: Any
    transform: Any


def read_context(folder: NemoFolder) -> ModelContext:
    """Read both files, as far as they are there.

    Raises:
        InputError: If neither describes the model in data, or they contradict each other.
    """
    io_path, yaml_path = folder.context / IO_JSON, folder.context / MODEL_YAML
    found = []
    pickled = ""
    if io_path.is_file():
        model = IoJson(io_path).model()
        config = model.arguments.get("config") if isinstance(model, Call) else model
        if isinstance(config, Call):
            found.append(_context(io_path, model))
        elif isinstance(config, Opaque) and config.file:
            pickled = config.file
        elif not yaml_path.is_file():
            raise InputError(f"{io_path}: the model has no configuration, but {config!r}")
    if yaml_path.is_file():
        found.append(_context(yaml_path, _read_yaml(yaml_path)))
    if pickled and not found:
        raise InputError(
            f"{io_path}: the configuration is in the pickle {folder.context / pickled}, which is not opened because a "
            f"pickle can run code, and there is no {MODEL_YAML} that says it in text; load the checkpoint with NeMo "
            "2.1 or later and save it again"
        )
    if not found:
        raise InputError(f"{folder.context}: holds neither {IO_JSON} nor {MODEL_YAML}; copy the whole checkpoint again")
    return found[0] if len(found) == 1 else _merged(*found)


def _merged(first: ModelContext, second: ModelContext) -> ModelContext:
    """`first`, with what only `second` says.

    Raises:
        InputError: Naming a value that is one thing here and another there.
    """
    for what in ("model_class", "config_class"):
        one, other = getattr(first, what), getattr(second, what)
        if one != other:
            raise InputError(f"{first.source}: {what} is {one}, but {other} in {second.source.name}")
    for key in sorted(first.values.keys() & second.values.keys()):
        one, other = _comparable(first.values[key]), _comparable(second.values[key])
        if one is not ... and other is not ... and one != other:
            raise InputError(
                f"{first.source}: {key} is {one!r}, but {other!r} in {second.source.name}; make them agree with what "
                "the weights were trained with"
            )
    return ModelContext(
        first.source,
        first.model_class,
        first.config_class,
        {**second.values, **first.values},
        first.tokenizer,
        first.transform,
    )


def _comparable(value: Any) -> Any:
    """A plain value; ``...`` for others, which the two files spell differently."""
    if isinstance(value, list):
        return value if all(_comparable(item) is not ... for item in value) else ...
    return value if value is None or isinstance(value, (bool, int, float, str)) else ...


def _context(source: Path, model: Any) -> ModelContext:
    config = model.arguments.get("config") if isinstance(model, Call) else None
    if not isinstance(config, Call):
        raise InputError(f"{source}: does not describe a model with a configuration")
    return ModelContext(
        source,
        model.target,
        config.target,
        config.arguments,
        model.arguments.get("tokenizer"),
        model.arguments.get("model_transform"),
    )


def _read_yaml(path: Path) -> Any:
    try:
        return _from_yaml(yaml.safe_load(path.read_text()))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as plain YAML: {error}") from error


def _from_yaml(value: Any) -> Any:
    """Values with NeMo's spelling of objects (``_target_``) as `Call`, `Symbol` and `Opaque`."""
    if isinstance(value, list):
        return [_from_yaml(item) for item in value]
    if not isinstance(value, dict):
        return value
    items = {key: _from_yaml(item) for key, item in value.items() if key not in ("_target_", "_call_", "_partial_")}
    if "_target_" not in value:
        return items
    target = str(value["_target_"])
    if value.get("_call_") is False:
        return Symbol(target)
    # `_call_: true` stands for an object of which only the class is known.
    return Opaque(target) if "_call_" in value else Call(target, items)
