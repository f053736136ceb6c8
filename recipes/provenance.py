"""Values of a recipe, each with where it came from: stated by the study, inferred from it, or ours and why.

A recipe is a table of dotted field names to such values (`Values`), which `fill` turns into the dataclass that a stage
runs with. What the study states and what it leaves open can then be shown, and tested, from the same table.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

STUDY = "study"  # arXiv 2603.17074 states it
INFERRED = "inferred"  # follows from what it states
OURS = "ours"  # it gives no value, or one that this project does not have
GIVEN = "given"  # by the person who runs it
DEFAULT = "default"  # of prism_nemo/config.py; the study gives no value

ConfigType = TypeVar("ConfigType")


@dataclass(frozen=True)
class Value:
    """A value and its origin.

    Attributes:
        value: As the configuration takes it.
        origin: One of the constants of this module.
        where: Table or section of the study, or the reason.
    """

    value: Any
    origin: str
    where: str


Values = dict[str, Value]


def study(value: Any, where: str) -> Value:
    """A value that the study states, with its table or section."""
    return Value(value, STUDY, where)


def inferred(value: Any, how: str) -> Value:
    """A value that follows from what the study states."""
    return Value(value, INFERRED, how)


def ours(value: Any, why: str) -> Value:
    """A value that the study leaves open, with our reason."""
    return Value(value, OURS, why)


def given(value: Any, where: str = "argument of the recipe") -> Value:
    """A value that the caller chose."""
    return Value(value, GIVEN, where)


def fill(schema: type[ConfigType], values: Values) -> ConfigType:
    """The configuration with these values; all others are its defaults.

    Args:
        schema: Dataclass of a stage.
        values: By field; those of a nested dataclass as ``group.field``.
    """
    config = schema(**{key: value.value for key, value in values.items() if "." not in key})
    groups: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        group, separator, name = key.partition(".")
        if separator:
            groups.setdefault(group, {})[name] = value.value
    filled = {group: replace(getattr(config, group), **inner) for group, inner in groups.items()}
    return replace(config, **filled)  # type: ignore[type-var]


@dataclass(frozen=True)
class Line:
    """A field of a resolved configuration, with its origin.

    Attributes:
        key: Dotted name.
        value: Resolved.
        origin: See `Value`.
        where: See `Value`; for a default what the field's comment says.
    """

    key: str
    value: Any
    origin: str
    where: str


def explain(config: Any, values: Values) -> list[Line]:
    """Every field of a configuration and where its value came from.

    Args:
        config: Resolved, with overrides.
        values: Of the recipe that it was made by; a field that has another value now was overridden.
    """
    lines: list[Line] = []
    for key, value, comment in _leaves(config):
        known = values.get(key)
        if known is not None and known.value == value:
            lines.append(Line(key, value, known.origin, known.where))
        elif known is not None:
            lines.append(Line(key, value, GIVEN, f"override; the recipe has {known.value} ({known.where})"))
        elif value == _default(type(config), key):
            lines.append(Line(key, value, DEFAULT, comment))
        else:
            lines.append(Line(key, value, GIVEN, "override"))
    return lines


def _default(schema: Any, key: str) -> Any:
    """The default of a dotted field; of one without a default, something that equals nothing."""
    group, separator, name = key.partition(".")
    found = {f.name: f for f in fields(schema)}[group]
    if found.default_factory is not dataclasses.MISSING:
        value = found.default_factory()
        return getattr(value, name) if separator else value
    return found.default


def _leaves(config: Any, prefix: str = "") -> list[tuple[str, Any, str]]:
    comments = _comments(type(config))
    found: list[tuple[str, Any, str]] = []
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            found += _leaves(value, f"{prefix}{f.name}.")
        else:
            found.append((f"{prefix}{f.name}", value, comments.get(f.name, "")))
    return found


def _comments(schema: type) -> dict[str, str]:
    """What is written behind the fields of a dataclass: the reasons are there already, in one place."""
    pattern = re.compile(r"^    (\w+): [^#\n]*#\s*(.+)$", re.MULTILINE)
    return {name: comment.strip() for name, comment in pattern.findall(inspect.getsource(schema))}
