"""Dealing samples to data-parallel ranks and micro-batches, in an order that is a function of one integer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from prism_nemo.errors import InputError


class Rows(Protocol):
    """What batches are cut from; usually `Samples`."""

    def rows(self, first: int, count: int) -> dict[str, torch.Tensor]:
        """Samples `first` to `first + count - 1`."""


class BatchIterator(Iterator[dict[str, torch.Tensor]]):
    """Yields this rank's micro-batches, for ever.

    Row j of the global step that starts at `consumed_samples` is sample `consumed_samples + j`. Rank r takes rows
    `[r * gbs / dp, (r + 1) * gbs / dp)` and cuts them into micro-batches in order. So the samples of a step are the
    same whatever the number of ranks and the micro-batch size, and a run may be continued on another layout.

    Attributes:
        consumed_samples: Samples of all finished steps, over all ranks: the whole state. It moves when the last
            micro-batch of a step is handed out; a run stopped inside a step repeats it, as its update never happened.
        micro_batches_per_step: How many `next()` calls make one global step on this rank.
    """

    def __init__(
        self,
        samples: Rows,
        *,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        global_batch_size: int,
        consumed_samples: int = 0,
    ) -> None:
        """Starts at a sample.

        Args:
            samples: Usually `Samples`.
            micro_batch_size: Rows per micro-batch.
            data_parallel_rank: In [0, data_parallel_size).
            data_parallel_size: Number of ranks that share a step.
            global_batch_size: Rows per step, all ranks together.
            consumed_samples: Where to start; a step's size may differ from the one of earlier steps.

        Raises:
            InputError: A number out of range, or a global batch that does not divide evenly.
        """
        for name, value in (
            ("micro_batch_size", micro_batch_size),
            ("data_parallel_size", data_parallel_size),
            ("global_batch_size", global_batch_size),
        ):
            if value < 1:
                raise InputError(f"{name}: {value} must be at least 1.")
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise InputError(f"data_parallel_rank: {data_parallel_rank} must be in [0, {data_parallel_size}).")
        unit = micro_batch_size * data_parallel_size
        if global_batch_size % unit:
            raise InputError(
                f"global_batch_size: {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size} x "
                f"data_parallel_size {data_parallel_size} = {unit}; the nearest that is: "
                f"{max(1, round(global_batch_size / unit)) * unit}."
            )
        if consumed_samples < 0:
            raise InputError(f"consumed_samples: {consumed_samples} must be 0 or more.")
        self._samples = samples
        self._micro_batch_size = micro_batch_size
        self._global_batch_size = global_batch_size
        self._first_row = data_parallel_rank * (global_batch_size // data_parallel_size)
        self._micro_batch = 0
        self.consumed_samples = consumed_samples
        self.micro_batches_per_step = global_batch_size // unit

    def __next__(self) -> dict[str, torch.Tensor]:
        """Returns the next micro-batch, of micro_batch_size samples."""
        first = self.consumed_samples + self._first_row + self._micro_batch * self._micro_batch_size
        batch = self._samples.rows(first, self._micro_batch_size)
        self._micro_batch += 1
        if self._micro_batch == self.micro_batches_per_step:
            self._micro_batch = 0
            self.consumed_samples += self._global_batch_size
        return batch
