"""Reading a quickstart directory: what is there, what is missing, and what could not be read.

Nothing below trusts the shape of what it reads. A run that was killed leaves a half-written line, a stage that did not
run leaves nothing, and neither may cost the reader the rest of the page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prism_nemo.errors import InputError
from prism_nemo.report.stages import STAGES


def number(value: object) -> float | None:
    """Returns a finite number, or None for anything else (a bool or a text that looks like a number included)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def mapping(value: object) -> dict[str, Any]:
    """Returns the object of a JSON file, or an empty one if something else stands there."""
    return value if isinstance(value, dict) else {}


def sequence(value: object) -> list[Any]:
    """Returns the list of a JSON file, or an empty one if something else stands there."""
    return value if isinstance(value, list) else []


def objects(value: object) -> list[dict[str, Any]]:
    """Returns those entries of a list that are objects."""
    return [entry for entry in sequence(value) if isinstance(entry, dict)]


def words(value: object) -> str:
    """Returns a value as text; empty for None."""
    return "" if value is None else str(value)


@dataclass(frozen=True)
class Metrics:
    """The readable lines of one `metrics.jsonl`."""

    lines: tuple[Mapping[str, Any], ...] = ()

    def series(self, key: str, inner: str | None = None) -> tuple[list[float], list[float]]:
        """Returns steps and values of one metric, in order of steps.

        A resumed run writes the steps after its checkpoint a second time; the later line counts. A value that is NaN
        or infinite stays in as NaN, because a gap in a curve is something the reader must see.

        Args:
            key: Name of the metric, such as `loss` or `reward_by_task`.
            inner: Name inside the metric, such as `arithmetic`.
        """
        found: dict[float, float] = {}
        for line in self.lines:
            step, value = number(line.get("step")), line.get(key)
            if inner is not None:
                value = mapping(value).get(inner)
            if step is None or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            known = number(value)
            found[step] = math.nan if known is None else known
        steps = sorted(found)
        return steps, [found[step] for step in steps]

    def inner_names(self, key: str) -> list[str]:
        """Returns the names inside a metric, such as the tasks of `reward_by_task`, in order of appearance."""
        return list(dict.fromkeys(name for line in self.lines for name in mapping(line.get(key))))


@dataclass
class Record:
    """Everything that the page is built from.

    Attributes:
        directory: Where it was read.
        summary: The content of `summary.json`.
        metrics: Lines of `metrics.jsonl` by stage; a stage without one has no entry.
        gaps: What the page would have shown and the run did not measure, collected while the page is built.
        warnings: What was there and could not be used.
    """

    directory: Path
    summary: dict[str, Any]
    metrics: dict[str, Metrics] = field(default_factory=dict)
    gaps: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """The evaluated stages by name."""
        return {key: mapping(value) for key, value in mapping(self.summary.get("stages")).items()}

    @property
    def present(self) -> set[str]:
        """The stages of which there is any trace: an evaluation or metrics."""
        return set(self.stages) | set(self.metrics)

    def tasks(self, stage: str) -> dict[str, dict[str, Any]]:
        """The evaluated task families of one stage by name."""
        found = mapping(self.stages.get(stage, {}).get("tasks"))
        return {name: mapping(value) for name, value in found.items()}

    def missing(self, what: str) -> None:
        """Notes once that something was not measured."""
        if what not in self.gaps:
            self.gaps.append(what)

    def warn(self, what: str) -> None:
        """Notes once that something was there and could not be used."""
        if what not in self.warnings:
            self.warnings.append(what)

    def number(self, value: object, what: str) -> float | None:
        """Returns a number, or notes what is missing.

        Args:
            value: What stands in the file.
            what: Name of the measurement, for the list of what was not measured.
        """
        found = number(value)
        if found is None:
            self.missing(what)
        return found

    def share(self, value: object, what: str) -> float | None:
        """Returns a number between 0 and 1, or notes what is missing; a number outside is refused with a warning."""
        found = self.number(value, what)
        if found is not None and not 0.0 <= found <= 1.0:
            self.warn(f"{what} is {found:g}, which is not a share between 0 and 1; it is shown as not measured.")
            return None
        return found

    def interval(self, value: object, what: str) -> tuple[float | None, float | None]:
        """Returns the two ends of an interval of shares, or None twice and a note of what is missing."""
        ends = [number(end) for end in sequence(value)]
        if len(ends) == 2 and ends[0] is not None and ends[1] is not None and 0 <= ends[0] <= ends[1] <= 1:
            return ends[0], ends[1]
        self.missing(what)
        return None, None


def read_directory(directory: Path) -> Record:
    """Reads a quickstart directory.

    Args:
        directory: Holds `summary.json`, and one directory per stage with its `metrics.jsonl`.

    Raises:
        InputError: `summary.json` is not there, cannot be read, or is not a JSON object.
    """
    path = Path(directory) / "summary.json"
    advice = "Give the directory of a finished `prism-nemo quickstart --out DIR`."
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist. {advice}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}). {advice}") from error
    except (ValueError, RecursionError) as error:
        advice = "Run the quickstart again, or restore the file."
        raise InputError(f"{path} is not valid JSON ({error}). {advice}") from error
    if not isinstance(summary, dict):
        raise InputError(f"{path} holds a {type(summary).__name__} where an object is expected. {advice}")
    record = Record(Path(directory), summary)
    for key in dict.fromkeys([stage.key for stage in STAGES] + [key for key in record.stages if _plain_name(key)]):
        metrics = read_metrics(Path(directory) / key / "metrics.jsonl", record)
        if metrics is not None:
            record.metrics[key] = metrics
    return record


def read_metrics(path: Path, record: Record) -> Metrics | None:
    """Reads one `metrics.jsonl`, skips lines that are no JSON objects, and notes how many.

    Args:
        path: The file.
        record: Takes the warnings.

    Returns:
        The metrics, or None if there is no such file.
    """
    try:
        content = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        record.warn(f"{path} cannot be read ({error.strerror or error}).")
        return None
    lines: list[dict[str, Any]] = []
    bad: list[int] = []
    # Not splitlines(): a raw U+2028 inside a JSON text is no end of line.
    written = [line for line in content.split("\n") if line.strip()]
    for place, line in enumerate(written):
        try:
            parsed = json.loads(line)
        except (ValueError, RecursionError):
            parsed = None
        if isinstance(parsed, dict):
            lines.append(parsed)
        else:
            bad.append(place)
    name = f"{path.parent.name}/{path.name}"
    if bad and bad[-1] == len(written) - 1:
        bad.pop()
        record.warn(f"{name}: the last line is cut off (the run was stopped while writing it); it was skipped.")
    if bad:
        record.warn(f"{name}: {len(bad)} unreadable {'line' if len(bad) == 1 else 'lines'} skipped.")
    return Metrics(tuple(lines))


def _plain_name(key: str) -> bool:
    # A stage name comes from the file; only a plain one may become part of a path.
    return key.replace("_", "").replace("-", "").isalnum()
