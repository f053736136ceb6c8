"""From a record to the text of a document: one field, a template over fields, or the turns of a conversation.

A document is rendered as pieces, and each piece says which field or role it comes from. So the text is the same whether
or not some of the pieces alone are trained on: the loss mask is made from where these pieces lie in it.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Collection, Mapping
from typing import Any

from prism_nemo.data.expression import FieldError, field_of
from prism_nemo.errors import InputError

Piece = tuple[str, str | None]
"""Some text, and the field or role (`user`, `assistant`, `system`) that it comes from; None for what lies between."""

Render = Callable[[Mapping[str, Any]], list[Piece]]

# The two spellings of conversations on the Hub: role/content (OpenAI) and from/value (ShareGPT).
_ROLE_KEYS, _TEXT_KEYS = ("role", "from"), ("content", "value")
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
_PREFIXES = {"user": "User: ", "assistant": "Assistant: ", "system": "System: "}


def text_of(pieces: list[Piece]) -> str:
    """Returns the text of a document."""
    return "".join([text for text, _ in pieces])


def spans_of(pieces: list[Piece], names: Collection[str]) -> list[tuple[int, int]]:
    """Returns where the text of the named fields or roles lies in a document.

    Returns:
        First character and one past the last of each such piece that has any, in order.
    """
    spans, at = [], 0
    for text, name in pieces:
        if text and name in names:
            spans.append((at, at + len(text)))
        at += len(text)
    return spans


def role_of(name: str) -> str | None:
    """Returns the role that a name such as `gpt` stands for, or None."""
    return _ROLES.get(name)


def role_names() -> list[str]:
    """Returns the names of roles that are understood."""
    return list(_ROLES)


def render_field(name: str) -> Render:
    """Returns a function that takes the text of one field as the only piece."""
    return lambda record: [(_text(record, name), name)]


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

    def render(record: Mapping[str, Any]) -> list[Piece]:
        filled: list[Piece] = []
        for literal, name in pieces:
            if literal:
                filled.append((literal, None))
            if name is not None:
                filled.append((_text(record, name), name))
        return filled

    return render, names


def render_turns(name: str, speakers: bool = True) -> Render:
    """Returns a function that writes a conversation as lines of `User: ...` and `Assistant: ...`.

    The turns are joined by one line break, as in the study; without `speakers` only their texts are, which is the
    study's form of questions with answers. Roles `user`/`human`, `assistant`/`gpt` and `system` are known, under the
    keys `role`/`from`; texts under `content`/`value`. The text of a turn is a piece of its role; who speaks is not.
    """

    def render(record: Mapping[str, Any]) -> list[Piece]:
        turns = field_of(record, name)
        if not isinstance(turns, list):
            raise FieldError(f"field {name!r} must be a list of turns, found {type(turns).__name__}")
        pieces: list[Piece] = []
        for i, turn in enumerate(turns):
            role, text = _turn(turn, f"{name}[{i}]")
            between = ("\n" if i else "") + (_PREFIXES[role] if speakers else "")
            pieces += [(between, None), (text, role)]
        return pieces

    return render


def _turn(turn: Any, where: str) -> tuple[str, str]:
    if not isinstance(turn, Mapping):
        raise FieldError(f"{where} must be a turn with a role and a text, found {type(turn).__name__}")
    named = next((turn[key] for key in _ROLE_KEYS if key in turn), None)
    text = next((turn[key] for key in _TEXT_KEYS if key in turn), None)
    role = _ROLES.get(named) if isinstance(named, str) else None
    if role is None:
        raise FieldError(f"{where} has the role {named!r}; known: {', '.join(_ROLES)}")
    if not isinstance(text, str):
        raise FieldError(f"{where} must have text under {' or '.join(_TEXT_KEYS)}, found {type(text).__name__}")
    return role, text


def _text(record: Mapping[str, Any], name: str) -> str:
    value = field_of(record, name)
    if not isinstance(value, str):
        raise FieldError(f"field {name!r} must be text, found {type(value).__name__}")
    return value


def _is_field_name(name: str) -> bool:
    # A name may hold hyphens and spaces, as columns of real data do; brackets would be Python's indexing.
    return bool(name) and not any(sign in name for sign in "[]{}!:") and all(name.split("."))
