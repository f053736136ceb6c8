"""What is to be built: the inputs of a source and their hashes, its fingerprint, and whether it is built already.

A fingerprint covers what decides the stored tokens, not where the files lie or what the source weighs. With
`max_tokens` it covers the files up to the one where that was reached, so it is known only once they have been read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from prism_nemo.data.manifest import BuiltSource, InputFile, damage, source_from_json
from prism_nemo.data.mixture import Input, Mixture, Source, file_kind
from prism_nemo.data.removed import bad_count
from prism_nemo.data.tokenise import RECIPE, Job, Tools, text_form
from prism_nemo.data.units import file_sha256
from prism_nemo.errors import PrismError


@dataclass
class Plan:
    """A source on its way.

    Attributes:
        source: As in the mixture.
        items: Its inputs.
        stats: Name, size and time of each file before it is read.
        inputs: The files with their hashes; with `max_tokens` only those that were read, and empty before.
        fingerprint: Empty before it is known.
        finished: The source as built, once it is.
    """

    source: Source
    items: list[Input]
    stats: list[tuple[str, int, int]]
    inputs: list[InputFile]
    fingerprint: str = ""
    finished: BuiltSource | None = None

    @property
    def prefix(self) -> str:
        """Name of its token files without suffix."""
        return f"{self.source.name}-{self.fingerprint[:12]}"

    def check_unchanged(self) -> None:
        """Raises PrismError where a file is not as it was before it was read."""
        if [_stat(name) for name, *_ in self.stats] != self.stats:
            raise PrismError(
                f"source {self.source.name!r}: a file changed while it was read; run the same command again."
            )


class Planner:
    """Plans the sources of a mixture for a folder."""

    def __init__(self, mixture: Mixture, tools: Tools, folder: Path, workers: int) -> None:
        self._mixture, self._tools, self._folder, self._workers = mixture, tools, folder, workers

    def in_order(self, plans: list[Plan]) -> list[Plan]:
        """Returns the plans in the order in which they are joined.

        Of a text that is held out and trained on, the training copy has to go.
        """
        return sorted(plans, key=lambda plan: plan.source.weight > 0) if self._mixture.deduplicate else plans

    def plans(self, look: Callable[[Source], bool] = lambda source: True) -> list[Plan]:
        """Looks what is finished, for which inputs are hashed; sources of which `look` is false count as not."""
        plans = [
            Plan(source, source.all_inputs(), [_stat(name) for name in source.all_paths()], [])
            for source in self._mixture.sources
        ]
        before: list[str] = []
        for plan in self.in_order(plans):
            if look(plan.source) and plan.source.max_tokens is not None:
                self._find_capped(plan, before)
            elif look(plan.source):
                plan.inputs = self._hash(plan.items)
                plan.fingerprint = self._fingerprint(plan, plan.items, before)
                plan.finished = self._find(plan, self._folder / f"{plan.prefix}.json")
            # With deduplication what is left of a source depends on those before it; after one whose fingerprint is
            # not known yet, and empty, no finished source is found.
            if self._mixture.deduplicate is not None:
                before.append(plan.fingerprint)
        return plans

    def settle(self, plan: Plan, plans: list[Plan], read: list[Input]) -> None:
        """Gives a source its fingerprint when it is to be joined.

        Args:
            plan: The source.
            plans: All of them; those before it in the order are finished.
            read: The inputs that went into it; with `max_tokens` not all of them.
        """
        if plan.source.max_tokens is not None:
            plan.inputs = self._hash(read)
        before = []
        if self._mixture.deduplicate is not None:
            ordered = self.in_order(plans)
            before = [other.fingerprint for other in ordered[: ordered.index(plan)]]
        plan.fingerprint = self._fingerprint(plan, read, before)

    def seen_file(self, prefix: str) -> Path:
        """Returns where a build keeps what it has to know of a source's documents to find repetitions of them."""
        return self._folder / f"{prefix}.seen.npz"

    def _hash(self, items: list[Input]) -> list[InputFile]:
        names = [name for item in items for name in item.paths]
        with ThreadPoolExecutor(self._workers) as pool:  # hashing and reading let go of the interpreter
            found = [
                InputFile(name, digest, Path(name).stat().st_size)
                for name, digest in zip(names, pool.map(file_sha256, names), strict=True)
            ]
        for item in items:
            if item.hub is not None:
                from prism_nemo.data.hub import hub_commit

                commit = hub_commit(item.hub)
                found.append(InputFile(f"hub:{item.hub.id}/{item.hub.config or ''}/{item.hub.split}", commit, 0))
        return found

    def _fingerprint(self, plan: Plan, items: list[Input], before: list[str]) -> str:
        rule, tokenizer, contamination = self._mixture.deduplicate, self._tools.tokenizer, self._tools.contamination
        content = [
            RECIPE,
            [item.sha256 for item in plan.inputs],
            [{"paths": [file_kind(name) for name in item.paths], **text_form(item)} for item in items],
            plan.source.max_document_bytes,
            [tokenizer.sha256, tokenizer.eos_id],
            contamination and contamination.fingerprint,
            rule and [asdict(rule), before],
        ]
        if plan.source.max_tokens is not None:  # not there otherwise, so that earlier builds stay valid
            content.append(plan.source.max_tokens)
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _find(self, plan: Plan, file: Path) -> BuiltSource | None:
        item = _load(file)
        if item is None or item.fingerprint != plan.fingerprint or damage(self._folder, item):
            return None
        if self._mixture.deduplicate is not None and not self.seen_file(item.prefix).is_file():
            return None
        # The limit may have been lowered since.
        return item if bad_count(item.report) <= plan.source.max_bad else None

    def _find_capped(self, plan: Plan, before: list[str]) -> None:
        """Looks whether the files that a build has read are still the first ones, and the same."""
        for file in sorted(self._folder.glob(f"{plan.source.name}-*.json")):
            item = _load(file)
            if item is None or item.max_tokens != plan.source.max_tokens:
                continue
            read = _first(plan.items, len(item.inputs))
            if not item.report["over_max_tokens"] and len(item.inputs) < _count(plan.items):
                continue  # there was room for more, and there is more now
            plan.inputs = self._hash(read)
            plan.fingerprint = self._fingerprint(plan, read, before)
            plan.finished = self._find(plan, file)
            if plan.finished is not None:
                return
            plan.inputs, plan.fingerprint = [], ""


def read_up_to(items: list[Input], job: Job) -> list[Input]:
    """Returns the inputs up to the file, or the dataset of the Hub, that a job reads."""
    at = next(i for i, item in enumerate(items) if item is job.item)
    last = items[at]
    if last.hub is None:
        last = replace(last, paths=last.paths[: last.paths.index(job.unit.files[-1]) + 1])
    return [*items[:at], last]


def _first(items: list[Input], count: int) -> list[Input]:
    """The first `count` files and datasets of the Hub."""
    found = []
    for item in items:
        if count > 0:
            found.append(item if item.hub is not None else replace(item, paths=item.paths[:count]))
            count -= _count([item])
    return found


def _count(items: list[Input]) -> int:
    return sum(1 if item.hub is not None else len(item.paths) for item in items)


def _load(file: Path) -> BuiltSource | None:
    try:
        return source_from_json(json.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _stat(name: str) -> tuple[str, int, int]:
    found = os.stat(name)
    return name, found.st_size, found.st_mtime_ns
