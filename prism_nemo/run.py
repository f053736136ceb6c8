"""A run is a directory that a person can read.

``config.yaml`` (as resolved), ``metrics.jsonl`` (one JSON object per line), ``lineage.json`` (parents, versions,
command), ``checkpoints/``.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prism_nemo.checkpoint.atomic import write_text
from prism_nemo.config import to_yaml
from prism_nemo.errors import InputError

CONFIG = "config.yaml"
PACKAGES = ("torch", "megatron-core", "transformers", "safetensors", "tokenizers", "numpy", "reasoning-gym")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["prism-nemo"] = importlib.metadata.version("prism-nemo")
    return found


@functools.lru_cache(maxsize=1)
def source_commit() -> str | None:
    """Commit of the working tree that this package is imported from, with ``+changes`` where tracked files differ.

    Returns:
        None if the package was installed rather than checked out, or git is not there.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    found = []
    for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode:
            return None
        found.append(done.stdout.strip())
    return found[0] + ("+changes" if found[1] else "")


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value, indent=2) + "\n")


def checkpoint_name(path: Path) -> str:
    """What people call a checkpoint: RUN/step_N for one of a run, else the folder's name."""
    whole = path.resolve()
    return f"{whole.parents[1].name}/{whole.name}" if whole.parent.name == "checkpoints" else whole.name


class RunDirectory:
    """Where one stage writes.

    Args:
        path: The directory; created if it does not exist.
        writes: Whether this process writes (rank 0 only); the others share the paths.
    """

    def __init__(self, path: str | Path, writes: bool = True) -> None:
        self.path = Path(path)
        self.writes = writes
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        if writes:
            try:
                self.checkpoints.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"run_dir {self.path}: cannot be created: {error.strerror}") from error

    @property
    def checkpoints(self) -> Path:
        """Folder of the stage's checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics_path(self) -> Path:
        """The metrics file."""
        return self.path / "metrics.jsonl"

    @property
    def rollouts_path(self) -> Path:
        """What the policy of an RL stage wrote, and how it was scored."""
        return self.path / "rollouts.jsonl"

    def begin(self, stage: str, config: Any, parents: list[str], resumed_at: int) -> None:
        """Record the resolved configuration and where this stage comes from."""
        if not self.writes:
            return
        write_text(self.path / CONFIG, to_yaml(config))
        lineage_path = self.path / "lineage.json"
        before = json.loads(lineage_path.read_text()) if lineage_path.is_file() else {}
        starts, events = before.get("starts", []), before.get("events", [])
        starts.append(
            {
                "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "step": resumed_at,
                "command": sys.argv,
                "commit": source_commit(),
            }
        )
        lineage = {"stage": stage, "parents": parents, "versions": versions(), "starts": starts, "events": events}
        write_json(lineage_path, lineage)

    def record(self, event: dict[str, Any]) -> None:
        """Add something that decided what the run became to its lineage; the same event is not added twice."""
        path = self.path / "lineage.json"
        if self.writes and path.is_file():
            lineage = json.loads(path.read_text())
            if event not in lineage["events"]:
                lineage["events"].append(event)
                write_json(path, lineage)

    def truncate_metrics(self, step: int) -> None:
        """Drop what was recorded after `step`: a resumed run repeats it."""
        for path in (self.metrics_path, self.rollouts_path):
            if self.writes and path.is_file():
                kept = [line for line in read_metrics(path) if line["step"] <= step]
                temporary = path.with_suffix(".tmp")
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
                os.replace(temporary, path)

    def log(self, values: dict[str, Any]) -> None:
        """Append one line of metrics, and tell whoever listens."""
        if self.writes:
            with self.metrics_path.open("a") as file:
                file.write(json.dumps(values) + "\n")
            for listener in self.listeners:
                listener(values)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics file; a last line that a kill cut short is left out."""
    lines: list[dict[str, Any]] = []
    if not path.is_file():
        return lines
    raw = path.read_text().splitlines()
    for number, line in enumerate(raw):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            if number + 1 < len(raw):
                raise InputError(f"{path}:{number + 1}: not valid JSON") from None
    return lines


def last_value(path: Path, name: str) -> float | None:
    """The newest value of a metric, or None where there is none."""
    values = [line[name] for line in read_metrics(path) if name in line]
    return values[-1] if values else None
