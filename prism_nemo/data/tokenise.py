"""The work that can be shared out: one unit of text becomes one part of tokens.

A part's name is a fingerprint of everything that decides its content. So a part that is there already, from a build
that was killed or from another machine, is taken as it is, and a changed file, filter or tokenizer gives another name.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prism_nemo.data.contamination import Contamination
from prism_nemo.data.documents import Document, read_unit
from prism_nemo.data.duplicates import DIGEST_BYTES, digest, signatures
from prism_nemo.data.indexed import token_dtype
from prism_nemo.data.loss_mask import token_mask
from prism_nemo.data.mixture import Deduplicate, Input
from prism_nemo.data.part import Part, PartWriter
from prism_nemo.data.problem import place
from prism_nemo.data.tokenizer import Tokenizer
from prism_nemo.data.units import Unit, lines_before, unit_digest
from prism_nemo.errors import InputError

RECIPE = 2
"""Part of every fingerprint: raise it when the same text would give different stored tokens."""


@dataclass(frozen=True)
class Job:
    """One unit, and what to do with it.

    Attributes:
        source: Name of its source.
        unit: Where the text is.
        item: How it is read.
        folder: Where parts go.
        max_bad: Above 0, unreadable documents are counted; at 0 the first one is an error.
        max_document_bytes: As in the mixture.
        deduplicate: What the join will have to know about each document.
        batch_characters: Text that the tokenizer is given at once.
    """

    source: str
    unit: Unit
    item: Input
    folder: Path
    max_bad: int
    max_document_bytes: int
    deduplicate: Deduplicate | None
    batch_characters: int


@dataclass
class Tools:
    """What every process needs: the tokenizer and the evaluation sets."""

    tokenizer: Tokenizer
    contamination: Contamination | None


def text_form(item: Input) -> dict[str, Any]:
    """Returns what decides the documents of an input apart from its files, for fingerprints.

    A key that came later is in it only where it is used, so that what was built before stays valid.
    """
    form = asdict(item)
    del form["paths"]
    if item.loss is None:
        del form["loss"]
    return form


def part_name(job: Job, tools: Tools) -> str:
    """Returns the file name of a job's part; reads the unit once."""
    form = text_form(job.item)
    del form["hub"]  # the unit names it
    content = [
        RECIPE,
        unit_digest(job.unit),
        form,
        job.max_document_bytes,
        None if job.deduplicate is None else job.deduplicate.near is not None,
        [tools.tokenizer.sha256, tools.tokenizer.eos_id],
        tools.contamination and tools.contamination.fingerprint,
    ]
    return f"{job.source}-{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]}.part"


def process(job: Job, tools: Tools) -> Path:
    """Returns the path of a job's part, made now or found.

    Raises:
        InputError: The input is damaged, or a document is and `max_bad` is 0.
        OSError: A full disk, among others; nothing is left behind.
    """
    path = job.folder / part_name(job, tools)
    try:
        Part(path)
        return path
    except (FileNotFoundError, ValueError, KeyError):
        pass
    tokenizer = tools.tokenizer
    writer = PartWriter(path, token_dtype(tokenizer.vocab_size))
    try:
        writer.finish(_Unit(job, tools, writer).run())
    except BaseException:
        writer.abandon()
        raise
    return path


