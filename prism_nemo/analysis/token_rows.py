"""Texts as rows of token ids: held-out sources of built data, or files of text with a tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from prism_nemo.data.documents import read_unit
from prism_nemo.data.held_out import HeldOut
from prism_nemo.data.mixture import Input
from prism_nemo.data.tokenizer import Tokenizer
from prism_nemo.data.units import units_of
from prism_nemo.errors import InputError
from prism_nemo.evaluation.held_out_loss import held_out_sources

_LONGEST = 1 << 30  # bytes of a document


@dataclass(frozen=True)
class TokenRows:
    """One input.

    Attributes:
        name: In results.
        rows: Token ids of each text, at least 1 each; lengths may differ.
    """

    name: str
    rows: list[list[int]]


def held_out_inputs(data: str | Path, sources: Sequence[str], texts: int, seq_length: int) -> list[TokenRows]:
    """Evenly spaced rows of sources of built data, `texts` of each.

    Args:
        data: Folder of built data.
        sources: Names in it; if empty, all sources of weight 0.
        texts: Rows of each.
        seq_length: Tokens of a row.

    Raises:
        InputError: As `HeldOut`; or no source has weight 0.
    """
    names = list(sources) or held_out_sources(data)
    return [TokenRows(name, HeldOut(data, name, seq_length, texts).text()[0].tolist()) for name in names]


def file_inputs(files: Sequence[str], tokenizer: Tokenizer, texts: int, seq_length: int) -> list[TokenRows]:
    """The first texts of files, of each at most `texts`.

    A record of a JSONL or Parquet file (field ``text``) is a text, cut after `seq_length` tokens. A plain file is one
    long text and is cut into rows of `seq_length`, the rest left out unless it is all there is.

    Args:
        files: One input for each.
        tokenizer: The models'.
        texts: At most so many of each file.
        seq_length: Most tokens of a row.

    Raises:
        InputError: For a file that cannot be read or holds no text, or two files of one name.
    """
    names = [Path(file).stem for file in files]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"texts: two files are called {name}; results would not tell them apart, rename one")
    return [
        TokenRows(name, _rows_of(file, tokenizer, texts, seq_length)) for name, file in zip(names, files, strict=True)
    ]


def _rows_of(file: str, tokenizer: Tokenizer, texts: int, seq_length: int) -> list[list[int]]:
    if not Path(file).is_file():
        raise InputError(f"{file}: no such file")
    item = Input([file])
    rows: list[list[int]] = []
    for unit in units_of(item):
        if unit.kind == "tokens":
            raise InputError(f"{file}: holds tokens; name it as a source of built data, or give a file of text")
        for document in read_unit(unit, item, _LONGEST):
            if document.problem is not None:
                raise InputError(f"{file}:{document.line}: {document.problem.message}")
            ids = tokenizer.encode(document.text or "")
            if unit.kind == "text" and len(ids) > seq_length:
                rows += [ids[i : i + seq_length] for i in range(0, len(ids) - seq_length + 1, seq_length)]
            elif ids:
                rows.append(ids[:seq_length])
            if len(rows) >= texts:
                return rows[:texts]
    if not rows:
        raise InputError(f"{file}: holds no text")
    return rows


def check_rows(inputs: Sequence[TokenRows], vocab_size: int, positions: int, model: str, least: int) -> None:
    """Refuse rows that a model cannot read.

    Args:
        inputs: The rows.
        vocab_size: Of the model.
        positions: Most tokens that it reads.
        model: For messages.
        least: Fewest texts of an input.

    Raises:
        InputError: Naming the input.
    """
    for item in inputs:
        if len(item.rows) < least:
            raise InputError(f"input {item.name}: {len(item.rows)} texts, at least {least} are needed; add text")
        for row in item.rows:
            if not 0 <= min(row) <= max(row) < vocab_size:
                raise InputError(
                    f"input {item.name}: a token outside the vocabulary of {model} ({vocab_size}); use the tokenizer "
                    "that the model was trained with"
                )
            if len(row) > positions:
                raise InputError(
                    f"input {item.name}: {len(row)} tokens, but {model} reads {positions}; lower seq_length"
                )


def equal_length_batches(rows: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Rows in batches without padding: only rows of equal length stand together, the longest first.

    Padding is what makes batches wrong: a Mamba mixer carries it in its state to every later token (padded batches
    gave the hybrids of the study CKA near 0.1), and a mean over tokens counts it. Rows of equal length share nothing:
    attention, convolution and scan begin anew in each row.

    Args:
        rows: Token ids.
        batch_tokens: Most tokens of a batch, but always one row.

    Yields:
        Places in `rows`, and their tokens [batch, length] int64.
    """
    by_length: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(place)
    for length in sorted(by_length, reverse=True):
        size = max(1, batch_tokens // length)
        for first in range(0, len(by_length[length]), size):
            places = by_length[length][first : first + size]
            yield places, torch.tensor([list(rows[i]) for i in places], dtype=torch.int64)
