"""Filters as written in a mixture, `score >= 3 and judgment == 'right'`: parsed and checked, never evaluated as Python.

The text is parsed into a syntax tree of which only comparisons, `and`, `or`, `not`, `in`, numbers, strings, lists,
True, False, None and field names (dotted for nested fields) are let through. There are no calls and no look-ups of
attributes of Python objects, so a mixture from somebody else can leave out documents and nothing more.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from prism_nemo.errors import InputError

Value = Callable[[Mapping[str, Any]], Any]

_MOST_CHARACTERS = 2000
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda left, right: left in right,
    ast.NotIn: lambda left, right: left not in right,
}


class FieldError(Exception):
    """A record cannot be judged: it lacks a field, or holds something of a type that does not compare."""


class Expression:
    """A filter. Calling it with a record says whether to keep it.

    Attributes:
        text: As written.
        fields: The fields that it reads, in the order of their first mention.
    """

    def __init__(self, text: str, where: str = "filter") -> None:
        """Parses.

        Args:
            text: For example `score >= 3 and language in ['python', 'cpp']`.
            where: Starts the message of an error: the file and key that hold the text.

        Raises:
            InputError: It is not such an expression; the message has the part that is not.
        """
        self.text = text
        self._where = where
        self.fields: list[str] = []
        if len(text) > _MOST_CHARACTERS:
            raise InputError(f"{where}: the expression has {len(text)} characters, the most is {_MOST_CHARACTERS}.")
        try:
            tree = ast.parse(text.strip(), mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as err:
            raise InputError(f"{where}: {text!r} is not an expression over fields: {err}.") from None
        self._keep = self._compile(tree.body)

    def __call__(self, record: Mapping[str, Any]) -> bool:
        """Returns whether the record is kept.

        Raises:
            FieldError: A missing field, values that do not compare, or a result that is neither true nor false.
        """
        try:
            result = self._keep(record)
        except TypeError as err:
            raise FieldError(f"filter {self.text!r}: {err}") from None
        if not isinstance(result, bool):
            raise FieldError(f"filter {self.text!r} gives {result!r}, which is neither true nor false")
        return result

    def _compile(self, node: ast.expr) -> Value:
        match node:
            case ast.Constant(value=bool() | int() | float() | str() | None as value):
                return lambda record: value
            case ast.List() | ast.Tuple() | ast.Set():
                items = [self._compile(item) for item in node.elts]
                return lambda record: [item(record) for item in items]
            case ast.Name() | ast.Attribute():
                return self._field(node)
            case ast.UnaryOp(op=ast.Not()):
                inner = self._compile(node.operand)
                return lambda record: not _truth(inner(record))
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
                return lambda record: -number
            case ast.BoolOp():
                parts = [self._compile(value) for value in node.values]
                decide = all if isinstance(node.op, ast.And) else any
                # A generator, so that `lang == 'en' and score > 3` does not ask for a score that is not there.
                return lambda record: decide(_truth(part(record)) for part in parts)
            case ast.Compare():
                return self._comparison(node)
        raise InputError(
            f"{self._where}: {ast.unparse(node)!r} in {self.text!r} is not allowed; a filter has field names, numbers, "
            "strings, lists, comparisons, in, and, or, not."
        )

    def _comparison(self, node: ast.Compare) -> Value:
        terms = [self._compile(term) for term in (node.left, *node.comparators)]
        signs = []
        for sign in node.ops:
            if type(sign) not in _COMPARISONS:
                raise InputError(f"{self._where}: `is` in {self.text!r} is not allowed; write == or !=.")
            signs.append(_COMPARISONS[type(sign)])

        def compare(record: Mapping[str, Any]) -> bool:
            left = terms[0](record)
            for sign, term in zip(signs, terms[1:], strict=True):
                right = term(record)
                if not sign(left, right):
                    return False
                left = right
            return True

        return compare

    def _field(self, node: ast.expr) -> Value:
        parts: list[str] = []
        inner = node
        while isinstance(inner, ast.Attribute):
            parts.insert(0, inner.attr)
            inner = inner.value
        if not isinstance(inner, ast.Name):
            raise InputError(f"{self._where}: {ast.unparse(node)!r} in {self.text!r} is not a field name.")
        name = ".".join([inner.id, *parts])
        if name not in self.fields:
            self.fields.append(name)
        return lambda record: field_of(record, name)


def field_of(record: Mapping[str, Any], name: str) -> Any:
    """Returns a field by name; `a.b` is the field of that very name, or else the field `b` inside of `a`.

    Raises:
        FieldError: There is none; the message has the fields that there are.
    """
    if name in record:
        return record[name]
    value: Any = record
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise FieldError(f"has no field {name!r}; its fields: {', '.join(map(str, record)) or 'none'}")
        value = value[part]
    return value


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} stands where true or false is expected")
    return value
