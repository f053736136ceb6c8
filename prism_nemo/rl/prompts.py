"""The endless sequence of prompts of a run: a pure function of the tasks and the seed, read at a cursor."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from prism_nemo.data.interleave import Interleave
from prism_nemo.errors import InputError
from prism_nemo.rl.rewards.task import Problem, Task

SHARES = ("equal", "size")


@runtime_checkable
class Listed(Protocol):
    """A task with a fixed number of problems."""

    def __len__(self) -> int: ...

    def problem(self, index: int) -> Problem:
        """Problem `index` of the list."""


class PromptStream:
    """Tasks take turns by their shares; listed prompts come in a new order each epoch, none twice within one.

    A resumed run, or one with another number of ranks, reads the same prompts: the run's state holds the cursor only.

    Args:
        tasks: At least one.
        seed: Of the run.
        shares: ``equal`` for all tasks, or ``size``: prompt files by their number of rows.

    Raises:
        InputError: For ``size`` with a task that has none.
    """

    def __init__(self, tasks: Sequence[Task], seed: int, shares: str = "equal") -> None:
        self.tasks, self.seed = list(tasks), seed
        weights = [1.0] * len(self.tasks)
        if shares == "size":
            for i, task in enumerate(self.tasks):
                if not isinstance(task, Listed):
                    raise InputError(
                        f"task_shares: size needs prompt files, and '{task.name}' makes its questions as they are "
                        "asked for; use equal"
                    )
                weights[i] = float(len(task))
        self._turns = Interleave(weights)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def take(self, first: int, count: int) -> list[Problem]:
        """Prompts number `first` to ``first + count - 1``."""
        sources, numbers = self._turns.locate(first, count)
        return [self._problem(int(s), int(n)) for s, n in zip(sources, numbers, strict=True)]

    def epochs(self, cursor: int) -> dict[str, float]:
        """How often each listed task has been gone through before `cursor`."""
        counts = self._turns.counts(cursor)
        return {t.name: float(n) / len(t) for t, n in zip(self.tasks, counts, strict=True) if isinstance(t, Listed)}

    def _problem(self, source: int, number: int) -> Problem:
        task = self.tasks[source]
        if not isinstance(task, Listed):
            return task.sample(random.Random(f"prompts/{self.seed}/{task.name}/{number}"), "train")
        epoch, row = divmod(number, len(task))
        kept = self._orders.get(source)
        if kept is None or kept[0] != epoch:
            # The file's name and not its folder: a run that is moved goes on with the same prompts.
            # Unsigned by name: numpy would make floats of large integers, and round the epoch away.
            name = zlib.crc32(task.name.rpartition("/")[2].encode())
            key = np.array([self.seed & 0xFFFFFFFFFFFFFFFF, (name << 32) | (epoch & 0xFFFFFFFF)], np.uint64)
            order = np.random.Generator(np.random.Philox(key=key)).permutation(len(task))
            self._orders[source] = kept = (epoch, order)
        return task.problem(int(kept[1][row]))