class _Unit:
    """The state of one unit's way through the steps: read, filter, decontaminate, tokenise."""

    def __init__(self, job: Job, tools: Tools, writer: PartWriter) -> None:
        self._job, self._tools, self._writer = job, tools, writer
        self._places = {name: i for i, name in enumerate(job.unit.files)} if job.unit.kind == "text" else {}
        self._texts: list[str] = []
        self._counted: list[list[tuple[int, int]]] = []
        self._lines: list[int] = []
        self._characters = 0
        self._report: dict[str, Any] = {"read": 0, "empty": 0, "filtered": {}, "bad": {}, "contaminated": []}

    def run(self) -> dict[str, Any]:
        report = self._report
        for document in read_unit(self._job.unit, self._job.item, self._job.max_document_bytes):
            report["read"] += 1
            if document.problem is not None:
                self._bad(document)
            elif document.dropped is not None:
                report["filtered"][document.dropped] = report["filtered"].get(document.dropped, 0) + 1
            elif document.ids is not None:
                self._add_tokens(document, document.ids)
            elif document.text is None or not document.text.strip():
                report["empty"] += 1
            elif not self._is_contaminated(document, document.text):
                self._texts.append(document.text)
                self._counted.append(document.counted or [])
                self._lines.append(self._places.get(document.file, document.line))
                self._characters += len(document.text)
                if self._characters >= self._job.batch_characters:
                    self._flush()
        self._flush()
        return report

    def _bad(self, document: Document) -> None:
        assert document.problem is not None
        where = self._where(document)
        if not self._job.max_bad:
            raise InputError(f"{where}: {document.problem.message}")
        entry = self._report["bad"].setdefault(document.problem.kind, {"count": 0, "first": ""})
        entry["count"] += 1
        entry["first"] = entry["first"] or f"{where}: {document.problem.message}"

    def _is_contaminated(self, document: Document, text: str) -> bool:
        found = self._tools.contamination and self._tools.contamination.find(text)
        if not found:
            return False
        entry = {"at": self._where(document), "evaluation": found.evaluation, "words": found.words}
        self._report["contaminated"].append(entry)
        return True

    def _add_tokens(self, document: Document, ids: np.ndarray) -> None:
        tokenizer = self._tools.tokenizer
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.vocab_size:
            raise InputError(
                f"{self._where(document)}: holds token {int(ids.max())}, but the tokenizer {tokenizer.path} has "
                f"{tokenizer.vocab_size}; these tokens were made with another one."
            )
        if len(ids) and ids[-1] == tokenizer.eos_id:
            ids = ids[:-1]
        if not len(ids):
            self._report["empty"] += 1
            return
        # Back to text where the text is looked at; the tokens are stored as they are.
        seen = self._tools.contamination is not None or self._job.deduplicate is not None
        text = tokenizer.decode(ids.tolist()) if seen else ""
        if not self._is_contaminated(document, text):
            self._store(np.append(ids, tokenizer.eos_id), [len(ids) + 1], [text], [document.line], [len(text)])

    def _flush(self) -> None:
        if not self._texts:
            return
        eos, texts, masks = self._tools.tokenizer.eos_id, self._texts, None
        if self._job.item.loss is None:
            rows = self._tools.tokenizer.encode_batch(texts)
        else:
            found = self._tools.tokenizer.encode_batch_with_offsets(texts)
            rows = [row for row, _ in found]
            masks = [
                token_mask(offsets, counted, len(text))
                for (_, offsets), counted, text in zip(found, self._counted, texts, strict=True)
            ]
        lengths = [len(row) + 1 for row in rows]
        flat = itertools.chain.from_iterable(itertools.chain(row, (eos,)) for row in rows)
        ids = np.fromiter(flat, self._dtype, sum(lengths))
        self._store(ids, lengths, texts, self._lines, [len(text) for text in texts], masks)
        self._texts, self._counted, self._lines, self._characters = [], [], [], 0

    @property
    def _dtype(self) -> np.dtype:
        return token_dtype(self._tools.tokenizer.vocab_size)

    def _store(
        self,
        ids: np.ndarray,
        lengths: list[int],
        texts: list[str],
        lines: list[int],
        characters: list[int],
        masks: list[np.ndarray] | None = None,
    ) -> None:
        arrays: dict[str, np.ndarray] = {
            "lengths": np.array(lengths, np.int32),
            "lines": np.array(lines, np.int64),
            "characters": np.array(characters, np.int64),
        }
        if masks is not None:
            arrays["loss"] = np.concatenate(masks)
            arrays["loss_tokens"] = np.array([mask.sum(dtype=np.int64) for mask in masks], np.int32)
        rule = self._job.deduplicate
        if rule is not None:
            data = b"".join(map(digest, texts))
            arrays["digests"] = np.frombuffer(data, np.uint8).reshape(-1, DIGEST_BYTES)
            if rule.near is not None:
                arrays["signatures"] = signatures(texts)
        self._writer.add(ids, **arrays)

    def _where(self, document: Document) -> str:
        before = lines_before(self._job.unit) if document.line else 0
        return place(document.file, document.line + before)


def location(unit: Unit, line: int) -> str:
    """Returns `file:line` of a document by its entry in a part's `lines`."""
    return unit.files[line] if unit.kind == "text" else place(unit.files[0], line + lines_before(unit))
