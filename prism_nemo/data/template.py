"""From a record to the text of a document: one field, a template over fields, or the turns of a conversation."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from typing import Any

from prism_nemo.data.expression import FieldError, field_of
from prism_nemo.errors import InputError

Render = Callable[[Mapping[str, Any]], str]

# The two spellings of conversations on the Hub: role/content (OpenAI) and from/value (ShareGPT).
_ROLE_KEYS, _TEXT_KEYS = ("role", "from"), ("content", "value")
_PREFIXES = {
    "user": "User:",
    "human": "User:",
    "assistant": "Assistant:",
    "gpt": "Assistant:",
    "system": "System:",
}


def render_field(name: str) -> Render:
    """Returns a function that takes the text of one field."""
    return lambda record: _text(record, name)


def render_template(template: str, where: str = "template") -> tuple[Render, list[str]]:
    r"""Returns a function that fills a template such as `"{question}\n{answer}"`, and the fields that it reads.

    Braces around a (dotted) field name are replaced by its text; `{{` and `}}` are braces. Nothing else of Python's
    format strings is understood: no indices, attributes, conversions or widths.

    Raises:
        InputError: The template is not of this form, or names no field.
    """
    pieces: list[tuple[str, str | None]] = []
    try:
        for literal, name, spec, conversion in string.Formatter().parse(template):
            if name is not None and (spec or conversion or not _is_field_name(name)):
                raise ValueError(f"{{{name}}} is not a field name in braces")
            pieces.append((literal, name))
    except ValueError as err:
        raise InputError(f"{where}: {template!r}: {err}; write field names in braces, and {{{{ for a brace.") from None
    names = list(dict.fromkeys(name for _, name in pieces if name is not None))
    if not names:
        raise InputError(f"{where}: {template!r} names no field, so every document would be the same.")

    def render(record: Mapping[str, Any]) -> str:
        return "".join(literal + ("" if name is None else _text(record, name)) for literal, name in pieces)

    return render, names


def render_turns(name: str, speakers: bool = True) -> Render:
    """Returns a function that writes a conversation as lines of `User: ...` and `Assistant: ...`.

    The turns are joined by one line break, as in the study; without `speakers` only their texts are, which is the
    study's form of questions with answers. Roles `user`/`human`, `assistant`/`gpt` and `system` are
    known, under the keys `role`/`from`; texts under `content`/`value`.
    """

    def render(record: Mapping[str, Any]) -> str:
        turns = field_of(record, name)
        if not isinstance(turns, list):
            raise FieldError(f"field {name!r} must be a list of turns, found {type(turns).__name__}")
        return "\n".join(_turn(turn, f"{name}[{i}]", speakers) for i, turn in enumerate(turns))

    return render


def _turn(turn: Any, where: str, speakers: bool) -> str:
    if not isinstance(turn, Mapping):
        raise FieldError(f"{where} must be a turn with a role and a text, found {type(turn).__name__}")
    role = next((turn[key] for key in _ROLE_KEYS if key in turn), None)
    text = next((turn[key] for key in _TEXT_KEYS if key in turn), None)
    prefix = _PREFIXES.get(role) if isinstance(role, str) else None
    if prefix is None:
        raise FieldError(f"{where} has the role {role!r}; known: {', '.join(_PREFIXES)}")
    if not isinstance(text, str):
        raise FieldError(f"{where} must have text under {' or '.join(_TEXT_KEYS)}, found {type(text).__name__}")
    return f"{prefix} {text}" if speakers else text


def _text(record: Mapping[str, Any], name: str) -> str:
    value = field_of(record, name)
    if not isinstance(value, str):
        raise FieldError(f"field {name!r} must be text, found {type(value).__name__}")
    return value


def _is_field_name(name: str) -> bool:
    # A name may hold hyphens and spaces, as columns of real data do; brackets would be Python's indexing.
    return bool(name) and not any(sign in name for sign in "[]{}!:") and all(name.split("."))
