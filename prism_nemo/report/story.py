"""From what lies in the folders to a story: models that come from one another, each with its run and its results.

A stage is tied to its parent by the hash of the parent's manifest where the lineage recorded one, else by the path,
else by the last three parts of the path (RUN/checkpoints/step_N) where only one run has them: folders get moved.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prism_nemo.checkpoint.atomic import MANIFEST, ORIGIN
from prism_nemo.report.find import Found, Result, Run
from prism_nemo.report.model import SPARE, STYLES, Model, real
from prism_nemo.report.read import mapping, objects, sequence, words
from prism_nemo.report.summary import Summary, add_export, add_models, add_results
from prism_nemo.report.svg import Style
from prism_nemo.status.files import read_text


@dataclass
class Story:
    """What the page is built from.

    Attributes:
        found: What lay in the folders.
        models: Parents before children.
        summaries: Quickstarts.
        gaps: What was not measured, and the command that measures it.
        warnings: What was there and could not be used, or does not fit together.
    """

    found: Found
    models: list[Model]
    summaries: list[Summary] = field(default_factory=list)
    gaps: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def runs(self) -> list[tuple[Model, Run]]:
        """The models that a run made."""
        return [(model, model.run) for model in self.models if model.run is not None]

    def missing(self, what: str, command: str) -> None:
        """Notes once what was not measured, and how to measure it."""
        if (what, command) not in self.gaps:
            self.gaps.append((what, command))

    def name_of(self, path: str) -> str:
        """The name of the model that a path belongs to; the path's last part for one that is not in the story."""
        place = _Places(self.models).at(path)
        if place is not None:
            return self.models[place].name
        parts = Path(path).parts
        return parts[-3] if len(parts) > 2 and parts[-2] == "checkpoints" else (parts[-1] if parts else path)


def tell(found: Found) -> Story:
    """Puts runs and results together."""
    runs = sorted(
        found.runs, key=lambda run: words(mapping((objects(run.lineage.get("starts")) or [{}])[0]).get("time"))
    )
    models = [Model(run.path, "", run.path.resolve().name, run=run) for run in runs]
    for merge in found.of("merge"):
        models.append(Model(merge.path.parent, "merge", merge.path.parent.resolve().name))
    summaries = [Summary(result.path, result.content) for result in found.of("summary")]
    for summary in summaries:
        add_models(summary, models)
    # Those that say where they come from; the others are shown where somebody evaluated them. A quickstart exports
    # every stage: five more boxes would hide the lineage.
    exports = {
        folder: [one for one in summaries if real(one.folder) in real(folder).parents] for folder in found.exports
    }
    models += [Model(path, "hf", path.resolve().name) for path, of in exports.items() if not of and _origin(path)]
    for summary in summaries:
        add_export(summary, [path for path, of in exports.items() if summary in of], models)
    story = Story(found, models, summaries, warnings=found.warnings)
    _link(story)
    for result in found.of("evaluation"):
        _attach(story, result)
    _roles(story)
    story.models = _in_order(models)
    _dress(story.models)
    for summary in summaries:
        add_results(story, summary)
    return story


class _Places:
    """Which model a path belongs to."""

    def __init__(self, models: list[Model]) -> None:
        self._whole = {str(real(model.path)): place for place, model in enumerate(models)}
        self._names: dict[str, list[int]] = {}
        for place, model in enumerate(models):
            if model.run is not None:
                self._names.setdefault(real(model.path).name, []).append(place)
        self._hashes: dict[str, int] = {}

    def learn(self, models: list[Model]) -> None:
        """Reads the hashes of the checkpoints' manifests."""
        for place, model in enumerate(models):
            if model.role == "hf":
                continue  # its path may be any text that a file holds
            for manifest in model.path.glob(f"checkpoints/step_*/{MANIFEST}"):
                try:
                    self._hashes[hashlib.sha256(manifest.read_bytes()).hexdigest()] = place
                except OSError:
                    continue

    def by_hash(self, found: object) -> int | None:
        return self._hashes.get(found) if isinstance(found, str) else None

    def at(self, path: str) -> int | None:
        whole = real(Path(path))
        of_run = whole.parent.name == "checkpoints"
        place = self._whole.get(str(whole.parents[1] if of_run else whole))
        if place is None and of_run:
            same = self._names.get(whole.parents[1].name, [])
            place = same[0] if len(same) == 1 else None
        return place


