"""Reading a plan's samples from the token files of a build: memory-mapped, straight into the arrays of a batch."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from prism_nemo.data.indexed import read_index
from prism_nemo.data.manifest import BuiltSource, Manifest
from prism_nemo.data.packing import Rows, pack
from prism_nemo.data.plan import FORMAT, DataPlan, Drawn, epochs_needed
from prism_nemo.errors import PrismError

Batch = dict[str, torch.Tensor]


class TokenFile:
    """The tokens of a source, and which of them are trained on.

    Attributes:
        tokens: Memory-mapped, (tokens,).
        loss: Memory-mapped, 0 or 1 per token, or None where all are trained on.
    """

    def __init__(self, manifest: Manifest, item: BuiltSource) -> None:
        prefix = manifest.prefix(item.name)
        # Views as plain arrays: every slice of a memmap object costs several microseconds.
        self.tokens = np.memmap(prefix + ".bin", item.dtype, "r").view(np.ndarray)
        self.loss: np.ndarray | None = None
        if item.loss_tokens is not None:
            self.loss = np.memmap(prefix + ".loss", np.uint8, "r").view(np.ndarray)


class RowWriter:
    """Arrays of `rows` x `seq_length`, filled row by row.

    Args:
        rows: Rows of the batch.
        seq_length: Tokens of a row.
        isolate: Whether documents are kept apart: positions start anew at each, the last token of a document predicts
            nothing, and `cu_seqlens` tells attention where they begin.
        padding: Token after the end of a row's text.
    """

    def __init__(self, rows: int, seq_length: int, isolate: bool, padding: int) -> None:
        shape = (rows, seq_length)
        self._tokens, self._labels = np.empty(shape, np.int64), np.empty(shape, np.int64)
        self._loss_mask, self._positions = np.empty(shape, np.float32), np.empty(shape, np.int64)
        self._isolate, self._padding = isolate, padding
        self._bounds: list[int] = []
        self._text = np.zeros(rows, np.int64)

    def write(self, row: int, file: TokenFile, pieces: np.ndarray) -> None:
        """Fills a row.

        Args:
            row: Which.
            file: Where the tokens are.
            pieces: Of type `PIECE`; what they leave of the row is padding.
        """
        tokens, labels, mask = self._tokens[row], self._labels[row], self._loss_mask[row]
        positions, size = self._positions[row], tokens.shape[0]
        begin = 0
        ends = []
        for offset, length, goes_on in pieces.tolist():
            end = begin + length
            tokens[begin:end] = file.tokens[offset : offset + length]
            if file.loss is not None:
                mask[begin:end] = file.loss[offset : offset + length]
            if self._isolate:
                self._begin(row, begin, end)
            ends.append((end - 1, offset + length if goes_on else None))
            begin = end
        self._text[row] = begin
        tokens[begin:] = self._padding
        if not self._isolate:
            positions[:] = np.arange(size)
        elif begin < size:
            self._begin(row, begin, size)

        labels[:-1] = tokens[1:]
        if file.loss is None:
            mask[:] = 1.0
        else:
            mask[:-1] = mask[1:]  # trained on or not: the token that is predicted
        for last, following in ends:
            if following is not None:
                labels[last] = file.tokens[following]
                mask[last] = 1.0 if file.loss is None else file.loss[following]
            elif self._isolate or last == begin - 1:
                labels[last], mask[last] = 0, 0.0  # nothing follows that its document could predict
        labels[begin:], mask[begin:] = 0, 0.0

    def _begin(self, row: int, begin: int, end: int) -> None:
        self._positions[row, begin:end] = np.arange(end - begin)
        self._bounds.append(row * self._tokens.shape[1] + begin)

    def batch(self) -> Batch:
        """Returns the batch: `tokens`, `labels`, `position_ids` (int64), `loss_mask` (float32), and `text_tokens`
        (rows,): how much of each row is not padding.

        Isolated documents come as one row of rows x seq_length tokens, (1, rows * seq_length), with `cu_seqlens`
        (documents + 1,) int32, as Megatron's packed sequences want it; padding at the end of a row is a document of its
        own. Otherwise the arrays are (rows, seq_length).
        """
        arrays = {
            "tokens": self._tokens,
            "labels": self._labels,
            "loss_mask": self._loss_mask,
            "position_ids": self._positions,
        }
        batch = {name: torch.from_numpy(values) for name, values in arrays.items()}
        if self._isolate:
            batch = {name: values.view(1, -1) for name, values in batch.items()}
            batch["cu_seqlens"] = torch.tensor([*self._bounds, self._tokens.size], dtype=torch.int32)
        batch["text_tokens"] = torch.from_numpy(self._text)
        return batch


class Samples:
    """The samples of a plan.

    Args:
        manifest: Of the build.
        plan: The order.
        index_dir: Where the rows of each epoch are kept, as files that are memory-mapped; all processes must see it.
        isolate: As in `RowWriter`.

    Attributes:
        plan: The order.
        names: The sources of the newest segment.
    """

    def __init__(self, manifest: Manifest, plan: DataPlan, index_dir: str | Path, isolate: bool = True) -> None:
        self.plan, self.names = plan, tuple(drawn.name for drawn in plan.sources)
        self._manifest, self._index_dir, self._isolate = manifest, Path(index_dir), isolate
        self._number = {drawn.prefix: i for i, drawn in enumerate(plan.sources)}
        self._files: dict[str, TokenFile] = {}
        self._epochs: dict[tuple[str, int], Rows] = {}

    def prepare(self, first_sample: int, end_sample: int, say: Callable[[str], None] = lambda line: None) -> None:
        """Writes the rows of every epoch that these samples read, where they are not there yet. One process calls it.

        Args:
            first_sample: The next sample.
            end_sample: One past the last.
            say: Told what is being made: a large source takes a minute.

        Raises:
            PrismError: They cannot be written.
        """
        for drawn in self.plan.sources:
            for epoch in epochs_needed(self.plan, first_sample, end_sample).get(drawn.prefix, range(0)):
                folder = self._folder(drawn, epoch)
                if self._open(folder, drawn) is None:
                    say(f"data: packing {drawn.name}, epoch {epoch + 1}, into rows of {self.plan.seq_length} tokens")
                    try:
                        self._write(folder, drawn, epoch)
                    except OSError as error:
                        raise PrismError(f"{folder}: the index cannot be written: {error.strerror}") from error

    def rows(self, first: int, count: int) -> Batch:
        """Returns consecutive samples as a batch; see `RowWriter.batch`.

        Beside the writer's arrays it has `sources` (count,) int64: the place of each row's source in `names`.

        Args:
            first: The first sample.
            count: How many.

        Raises:
            PrismError: An epoch that `prepare` was not asked for, or a source that is not in the build any more.
        """
        writer = RowWriter(count, self.plan.seq_length, self._isolate, self._manifest.tokenizer.eos_id)
        sources = torch.empty(count, dtype=torch.int64)
        for row in range(count):
            drawn, number = self.plan.locate(first + row)
            if drawn.prefix not in self._number:
                raise PrismError(
                    f"sample {first + row} is from source {drawn.name!r}, which this run no longer draws from"
                )
            sources[row] = self._number[drawn.prefix]
            epoch, place = divmod(number, drawn.rows_per_epoch)
            rows = self._epoch(drawn, epoch)
            writer.write(row, self._file(drawn), rows.pieces[int(rows.first[place]) : int(rows.first[place + 1])])
        return {**writer.batch(), "sources": sources}

    def _file(self, drawn: Drawn) -> TokenFile:
        if drawn.prefix not in self._files:
            self._files[drawn.prefix] = TokenFile(self._manifest, self._manifest.source(drawn.name))
        return self._files[drawn.prefix]

    def _epoch(self, drawn: Drawn, epoch: int) -> Rows:
        key = drawn.prefix, epoch
        if key not in self._epochs:
            rows = self._open(self._folder(drawn, epoch), drawn)
            if rows is None:
                raise PrismError(
                    f"{self._folder(drawn, epoch)}: the rows of {drawn.name}, epoch {epoch + 1}, are missing or "
                    "damaged; run the same command again to make them anew"
                )
            self._epochs[key] = rows
        return self._epochs[key]

    def _folder(self, drawn: Drawn, epoch: int) -> Path:
        plan = self.plan
        return self._index_dir / f"{drawn.prefix}-{plan.packing}-{plan.seq_length}-v{FORMAT}-{plan.seed}-{epoch}"

    def _write(self, folder: Path, drawn: Drawn, epoch: int) -> None:
        """The shuffle is numpy's legacy generator, whose stream is frozen: a newer numpy must not change the order."""
        _, lengths, _, _ = read_index(self._manifest.prefix(drawn.name) + ".idx")
        fingerprint = int(self._manifest.source(drawn.name).fingerprint[:16], 16)
        seeds = np.random.SeedSequence([self.plan.seed, fingerprint, epoch])
        rng = np.random.RandomState(np.random.MT19937(seeds))
        rows = pack(self.plan.packing, lengths, self.plan.seq_length, rng)
        temporary = folder.with_name(f".tmp-{os.getpid()}-{folder.name}")
        for old in (folder, temporary):
            shutil.rmtree(old, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            np.save(temporary / "first.npy", rows.first)
            np.save(temporary / "pieces.npy", rows.pieces)
            # Read before anything is opened: a file cut short by a power cut is noticed.
            (temporary / "sizes.json").write_text(json.dumps([len(rows.first), len(rows.pieces)]))
            temporary.rename(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    @staticmethod
    def _open(folder: Path, drawn: Drawn) -> Rows | None:
        try:
            sizes = json.loads((folder / "sizes.json").read_text())
            arrays = [np.load(folder / f"{name}.npy", mmap_mode="r").view(np.ndarray) for name in Rows._fields]
        except (OSError, ValueError):
            return None
        rows = Rows(*arrays)
        whole = [len(rows.first), len(rows.pieces)] == sizes and len(rows.first) == drawn.rows_per_epoch + 1
        return rows if whole else None
