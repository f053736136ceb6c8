"""What lies in the folders that a report is made of: run directories and results, known by what is in them.

Names of folders and files mean nothing here: a result that was copied to another place is found all the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from prism_nemo.checkpoint.lock import LOCK
from prism_nemo.config import load_yaml
from prism_nemo.errors import InputError
from prism_nemo.report.columns import Columns, Numbers
from prism_nemo.report.read import mapping, sequence
from prism_nemo.run import CONFIG
from prism_nemo.status.files import read_text

# Depth below a named folder that is looked into, and the largest JSON file that can be a result.
_DEPTH = 4
_MOST_BYTES = 64_000_000
# What runs and evaluations keep in bulk: thousands of files that are no results of their own.
_BULK = frozenset({"checkpoints", "samples", "answers", "rollouts", "tensorboard", "index", "tokens", "tokenizer"})
KINDS = ("evaluation", "retention", "weights", "cka", "path", "merge", "verification", "card", "summary")
_SUMMARY = "summary.json"


@dataclass(frozen=True)
class Run:
    """The directory of one stage.

    Attributes:
        path: The directory.
        lineage: Content of `lineage.json`; empty where there is none.
        config: Content of `config.yaml`; empty where there is none or it cannot be read.
        metrics: The columns of `metrics.jsonl`, or None.
    """

    path: Path
    lineage: dict[str, Any]
    config: dict[str, Any]
    metrics: Columns | None

    def series(self, key: str, inner: str | None = None) -> tuple[Numbers, Numbers]:
        """As `Columns.series`; empty where there are no metrics."""
        return self.metrics.series(key, inner) if self.metrics is not None else (np.empty(0), np.empty(0))

    def newest(self, key: str) -> float | None:
        """The last value of a metric that is finite."""
        values = self.series(key)[1]
        finite = values[np.isfinite(values)]
        return float(finite[-1]) if len(finite) else None


@dataclass(frozen=True)
class Result:
    """One result: its kind (one of `KINDS`), the file, and what is in it."""

    kind: str
    path: Path
    content: dict[str, Any]


@dataclass
class Found:
    """Everything in the named folders.

    Attributes:
        runs: Run directories.
        results: Results.
        exports: Hugging Face folders.
        warnings: What was there and could not be used.
    """

    runs: list[Run] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    exports: list[Path] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def of(self, kind: str) -> list[Result]:
        """The results of one kind."""
        return [result for result in self.results if result.kind == kind]


def find(directories: Sequence[Path]) -> Found:
    """Looks through folders.

    Args:
        directories: Run directories, results, or folders that hold such.

    Raises:
        InputError: If one is no folder, or none holds anything that a report can be made of.
    """
    found, seen = Found(), set[Path]()
    for directory in directories:
        if not directory.is_dir():
            raise InputError(f"{directory}: no such folder; name run directories, results, or folders that hold them")
        _look(directory, _DEPTH, found, seen)
    if not found.runs and not found.results:
        listed = ", ".join(str(directory) for directory in directories)
        summary = directories[0] / _SUMMARY
        raise InputError(
            f"{listed}: no run directory (lineage.json or metrics.jsonl) and no result (of eval, retention, analyze) "
            f"is in there, and {summary} of a quickstart {'is none' if summary.exists() else 'does not exist'}"
            + "".join(f". {warning}" for warning in found.warnings)
        )
    return found


def kind_of(content: object) -> str | None:
    """Which command wrote a JSON object; None for one that is no result."""
    if not isinstance(content, dict):
        return None
    keys = content.keys()
    if {"suite", "model", "tasks", "averages"} <= keys and isinstance(content["model"], dict):
        return "evaluation"
    if {"base", "models", "margin"} <= keys and all(isinstance(one, dict) for one in sequence(content["models"])):
        return "retention"
    if {"transitions", "overlaps"} <= keys:
        return "weights"
    if {"rows", "maps", "models"} <= keys:
        return "cka"
    if {"rows", "barriers", "models"} <= keys:
        return "path"
    if {"method", "parents", "weights"} <= keys:
        return "merge"
    if "max_abs_diff" in keys or "max_abs_logit_diff" in keys:
        return "verification"
    if "stages" in keys:
        return "summary"
    return None


def _look(folder: Path, depth: int, found: Found, seen: set[Path]) -> None:
    real = folder.resolve()
    if real in seen:
        return
    seen.add(real)
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        found.warnings.append(f"{folder} cannot be read ({error.strerror or error}).")
        return
    names = {entry.name for entry in entries}
    if "config.json" in names and any(name.endswith(".safetensors") for name in names):
        found.exports.append(folder)
    if {"lineage.json", "metrics.jsonl"} & names:
        found.runs.append(_run(folder, found))
    for entry in entries:
        if entry.suffix == ".json" and entry.name != LOCK and entry.is_file():
            _take(entry, found)
        elif entry.suffix in (".yaml", ".yml") and entry.name != CONFIG and entry.is_file():
            _take_card(entry, found)
        elif depth and entry.is_dir() and not entry.name.startswith(".") and entry.name not in _BULK:
            _look(entry, depth - 1, found, seen)


def _take(path: Path, found: Found) -> None:
    try:
        if path.stat().st_size > _MOST_BYTES:
            found.warnings.append(f"{path.parent.name}/{path.name} is larger than {_MOST_BYTES:,} bytes; left out.")
            return
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        found.warnings.append(f"{path.parent.name}/{path.name} cannot be read ({error}); left out.")
        return
    kind = kind_of(content)
    # Any tool may write something with stages; this file has its name from the quickstart.
    if kind is not None and (kind != "summary" or path.name == _SUMMARY):
        found.results.append(Result(kind, path, content))


def _take_card(path: Path, found: Found) -> None:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return  # other YAML, such as settings, need not be readable here
    is_card = isinstance(content, dict) and {"model", "family"} <= content.keys()
    if is_card and any(isinstance(content.get(part), dict) for part in ("verified", "failed")):
        found.results.append(Result("card", path, content))


def _run(folder: Path, found: Found) -> Run:
    lineage: dict[str, Any] = {}
    config: dict[str, Any] = {}
    metrics: Columns | None = None
    try:
        lineage = mapping(json.loads(read_text(folder / "lineage.json")))
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RecursionError) as error:
        found.warnings.append(f"{folder.name}/lineage.json cannot be read ({error}); where it comes from is unknown.")
    try:
        config = load_yaml(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    except (InputError, OSError, ValueError) as error:
        found.warnings.append(f"{folder.name}/config.yaml cannot be read ({error}).")
    try:
        metrics = Columns(folder / "metrics.jsonl")
    except FileNotFoundError:
        pass
    except OSError as error:
        found.warnings.append(f"{folder.name}/metrics.jsonl cannot be read ({error.strerror or error}).")
    if metrics is not None and metrics.torn:
        found.warnings.append(
            f"{folder.name}/metrics.jsonl: the last line is cut off (the run was stopped while writing it); it was "
            "skipped."
        )
    if metrics is not None and metrics.bad:
        found.warnings.append(f"{folder.name}/metrics.jsonl: {metrics.bad} unreadable lines skipped.")
    return Run(folder, lineage, mapping(config), metrics)
