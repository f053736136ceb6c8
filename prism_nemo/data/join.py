"""The join of a source: its parts in order, without repetitions and up to its limit, become its token files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from prism_nemo.checkpoint.atomic import sync, write_text
from prism_nemo.data.duplicates import DIGEST_BYTES, PERMUTATIONS, Seen
from prism_nemo.data.fingerprint import Plan
from prism_nemo.data.indexed import write_index
from prism_nemo.data.manifest import MANIFEST, BuiltSource
from prism_nemo.data.part import Part
from prism_nemo.data.removed import add_reports, bad_count, summary
from prism_nemo.data.tokenise import location
from prism_nemo.data.units import Unit
from prism_nemo.errors import InputError, PrismError

TEMPORARY = ".tmp-"
_EXAMPLES = 20
_MORE = (".loss", ".seen.npz", ".removed.jsonl")


class Join:
    """Takes the parts of one source, and writes its files once all are there.

    Attributes:
        parts: Paths of the parts taken.
        full: Whether a document no longer fitted into `max_tokens`; no more parts are needed then.
    """

    def __init__(self, plan: Plan, folder: Path, seen: Seen | None) -> None:
        self.parts: list[Path] = []
        self.full = False
        self._plan, self._folder, self._seen = plan, folder, seen
        self._taken: list[tuple[Part, np.ndarray]] = []
        self._room = plan.source.max_tokens
        self._over = 0
        self._duplicates: dict[str, int] = {}
        self._examples: list[dict[str, str]] = []
        self._no_loss: dict[str, Any] = {"count": 0, "first": ""}
        self._loss_tokens = 0

    def add(self, unit: Unit, part: Part) -> None:
        """Takes the next part."""
        self.parts.append(part.path)
        keep = self._keep(unit, part)
        self._taken.append((part, keep))
        if part.documents:
            found = part.array("loss_tokens")
            counted = _array(part, "lengths") if found is None else found
            self._loss_tokens += int(counted[keep].sum(dtype=np.int64))
            unused = np.flatnonzero(keep & (counted == 0))
            if len(unused):
                first = location(unit, int(_array(part, "lines")[unused[0]]))
                self._no_loss = {
                    "count": self._no_loss["count"] + len(unused),
                    "first": self._no_loss["first"] or first,
                }

    def finish(self, dtype: np.dtype, seen_file: Path) -> tuple[BuiltSource, str]:
        """Writes the token files, the mask, what later builds have to know, and last the `.json`.

        Args:
            dtype: Of the stored ids.
            seen_file: Where the digests of the documents go, with deduplication.

        Returns:
            The source as built, and a line about it.

        Raises:
            InputError: Too many documents cannot be read, or no token is left, or none that the loss counts.
        """
        plan, source, prefix = self._plan, self._plan.source, self._plan.prefix
        report = self._report()
        masked = any(item.loss is not None for item in plan.items)
        lengths = [np.zeros(0, np.int32), *(_array(part, "lengths")[keep] for part, keep in self._with_documents())]
        sizes = np.concatenate(lengths)
        self._check(sizes, report, masked)

        def copy_ids(path: Path) -> None:
            with open(path, "wb") as stream:
                for part, keep in self._taken:
                    part.copy(keep, stream)

        def copy_loss(path: Path) -> None:
            with open(path, "wb") as stream:
                for part, keep in self._taken:
                    part.copy_loss(keep, stream)

        writers: dict[str, Callable[[Path], None]] = {
            ".bin": copy_ids,
            ".idx": lambda path: write_index(path, sizes, dtype),
        }
        if masked:
            writers[".loss"] = copy_loss
        self._write(prefix, writers)
        if self._seen is not None:
            self._write_seen(seen_file)
        contaminated = report["contaminated"]
        if contaminated:
            lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in contaminated)
            write_text(self._folder / f"{prefix}.removed.jsonl", lines)
            report["contaminated"] = contaminated[:_EXAMPLES]
        item = BuiltSource(
            name=source.name,
            domain=source.domain,
            weight=source.weight,
            max_epochs=source.max_epochs,
            documents=len(sizes),
            tokens=int(sizes.sum(dtype=np.int64)),
            characters=sum(int(_array(part, "characters")[keep].sum()) for part, keep in self._with_documents()),
            dtype=dtype.name,
            fingerprint=plan.fingerprint,
            prefix=prefix,
            inputs=plan.inputs,
            report=report,
            loss_tokens=self._loss_tokens if masked else None,
            max_tokens=source.max_tokens,
        )
        # Last: this file says that the others are whole.
        write_text(self._folder / f"{prefix}.json", json.dumps(asdict(item), indent=2, ensure_ascii=False) + "\n")
        loss = "" if item.loss_tokens is None else f" ({item.loss_tokens:,} in the loss)"
        return item, f"{item.name}: {item.documents:,} documents, {item.tokens:,} tokens{loss}; {summary(report)}"

    def _keep(self, unit: Unit, part: Part) -> np.ndarray:
        """Which documents of a part are no repetition, and fit."""
        keep = np.ones(part.documents, bool)
        if not part.documents or (self._seen is None and self._room is None):
            return keep
        lengths, lines, signatures = _array(part, "lengths"), _array(part, "lines"), part.array("signatures")
        digests = None if self._seen is None else _array(part, "digests")
        for i in range(part.documents):
            # Before it is looked for: a document that is not taken must not stand in the way of a later copy.
            if self._room is not None and lengths[i] > self._room:
                self.full = True
                self._over += part.documents - i
                keep[i:] = False
                break
            if self._seen is not None and digests is not None:
                signature = None if signatures is None else signatures[i]
                found = self._seen.add(digests[i].tobytes(), signature, self._plan.source.name)
                if found is not None:
                    keep[i] = False
                    self._repeated(*found, location(unit, int(lines[i])) if len(self._examples) < _EXAMPLES else "")
                    continue
            if self._room is not None:
                self._room -= int(lengths[i])
        return keep

    def _repeated(self, kind: str, source: str, at: str) -> None:
        self._duplicates[kind] = self._duplicates.get(kind, 0) + 1
        if at:
            self._examples.append({"at": at, "kind": kind, "source": source})

    def _with_documents(self) -> list[tuple[Part, np.ndarray]]:
        return [(part, keep) for part, keep in self._taken if part.documents]

    def _report(self) -> dict[str, Any]:
        report = add_reports([part.report for part, _ in self._taken])
        report["duplicates"], report["duplicate_examples"] = self._duplicates, self._examples
        if self._plan.source.max_tokens is not None:
            report["over_max_tokens"] = self._over
        if any(item.loss is not None for item in self._plan.items):
            report["no_loss"] = self._no_loss
        return report

    def _check(self, sizes: np.ndarray, report: dict[str, Any], masked: bool) -> None:
        source = self._plan.source
        if bad_count(report) > source.max_bad:
            first = next(iter(report["bad"].values()))["first"]
            raise InputError(
                f"source {source.name!r}: {bad_count(report):,} documents cannot be read, max_bad is {source.max_bad}; "
                f"the first: {first}"
            )
        if self.full and not len(sizes):
            raise InputError(
                f"source {source.name!r}: its first document has more tokens than max_tokens allows "
                f"({source.max_tokens:,}); raise it."
            )
        if not len(sizes):
            files = f"{len(self._plan.inputs)} file(s)"
            raise InputError(
                f"source {source.name!r}: its {files} hold no text, so it has no tokens ({summary(report)})."
            )
        if masked and not self._loss_tokens:
            raise InputError(
                f"source {source.name!r}: no token of its {len(sizes):,} documents is in the loss, so nothing would be "
                f"trained on; what `loss` names is empty or not there in all of them (first: "
                f"{report['no_loss']['first']})."
            )

    def _write(self, prefix: str, writers: dict[str, Callable[[Path], None]]) -> None:
        temporary = {suffix: self._folder / f"{TEMPORARY}{prefix}{suffix}" for suffix in writers}
        try:
            for suffix, write in writers.items():
                write(temporary[suffix])
            for suffix, file in temporary.items():
                sync(file)
                os.replace(file, self._folder / (prefix + suffix))
        except BaseException:
            for file in temporary.values():
                file.unlink(missing_ok=True)
            raise

    def _write_seen(self, file: Path) -> None:
        digests, rows = [], []
        for part, keep in self._with_documents():
            digests.append(_array(part, "digests")[keep])
            signature = part.array("signatures")
            rows.append(np.zeros((0, PERMUTATIONS), np.uint32) if signature is None else signature[keep])
        temporary = file.with_name(f"{TEMPORARY}{file.name}")
        np.savez(temporary, digests=np.concatenate(digests).reshape(-1, DIGEST_BYTES), signatures=np.concatenate(rows))
        sync(temporary)
        os.replace(temporary, file)


def remember(seen: Seen, item: BuiltSource, seen_file: Path) -> None:
    """Takes the documents of an unchanged source as seen."""
    with np.load(seen_file) as stored:
        digests, rows = stored["digests"], stored["signatures"]
    for i, key in enumerate(digests):
        seen.add(key.tobytes(), rows[i] if len(rows) else None, item.name)


def remove_orphans(folder: Path, prefixes: set[str]) -> None:
    """Removes the token files of changed or dropped sources; only triples that a build here has finished."""
    for file in folder.glob("*.json"):
        pair = [file.with_name(file.stem + suffix) for suffix in (".bin", ".idx")]
        if file.name != MANIFEST and file.stem not in prefixes and all(item.is_file() for item in pair):
            more = [file.with_name(file.stem + suffix) for suffix in _MORE]
            for item in (file, *pair, *more):
                item.unlink(missing_ok=True)


def _array(part: Part, name: str) -> np.ndarray:
    values = part.array(name)
    if values is None:
        raise PrismError(f"{part.path}: has no {name}; remove the file and run the same command again.")
    return values
