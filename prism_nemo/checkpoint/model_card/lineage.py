"""How a checkpoint came to be: its stages, oldest first, and the model that it began from.

Each stage is read at the step of the checkpoint that the next one started from, not at the end of its run: a model that
was exported at step 400 of 800 saw the mixture of 400 steps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from prism_nemo.checkpoint.atomic import MANIFEST, read_manifest
from prism_nemo.checkpoint.hashes import sha256
from prism_nemo.errors import InputError
from prism_nemo.run import CONFIG


@dataclass(frozen=True)
class Share:
    """A source's part of what a stage read.

    Attributes:
        source: Its name.
        domain: Of the source, empty where the data are no longer there.
        tokens: Read until the checkpoint, padding left out.
        share: Of all tokens that were read, 0 to 1.
        planned: The mixture's weight, or None where the data are no longer there.
        epochs: Passes over the source, or None.
    """

    source: str
    domain: str
    tokens: float
    share: float
    planned: float | None
    epochs: float | None


@dataclass(frozen=True)
class Stage:
    """A training stage.

    Attributes:
        directory: The run directory.
        checkpoint: That the next stage, or the export, took.
        kind: midtrain or rl.
        step: Of the checkpoint.
        config: As resolved; empty if the file is gone.
        shares: The realised mixture; empty for RL and where nothing was logged.
        last: The newest metrics until that step, by name.
        starts: How often the stage was started.
        versions: Of the packages.
    """

    directory: Path
    checkpoint: Path
    kind: str
    step: int
    config: dict[str, Any] = field(default_factory=dict)
    shares: tuple[Share, ...] = ()
    last: dict[str, Any] = field(default_factory=dict)
    starts: int = 0
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the run."""
        return self.directory.name


@dataclass(frozen=True)
class Lineage:
    """From the base model to a checkpoint.

    Attributes:
        stages: Oldest first; empty for an imported model.
        imported_from: What the first checkpoint's manifest says: a folder, or ``org/name@commit``; None if the weights
            began from nothing, or if it cannot be known.
        from_nothing: Whether the first stage began from random weights.
        root: The oldest checkpoint that is there.
        gaps: What could not be read, in words.
    """

    stages: tuple[Stage, ...]
    imported_from: str | None
    from_nothing: bool
    root: Path
    gaps: tuple[str, ...] = ()


def trace(checkpoint: Path) -> Lineage:
    """Follow a checkpoint back to where it began.

    Args:
        checkpoint: A native checkpoint, of a run or imported.

    Raises:
        InputError: If it is not a complete checkpoint, or a run is its own ancestor.
    """
    stages: list[Stage] = []
    gaps: list[str] = []
    seen: set[Path] = set()
    current = checkpoint.resolve()
    manifest = read_manifest(current)
    while True:
        if current in seen:
            raise InputError(f"{current}: is its own ancestor; mend the parents in its run's lineage.json")
        seen.add(current)
        if manifest.get("imported_from"):
            return Lineage(tuple(stages[::-1]), str(manifest["imported_from"]), False, current, tuple(gaps))
        run = current.parents[1] if current.parent.name == "checkpoints" else None
        lineage = _json(run / "lineage.json") if run is not None else {}
        if run is None or not lineage:
            gaps.append(f"{current.name}: no run directory with a lineage.json, so what came before is not known")
            return Lineage(tuple(stages[::-1]), None, False, current, tuple(gaps))
        stages.append(_stage(run, current, int(manifest.get("step", 0)), lineage))
        parents = [str(parent) for parent in lineage.get("parents") or []]
        if not parents:
            return Lineage(tuple(stages[::-1]), None, True, current, tuple(gaps))
        found = _parent(Path(parents[0]), run, lineage)
        if found is None:
            gaps.append(
                f"{run.name} started from {Path(parents[0]).name}, which is no longer there (or is another checkpoint "
                "of that name now), so what came before is not known"
            )
            return Lineage(tuple(stages[::-1]), None, False, current, tuple(gaps))
        current, manifest = found


def _parent(path: Path, run: Path, lineage: dict[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """The parent where it was, or beside the run if everything was moved; only if its manifest is the recorded one."""
    events = [e for e in lineage.get("events", []) if isinstance(e, dict) and e.get("event") == "started from"]
    recorded = events[-1].get("manifest_sha256") if events else None
    places = [path]
    if path.parent.name == "checkpoints" and len(path.parents) > 2:
        places.append(run.parent.joinpath(*path.parts[-3:]))
    places.append(run.parent / path.name)
    for place in places:
        if (place / MANIFEST).is_file() and recorded in (None, sha256(place / MANIFEST)):
            return place.resolve(), read_manifest(place)
    return None


def _stage(run: Path, checkpoint: Path, step: int, lineage: dict[str, Any]) -> Stage:
    config = _yaml(run / CONFIG)
    last = _last_values(run / "metrics.jsonl", step)
    return Stage(
        directory=run,
        checkpoint=checkpoint,
        kind=str(lineage.get("stage", "")),
        step=step,
        config=config,
        shares=_shares(last, config),
        last=last,
        starts=len(lineage.get("starts", [])),
        versions={str(key): str(value) for key, value in (lineage.get("versions") or {}).items()},
    )


def _last_values(path: Path, step: int) -> dict[str, Any]:
    """Of each metric the newest value that is not after `step`."""
    values: dict[str, Any] = {}
    for line in _lines(path):
        if isinstance(line.get("step"), int) and line["step"] <= step:
            values.update(line)
    return values


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:  # a kill cut it short
                continue
            if isinstance(line, dict):
                yield line


def _shares(last: dict[str, Any], config: dict[str, Any]) -> tuple[Share, ...]:
    tokens = {
        key.removeprefix("tokens/"): float(value)
        for key, value in last.items()
        if key.startswith("tokens/") and isinstance(value, int | float)
    }
    total = sum(tokens.values())
    if not total:
        return ()
    data = config.get("data")
    path = data.get("path") if isinstance(data, dict) else None
    manifest = _json(Path(str(path)) / MANIFEST) if path else {}
    rows = {str(row.get("name")): row for row in manifest.get("sources") or [] if isinstance(row, dict)}
    return tuple(
        Share(
            source=name,
            domain=str(rows.get(name, {}).get("domain", "")),
            tokens=count,
            share=count / total,
            planned=rows.get(name, {}).get("weight"),
            epochs=last.get(f"epoch/{name}"),
        )
        for name, count in sorted(tokens.items(), key=lambda item: -item[1])
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _yaml(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
