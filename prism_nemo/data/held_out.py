"""Validation rows that are the same whatever the run: evenly spaced over one source, in stored order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from prism_nemo.data.indexed import read_index
from prism_nemo.data.manifest import load_manifest
from prism_nemo.data.packing import PIECE
from prism_nemo.data.samples import Batch, RowWriter, TokenFile
from prism_nemo.errors import InputError


class HeldOut:
    """Rows of a source, usually one of weight 0.

    Args:
        manifest_dir: The folder that `data build` wrote.
        source: Name of the source.
        seq_length: Tokens per row.
        rows: Number of rows; they do not overlap, except that a last label may be the next row's first token.
        isolate: Whether documents are kept apart, as in training.

    Raises:
        InputError: Unknown source, a number below 1, or a source with too few tokens.
    """

    def __init__(self, manifest_dir: str | Path, source: str, seq_length: int, rows: int, isolate: bool = True) -> None:
        if seq_length < 1 or rows < 1:
            raise InputError(f"held-out rows: seq_length {seq_length} and rows {rows} must be at least 1.")
        manifest = load_manifest(manifest_dir)
        item = manifest.source(source)
        if item.tokens < rows * seq_length + 1:
            raise InputError(
                f"source {source!r}: {rows} held-out rows of {seq_length} tokens need {rows * seq_length + 1} tokens, "
                f"it has {item.tokens}; ask for at most {max(0, (item.tokens - 1) // seq_length)} rows or add text."
            )
        last = item.tokens - seq_length - 1
        self._starts = [round(last * row / max(1, rows - 1)) for row in range(rows)]
        _, lengths, _, _ = read_index(manifest.prefix(source) + ".idx")
        self._ends = np.cumsum(lengths, dtype=np.int64)
        self._seq_length, self._isolate, self._padding = seq_length, isolate, manifest.tokenizer.eos_id
        self._file = TokenFile(manifest, item)

    def batch(self, first: int, count: int) -> Batch:
        """Returns rows `first` to `first + count - 1`; see `RowWriter.batch`."""
        writer = RowWriter(count, self._seq_length, self._isolate, self._padding)
        for row, start in enumerate(self._starts[first : first + count]):
            writer.write(row, self._file, self._pieces(start, start + self._seq_length))
        return writer.batch()

    def text(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns all rows as running text, `(tokens, labels)`, each (rows, seq_length) int64; borders are ignored."""
        read = [self._file.tokens[start : start + self._seq_length + 1] for start in self._starts]
        text = torch.from_numpy(np.stack(read).astype(np.int64))
        return text[:, :-1].contiguous(), text[:, 1:].contiguous()

    def _pieces(self, start: int, stop: int) -> np.ndarray:
        """The documents between two places of the `.bin`, which may begin and end inside of one."""
        inside = slice(np.searchsorted(self._ends, start, "right"), np.searchsorted(self._ends, stop, "left") + 1)
        ends = np.minimum(self._ends[inside], stop)
        pieces = np.empty(len(ends), PIECE)
        pieces["offset"] = [start, *ends[:-1]]
        pieces["length"] = np.diff(ends, prepend=start)
        pieces["goes_on"] = self._ends[inside] > stop
        return pieces


def held_out_rows(
    manifest_dir: str | Path, source: str, seq_length: int, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `HeldOut(...).text()`."""
    return HeldOut(manifest_dir, source, seq_length, rows).text()
