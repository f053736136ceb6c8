"""Strings of a configuration as they were written.

YAML gives a type to every word: ``off`` and ``no`` are False, ``0123`` is 83 and ``2026_11_28`` is 20261128. Where a
field is a string, such a value would come back as another string ('False', '83') than the one that was given.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar

import yaml
from omegaconf import OmegaConf


class _TextLoader(yaml.SafeLoader):
    """Leaves every plain word as it is written; only ``<<``, which merges mappings, keeps its meaning."""

    # YAML looks for the meaning of a plain word by its first character.
    yaml_implicit_resolvers: ClassVar = {"<": [("tag:yaml.org,2002:merge", re.compile("^<<$"))]}


def override_values(override: str, schema: Any) -> dict[str, Any]:
    """The nested values that ``dotted.key=value`` stands for.

    A string is the text behind the ``=``, unless it is quoted; ``null`` is still None.

    Args:
        override: With an ``=``.
        schema: The dataclass that it is for.

    Raises:
        yaml.YAMLError: If the value is not YAML.
    """
    key, _, raw = override.partition("=")
    typed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
    text = yaml.load(raw, Loader=_TextLoader)
    if isinstance(text, str) and not raw.lstrip().startswith(("'", '"')):
        text = raw.strip()
    for name in reversed(key.split(".")):
        text = {name: text}
    return dict(_restored(schema, typed, text))


def file_values(path: Path, values: dict[str, Any], schema: Any) -> dict[str, Any]:
    """The values of a YAML file, with its strings as they are written.

    Args:
        path: The file.
        values: As YAML reads them.
        schema: The dataclass that they are for; keys that it does not have are left alone.
    """
    text = yaml.load(path.read_text(encoding="utf-8"), Loader=_TextLoader)
    return dict(_restored(schema, values, text))


def _restored(kind: Any, value: Any, text: Any) -> Any:
    """`value`, of type `kind`, with the words of `text`, which is the same read without types."""
    options = [one for one in typing.get_args(kind) if one is not NoneType]
    if len(options) == 1 and NoneType in typing.get_args(kind):  # an optional value
        kind, options = options[0], list(typing.get_args(options[0]))
    if value is None or isinstance(value, (dict, list)) != isinstance(text, (dict, list)):
        return value
    if kind is str:
        return text if isinstance(text, str) else value
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        kinds = typing.get_type_hints(kind)
        return {name: _restored(kinds.get(name), one, text.get(name)) for name, one in value.items()}
    origin = typing.get_origin(kind)
    if origin is dict and isinstance(value, dict):
        return {name: _restored(options[1], one, text.get(str(name), text.get(name))) for name, one in value.items()}
    if origin is list and isinstance(value, list) and len(value) == len(text):
        return [_restored(options[0], one, words) for one, words in zip(value, text, strict=True)]
    return value
