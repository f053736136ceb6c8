"""One `metrics.jsonl` as columns of numbers, read in one pass: a million lines take seconds, not minutes.

Lines with the same keys are turned into columns together, so that no loop of Python visits every single value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from prism_nemo.status.files import open_file

Numbers = NDArray[np.float64]
Name = tuple[str, ...]

_LINES = 256  # what one batch is made of stays in the cache


class Columns:
    """The readable numbers of a metrics file.

    Args:
        path: The file.

    Attributes:
        bad: Lines in the middle that are no JSON objects.
        torn: Whether the last line was cut off.
        lines: Readable lines.

    Raises:
        OSError: If the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.bad, self.torn, self.lines = 0, False, 0
        self._parts: dict[Name, list[tuple[Numbers, Numbers]]] = {}
        self._kept: dict[Name, tuple[Numbers, Numbers]] = {}
        # Bytes: a raw U+2028 or a carriage return inside a JSON text is no end of line, and decoding takes as long as
        # parsing does.
        with open_file(path) as file:
            last_bad = False
            while batch := list(islice(file, _LINES)):
                written = [line for line in batch if line.strip()]
                if not written:
                    continue
                rows, bad = parse_lines(written)
                self.bad += len(bad)
                last_bad = bool(bad) and bad[-1] == len(written) - 1
                self._add(rows)
        if last_bad:
            self.bad, self.torn = self.bad - 1, True

    def series(self, key: str, inner: str | None = None) -> tuple[Numbers, Numbers]:
        """Steps and values of one metric, in order of steps; of a step that was written twice the later line counts.

        Args:
            key: Name of the metric, such as `loss` or `reward_by_task`.
            inner: Name inside the metric, such as `arithmetic`.

        Returns:
            Two arrays of one length. A value that is NaN or infinite stays in as NaN: the reader must see the gap.
        """
        name = (key,) if inner is None else (key, inner)
        if name not in self._kept:
            self._kept[name] = _in_order(self._parts.get(name, []))
        return self._kept[name]

    def names(self, start: str = "") -> list[str]:
        """Names of the metrics that begin with `start`, in order of appearance."""
        return [name[0] for name in self._parts if len(name) == 1 and name[0].startswith(start)]

    def inner_names(self, key: str) -> list[str]:
        """Names inside a metric, such as the tasks of `reward_by_task`, in order of appearance."""
        return [name[1] for name in self._parts if len(name) == 2 and name[0] == key]

    def _add(self, rows: list[dict[str, Any]]) -> None:
        self.lines += len(rows)
        alike: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for row in rows:
            if "step" in row:
                alike.setdefault(tuple(row), []).append(row)
        for keys, group in alike.items():
            columns = dict(zip(keys, zip(*(row.values() for row in group), strict=True), strict=True))
            steps = _numbers(columns.pop("step"))
            known = np.isfinite(steps)
            for key, values in columns.items():
                self._keep((key,), steps, values, known)
                types = set(map(type, values))
                if types == {dict} and len(set(map(tuple, values))) == 1:
                    # The usual case, sixfold faster: every line has the same names inside.
                    turned = zip(*(value.values() for value in values), strict=True)
                    for name, inside_of in zip(values[0], turned, strict=True):
                        self._keep((key, name), steps, inside_of, known)
                elif dict in types:
                    inside = list(dict.fromkeys(name for value in values if isinstance(value, dict) for name in value))
                    for name in inside:
                        inner = [value.get(name) if isinstance(value, dict) else None for value in values]
                        self._keep((key, name), steps, inner, known)

    def _keep(self, name: Name, steps: Numbers, values: Sequence[Any], known: NDArray[np.bool_]) -> None:
        types = set(map(type, values))
        present = known
        if not types <= {int, float}:
            present = known & np.fromiter((type(value) in (int, float) for value in values), bool, len(values))
        if present.any():
            self._parts.setdefault(name, []).append((steps[present], _numbers(values)[present]))


def parse_lines(lines: list[bytes]) -> tuple[list[dict[str, Any]], list[int]]:
    """The objects of some lines of JSON, and the places of those that are none."""
    try:
        # Five times as fast as json, which has the last word: orjson refuses NaN and integers of more than 64 bits.
        rows = orjson.loads(b"[%b]" % b",".join(lines))
        # A line such as `1, 2` is valid inside a list and no line of its own.
        if len(rows) == len(lines) and all(type(row) is dict for row in rows):
            return rows, []
    except (ValueError, RecursionError):
        pass
    found, bad = [], []
    for place, line in enumerate(lines):
        try:
            row = json.loads(line.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            found.append(row)
        else:
            bad.append(place)
    return found, bad


def _numbers(values: Sequence[Any]) -> Numbers:
    if set(map(type, values)) <= {int, float}:
        try:
            found = np.array(values, dtype=np.float64)
            found[~np.isfinite(found)] = np.nan
            return found
        except OverflowError:
            pass
    return np.array(list(_one_by_one(values)), dtype=np.float64)


def _one_by_one(values: Sequence[Any]) -> Iterator[float]:
    for value in values:
        try:
            number = float(value) if type(value) in (int, float) else math.nan
        except OverflowError:
            number = math.nan
        yield number if math.isfinite(number) else math.nan


def _in_order(parts: list[tuple[Numbers, Numbers]]) -> tuple[Numbers, Numbers]:
    if not parts:
        return np.empty(0), np.empty(0)
    steps = np.concatenate([part[0] for part in parts])
    values = np.concatenate([part[1] for part in parts])
    order = np.argsort(steps, kind="stable")
    steps, values = steps[order], values[order]
    last = np.append(steps[1:] != steps[:-1], True)
    return steps[last], values[last]
