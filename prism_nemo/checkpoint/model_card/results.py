"""Measured results of a model and of those that it came from; none of any other model.

A result belongs to a model if the hash that the evaluation recorded is the model's. Names and paths are no proof: runs
are moved, and folders are written anew.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prism_nemo.checkpoint.model_card.lineage import Lineage
from prism_nemo.errors import InputError

THIS = "this model"
_EVALUATION, _RETENTION, _SUMMARY = "evaluation.json", "retention.json", "summary.json"


@dataclass(frozen=True)
class Score:
    """A measured value; shares are 0 to 1, losses nats per token."""

    model: str  # THIS, or the name of an ancestor
    task: str
    domain: str
    metric: str
    estimate: float
    low: float | None
    high: float | None
    questions: int | None
    samples: int | None
    higher_is_better: bool
    suite: str
    split: str


@dataclass
class Results:
    """Everything that was measured.

    Attributes:
        scores: Of this model and its ancestors.
        retention: Lines of retention reports on this model, with the name of the model that it is compared with.
        marks: What a reader has to know, from the evaluations.
    """

    scores: list[Score] = field(default_factory=list)
    retention: list[dict[str, Any]] = field(default_factory=list)
    marks: list[str] = field(default_factory=list)


class Owners:
    """Tells whose result it is, by the hash of the weights.

    Args:
        lineage: Of the checkpoint.
        checkpoint: The one of the card.
        exported: Its Hugging Face folder.
        base: The base model's Hugging Face folder, if it is there.
    """

    def __init__(self, lineage: Lineage, checkpoint: Path, exported: Path, base: Path | None) -> None:
        from prism_nemo.evaluation.engines.fingerprint import fingerprint

        self._fingerprint, self._folders = fingerprint, [(THIS, exported)]
        if base is not None:
            self._folders.append((base.name, base))
        self._names = {fingerprint(checkpoint): THIS}
        for stage in lineage.stages:
            self._names.setdefault(fingerprint(stage.checkpoint), stage.name)
        self._names.setdefault(fingerprint(lineage.root), lineage.root.name)

    def owner(self, model: dict[str, Any]) -> str | None:
        """THIS, the name of an ancestor, or None for any other model."""
        recorded = str(model.get("hash"))
        if recorded not in self._names and model.get("kind") == "huggingface":
            # Every byte of the weights is read for it, so only where it is needed, and once.
            while self._folders and recorded not in self._names:
                name, folder = self._folders.pop(0)
                if any(folder.glob("*.safetensors")):
                    self._names.setdefault(self._fingerprint(folder), name)
        return self._names.get(recorded)


def read_results(folders: Sequence[Path], near: Path | None, owners: Owners, lineage: Lineage) -> Results:
    """Collect results.

    Args:
        folders: Given by a person: each must hold results of this model or one of its ancestors.
        near: Folder that is looked through three levels deep for more; what belongs to other models is left out.
        owners: Tells whose a result is.
        lineage: Of the checkpoint.

    Raises:
        InputError: A given folder without results, with damaged ones, or with those of another model.
    """
    found = Results()
    seen: set[Path] = set()
    for folder in folders:
        files = [folder / name for name in (_EVALUATION, _RETENTION, _SUMMARY) if (folder / name).is_file()]
        if not files:
            raise InputError(f"--results {folder}: holds neither {_EVALUATION} nor {_RETENTION} nor {_SUMMARY}")
        for file in files:
            seen.add(file.resolve())
            if not _add(file, found, owners, lineage):
                raise InputError(
                    f"--results {file}: is about another model (the hash of its weights is not that of the checkpoint, "
                    "its export or one that it came from); leave it out, or evaluate this model"
                )
    if near is not None:
        for file in _near(near):
            if file.resolve() in seen:
                continue
            try:
                _add(file, found, owners, lineage)
            except InputError as error:
                found.marks.append(f"{file.parent.name}/{file.name} was left out: {str(error).replace(str(near), '')}")
    return found


def _near(folder: Path) -> list[Path]:
    names = (_EVALUATION, _RETENTION, _SUMMARY)
    patterns = [depth + name for name in names for depth in ("", "*/", "*/*/")]
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


def _add(file: Path, found: Results, owners: Owners, lineage: Lineage) -> bool:
    """Add what a file says of this model and its ancestors; False if it is about others only."""
    if file.name == _EVALUATION:
        return _add_evaluation(file, found, owners)
    if file.name == _RETENTION:
        return _add_retention(file, found, owners)
    return _add_summary(file, found, lineage)


def _add_evaluation(file: Path, found: Results, owners: Owners) -> bool:
    from prism_nemo.evaluation.answering.store import read_evaluation

    evaluation = read_evaluation(file.parent)
    owner = owners.owner(evaluation.model)
    if owner is None:
        return False
    for task, score in evaluation.tasks.items():
        found.scores.append(
            Score(
                owner,
                task,
                score.domain,
                score.metric,
                score.estimate,
                score.low,
                score.high,
                score.questions,
                score.samples,
                score.higher_is_better,
                evaluation.suite,
                evaluation.split,
            )
        )
    found.marks += [f"{evaluation.suite}, {owner}: {mark}" for mark in evaluation.marks]
    return True


def _add_retention(file: Path, found: Results, owners: Owners) -> bool:
    from prism_nemo.evaluation.answering.store import read_evaluation

    report = _object(file)
    added = False
    for model in report.get("models") or []:
        folder = next((p for p in _places(Path(str(model.get("path"))), file) if (p / _EVALUATION).is_file()), None)
        if folder is None:
            raise InputError(
                f"{file}: the evaluation {model.get('path')} that it was made from is no longer there, so it cannot be "
                "told which model it is about; run `prism-nemo retention` again"
            )
        if owners.owner(read_evaluation(folder).model) == THIS:
            added = True
            lines = [line for line in model.get("lines") or [] if isinstance(line, dict)]
            found.retention += [{**line, "against": report.get("base"), "suite": report.get("suite")} for line in lines]
            found.marks += [f"Retention: {mark}" for mark in report.get("marks") or []]
    return added


def _places(path: Path, file: Path) -> list[Path]:
    return [path, file.parent / path, file.parent / path.name, file.parent.parent / path.name]


def _add_summary(file: Path, found: Results, lineage: Lineage) -> bool:
    """The quickstart's summary: stages are run directories beside it, which is how they are told apart."""
    stages = _object(file).get("stages")
    if not isinstance(stages, dict):
        raise InputError(f"{file}: is not the summary of a quickstart")
    added = False
    for place, stage in enumerate(reversed(lineage.stages)):
        values = stages.get(stage.name)
        # The quickstart evaluates what each stage ended with.
        newest = max(path.name for path in stage.checkpoint.parent.iterdir() if path.name.startswith("step_"))
        here = stage.directory.parent == file.parent.resolve() and stage.checkpoint.name == newest
        if not here or not isinstance(values, dict):
            continue
        added, owner = True, THIS if place == 0 else stage.name
        for task, value in (values.get("tasks") or {}).items():
            low, high = value["ci95"]
            found.scores.append(
                Score(
                    owner, task, "", "accuracy", value["accuracy"], low, high, value["n"], 1, True, "quickstart", "test"
                )
            )
        if isinstance(values.get("retention_loss"), float):
            loss = values["retention_loss"]
            found.scores.append(
                Score(
                    owner, "general-heldout", "text", "loss", loss, None, None, None, None, False, "quickstart", "test"
                )
            )
    return added


def _object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read ({error})") from None
    if not isinstance(found, dict):
        raise InputError(f"{file}: holds no JSON object")
    return found
