"""Reading the documents of a unit, whatever the kind of its file.

A document that cannot be read is handed on as a `Problem`, with its file and line; the build counts it or refuses the
source. A file that is damaged as a whole (a compressed stream cut short, a Parquet column of the wrong type) is an
error.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prism_nemo.data.expression import Expression, FieldError
from prism_nemo.data.indexed import document_spans
from prism_nemo.data.json_lines import BLANK, read_lines
from prism_nemo.data.mixture import Input, loss_names
from prism_nemo.data.problem import Problem, place, too_long
from prism_nemo.data.template import Render, render_field, render_template, render_turns, spans_of, text_of
from prism_nemo.data.units import Unit, lines_before, units_of
from prism_nemo.errors import InputError


@dataclass(slots=True)
class Document:
    """One document, or why there is none.

    Attributes:
        file: Where it was read.
        line: Its line or row from 1, counted from the start of the unit (see `lines_before`); 0 for a whole file.
        text: Its text; None if it is stored as tokens, or not there.
        counted: The stretches of its text that are trained on, as `template.spans_of` gives them; None for all.
        ids: Its tokens, if it is stored as tokens.
        dropped: The filter that it failed.
        problem: Why it cannot be read.
    """

    file: str
    line: int
    text: str | None = None
    counted: list[tuple[int, int]] | None = None
    ids: np.ndarray | None = None
    dropped: str | None = None
    problem: Problem | None = None


def read_unit(unit: Unit, item: Input, max_bytes: int) -> Iterator[Document]:
    """Yields what a unit holds, in order: documents, documents that a filter drops, and problems.

    Args:
        unit: From `units_of(item)`.
        item: The input that it belongs to.
        max_bytes: A longer line or text is a problem; it is never held in memory.

    Raises:
        InputError: The file is damaged as a whole; the message says after which line.
    """
    if unit.kind == "text":
        yield from _read_texts(unit, max_bytes)
        return
    if unit.kind == "tokens":
        yield from _read_tokens(unit)
        return
    render, filters, loss = renderer(item), [Expression(text) for text in item.filter], loss_names(item)
    if unit.kind == "parquet":
        from prism_nemo.data.parquet import read_rows

        records = read_rows(unit, _columns(item, filters))
    elif unit.kind == "hub":
        from prism_nemo.data.hub import read_hub

        records = read_hub(unit)
    else:
        records = read_lines(unit, max_bytes)
    name = unit.files[0]
    for line, record in records:
        if record is BLANK:
            yield Document(name, line, "")
            continue
        yield _document(name, line, record, render, filters, loss, max_bytes)


def renderer(item: Input) -> Render:
    """Returns the function that turns a record of an input into the pieces of a document."""
    if item.template is not None:
        return render_template(item.template)[0]
    return render_turns(item.turns, item.speakers) if item.turns is not None else render_field(item.text_field)


def evaluation_records(paths: list[str]) -> Iterator[tuple[str, Any]]:
    """Yields the records of files, or the texts of text files, each with its `file:line`.

    Raises:
        InputError: Anything in them cannot be read.
    """
    for name in paths:
        for unit in units_of(Input([name])):
            if unit.kind == "text":
                records: Any = [(0, doc.problem or doc.text) for doc in _read_texts(unit, sys.maxsize)]
            elif unit.kind == "parquet":
                from prism_nemo.data.parquet import read_rows

                records = read_rows(unit, {})
            else:
                records = read_lines(unit, 1 << 30)
            for line, record in records:
                where = place(name, line + lines_before(unit) if line else 0)
                if isinstance(record, Problem):
                    raise InputError(f"{where}: {record.message}")
                yield where, record


def _document(
    file: str,
    line: int,
    record: Any,
    render: Render,
    filters: list[Expression],
    loss: set[str] | None,
    limit: int,
) -> Document:
    if isinstance(record, Problem):
        return Document(file, line, problem=record)
    if not isinstance(record, dict):
        problem = Problem("not an object", f"must be an object with fields, found {type(record).__name__}.")
        return Document(file, line, problem=problem)
    try:
        for expression in filters:
            if not expression(record):
                return Document(file, line, dropped=expression.text)
        pieces = render(record)
    except FieldError as err:
        advice = " Set `text_field`, `template` or `turns` of the source." if "has no field" in str(err) else ""
        return Document(file, line, problem=Problem("missing or wrong field", f"{err}.{advice}"))
    document = _checked(file, line, text_of(pieces), limit)
    if loss is not None:
        document.counted = spans_of(pieces, loss)
    return document


def _checked(file: str, line: int, text: str, limit: int) -> Document:
    if "\0" in text:
        problem = Problem("NUL byte", f"holds a NUL byte at character {text.index(chr(0))}; it is probably not text.")
        return Document(file, line, problem=problem)
    try:
        # JSON can write half a surrogate pair, which the tokenizer rejects without saying where.
        size = len(text) if text.isascii() else len(text.encode("utf-8"))
    except UnicodeEncodeError as err:
        problem = Problem("half a surrogate pair", f"holds half a surrogate pair ({err}); repair it.")
        return Document(file, line, problem=problem)
    if size > limit:
        return Document(file, line, problem=too_long(size, limit))
    return Document(file, line, text)


def _read_texts(unit: Unit, limit: int) -> Iterator[Document]:
    for name in unit.files:
        size = Path(name).stat().st_size
        if size > limit:
            yield Document(name, 0, problem=too_long(size, limit))
            continue
        try:
            # newline="": a file is tokenised as it stands, whatever its line ends.
            with open(name, encoding="utf-8", newline="") as stream:
                text = stream.read()
        except UnicodeDecodeError as err:
            problem = Problem("not UTF-8", f"is not UTF-8 text ({err}); convert it first.")
            yield Document(name, 0, problem=problem)
            continue
        yield _checked(name, 0, text, limit)


def _read_tokens(unit: Unit) -> Iterator[Document]:
    name = unit.files[0]
    dtype, spans = document_spans(name)
    with open(name, "rb") as stream:
        for i in range(unit.start, unit.end):
            begin, end = map(int, spans[i])
            stream.seek(begin)
            ids = np.frombuffer(stream.read(end - begin), dtype=dtype)
            yield Document(name, i - unit.start + 1, ids=ids)


def _columns(item: Input, filters: list[Expression]) -> dict[str, bool]:
    """The fields that an input reads, and whether each must hold text."""
    if item.template is not None:
        found = dict.fromkeys(render_template(item.template)[1], True)
    elif item.turns is not None:
        found = {item.turns: False}
    else:
        found = {item.text_field: True}
    for expression in filters:
        for name in expression.fields:
            found.setdefault(name, False)
    return found