def _link(story: Story) -> None:
    models = story.models
    places = _Places(models)
    places.learn(models)
    outside: dict[str, int] = {}
    for child, model in enumerate(list(models)):
        for path, digest in _parents(story, model):
            parent = places.by_hash(digest)
            if parent is None:
                parent = places.at(path)
            if parent is None:
                if path not in outside:
                    outside[path] = len(models)
                    models.append(Model(Path(path), "base", story.name_of(path)))
                parent = outside[path]
            if parent != child and parent not in model.parents:
                model.parents.append(parent)


def _parents(story: Story, model: Model) -> Iterator[tuple[str, object]]:
    """Path and, where it was recorded, the hash of the manifest of each parent."""
    known = sequence(model.run.lineage.get("parents")) if model.run is not None else []
    if model.origin and not known:
        yield model.origin, None
        return
    if model.role == "hf":
        origin = _origin(model.path)
        yield words(origin.get("checkpoint")).replace("\0", ""), origin.get("manifest_sha256")
        return
    if model.role == "merge":
        merge = next(result for result in story.found.of("merge") if result.path.parent == model.path)
        # The last parent is what the merge is mostly about: the base is mixed into it.
        for parent in reversed(objects(merge.content.get("parents"))):
            yield words(parent.get("path")), None
        return
    if model.run is None:
        return
    lineage = model.run.lineage
    started = [event for event in objects(lineage.get("events")) if event.get("event") == "started from"]
    digests = {words(event.get("checkpoint")): event.get("manifest_sha256") for event in started}
    for path in sequence(lineage.get("parents")):
        if isinstance(path, str) and path and "\0" not in path:
            yield path, digests.get(path)


def _origin(folder: Path) -> dict[str, Any]:
    """What an export says of the checkpoint that it was made from; empty if nothing."""
    try:
        return mapping(json.loads(read_text(folder / ORIGIN)))
    except (OSError, ValueError, RecursionError):
        return {}


def _attach(story: Story, result: Result) -> None:
    model = mapping(result.content.get("model"))
    path = words(model.get("path"))
    place = _Places(story.models).at(path) if path and "\0" not in path else None
    if place is None:
        place = len(story.models)
        story.models.append(Model(Path(path.replace("\0", "")), "hf", words(model.get("name")) or story.name_of(path)))
    step = re.fullmatch(r"step_(\d+)", Path(path.replace("\0", "")).name)
    story.models[place].evaluations.append((int(step[1]) if step else None, result.content))


def _roles(story: Story) -> None:
    models = story.models

    def ancestors(place: int, seen: frozenset[int] = frozenset()) -> set[int]:
        above = set(models[place].parents) - seen
        return above.union(*(ancestors(one, seen | {place} | above) for one in above)) if above else set()

    for place, model in enumerate(models):
        if model.run is None:
            continue
        stage = words(model.run.lineage.get("stage"))
        if stage == "rl" or (not stage and model.run.metrics is not None and "reward" in model.run.metrics.names()):
            trained = any(_midtrained(models[one]) for one in ancestors(place))
            model.role = "prism_rl" if trained else "base_rl"
        else:
            model.role = "midtrain" if model.parents or model.run.config.get("init_from") else "pretrain"


def _midtrained(model: Model) -> bool:
    if model.run is None:
        return model.role in ("merge", "midtrain")
    return words(model.run.lineage.get("stage")) != "rl" and bool(model.parents)


def _in_order(models: list[Model]) -> list[Model]:
    """Parents before children, else as they were found; a ring of parents, which no run makes, is cut."""
    order: list[int] = []

    def visit(place: int, path: tuple[int, ...] = ()) -> None:
        if place in order or place in path:
            return
        for parent in models[place].parents:
            visit(parent, (*path, place))
        order.append(place)

    for place in range(len(models)):
        visit(place)
    moved = {old: new for new, old in enumerate(order)}
    for model in models:
        model.parents = [moved[parent] for parent in model.parents]
    for new, old in enumerate(order):
        models[old].parents = [parent for parent in models[old].parents if parent < new]
    return [models[old] for old in order]


def _dress(models: list[Model]) -> None:
    used: list[Style] = []
    names: dict[str, int] = {}
    for model in models:
        wanted = STYLES[model.role]
        if wanted in used:
            wanted = next((style for style in SPARE if style not in used), Style("s-other"))
        used.append(wanted)
        model.style = wanted
        names[model.name] = names.get(model.name, 0) + 1
    for model in models:
        # Two runs of one name in two folders are two models; the page must say which.
        above = real(model.path).parent.name
        if names[model.name] > 1 and above:
            model.name = f"{above}/{model.name}"
