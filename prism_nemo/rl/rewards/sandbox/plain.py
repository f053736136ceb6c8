"""Values as JSON and back, so that they cross the wall of a sandbox as data and never as objects with behaviour.

Used on both sides; it must import nothing but the standard library. An object of a class that overrides ``__eq__`` or
``__len__`` arrives as what it holds, or not at all.
"""

from __future__ import annotations

import sys
from _collections import deque  # where `collections`, which takes some milliseconds to import, has it from

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_LISTS: dict[str, type] = {"tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque}
_NUMBERS = {"Decimal": "decimal", "Fraction": "fractions"}  # class -> module, imported when first met


class NotPlain(TypeError):
    """The value is not plain data."""


def encode(value: Any, other: Any = None, depth: int = 100) -> Any:
    """What `json` can write for a value.

    None, truth values, numbers, strings and bytes; lists, tuples, sets, dicts and deques of them. Values of subclasses
    are written as their base, read with the base's own methods: a class may claim to be what it does not hold.

    Args:
        value: Any.
        other: Called with what is not plain; returns what to write.
        depth: Of nesting that is followed.

    Raises:
        NotPlain: For other values, if there is no `other`.
    """
    if depth <= 0:
        raise NotPlain("nested too deeply")
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        return {"int": hex(int.__index__(value))} if int.bit_length(value) > 1000 else int.__index__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list):
        return [encode(item, other, depth - 1) for item in list.__iter__(value)]
    if isinstance(value, dict):
        pairs = dict.items(value)
        return {"dict": [[encode(k, other, depth - 1), encode(v, other, depth - 1)] for k, v in pairs]}
    for name, kind in _LISTS.items():
        if isinstance(value, kind):
            return {name: [encode(item, other, depth - 1) for item in kind.__iter__(value)]}  # type: ignore[attr-defined]
    if isinstance(value, bytes):
        return {"bytes": bytes.hex(value)}
    if isinstance(value, complex):
        return {"complex": [complex.real.__get__(value), complex.imag.__get__(value)]}
    for name, module in _NUMBERS.items():
        if module in sys.modules and type(value) is getattr(sys.modules[module], name, None):
            return {name: str(value)}
    if other is None:
        raise NotPlain(f"a value of type {type(value).__name__} is not plain data")
    return other(value)


def decode(data: Any, other: Any = None) -> Any:
    """The value that was encoded.

    Args:
        data: As `json` read it.
        other: Called with what `encode` got from its own `other`.

    Raises:
        NotPlain: For what `encode` does not write.
    """
    if isinstance(data, list):
        return [decode(item, other) for item in data]
    if not isinstance(data, dict):
        return data
    try:
        ((name, inner),) = data.items()
        if name == "dict":
            return {decode(k, other): decode(v, other) for k, v in inner}
        if name in _LISTS:
            return _LISTS[name](decode(item, other) for item in inner)
        if name == "int":
            return int(inner, 16)
        if name == "bytes":
            return bytes.fromhex(inner)
        if name == "complex":
            return complex(*inner)
        if name in _NUMBERS:
            return getattr(__import__(_NUMBERS[name]), name)(inner)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise NotPlain(f"not an encoded value: {error}") from None
    if other is None:
        raise NotPlain(f"not an encoded value: '{name}'")
    return other(data)
