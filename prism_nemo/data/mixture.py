"""What a run trains on: sources with shares of tokens, and the checks that need no work. Files: `mixture_file.py`."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path

from prism_nemo.data.expression import Expression
from prism_nemo.data.template import render_template, role_names, role_of
from prism_nemo.errors import InputError

SUFFIXES = {
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl.gz",
    ".jsonl.zst": "jsonl.zst",
    ".parquet": "parquet",
    ".txt": "text",
    ".py": "text",
    ".bin": "tokens",
}
"""Kind of a file by the end of its name: a document per line, per row, per file, or (`.bin` with `.idx`) tokens."""

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Shares such as 0.1 are not exact in binary; ten shares of 0.1 must still meet a retention share of 1.0.
_SHARE_TOLERANCE = 1e-9


@dataclass
class Hub:
    """A dataset of the Hugging Face Hub, read as a stream and never stored.

    Attributes:
        id: `org/name`.
        config: Its configuration (subset), where it has several.
        split: The split to read.
        revision: Branch, tag or commit; what it stands for at the time of the build is recorded.
    """

    id: str
    config: str | None = None
    split: str = "train"
    revision: str = "main"


@dataclass
class Input:
    """Files of one form, and how a record of theirs becomes a document.

    Attributes:
        paths: Files; absolute after `load_mixture`.
        hub: Read instead of files.
        text_field: The field that holds the document; unused for plain text and tokens.
        template: Text with field names in braces, instead of `text_field`.
        turns: The field that holds a conversation, instead of `text_field`.
        speakers: Whether each turn starts with `User:` or `Assistant:`.
        filter: Expressions over fields; a record is kept if all of them hold.
        loss: Fields of the template, or roles of the turns, whose text alone is trained on; None counts every token.
    """

    paths: list[str]
    hub: Hub | None = None
    text_field: str = "text"
    template: str | None = None
    turns: str | None = None
    speakers: bool = True
    filter: list[str] = field(default_factory=list)
    loss: list[str] | None = None


@dataclass
class Source:
    """One stream of documents.

    Attributes:
        name: Unique; becomes part of file names.
        domain: What the text is about (`math`, `general`, ...); for reports and per-domain losses.
        paths: Files, or patterns in the YAML; absolute file names after `load_mixture`.
        weight: Share of training tokens before normalisation; 0 means built but never trained on.
        text_field: As in `Input`; so are `template`, `turns`, `speakers`, `filter`, `loss` and `hub`.
        max_epochs: Refuse to train on this source for more passes than this; None means no limit.
        inputs: Instead of all that `Input` has: several inputs of different form.
        max_bad: Documents that may be unreadable (counted and reported) before the source is refused.
        max_document_bytes: A longer line or text counts as unreadable: a whole corpus on one line is a mistake.
        max_tokens: Take documents, in the order of the files, only as long as their tokens do not exceed this; the
            files after that are not read. None takes all.
    """

    name: str
    domain: str
    paths: list[str]
    weight: float
    text_field: str = "text"
    max_epochs: float | None = None
    template: str | None = None
    turns: str | None = None
    speakers: bool = True
    filter: list[str] = field(default_factory=list)
    hub: Hub | None = None
    inputs: list[Input] = field(default_factory=list)
    max_bad: int = 0
    max_document_bytes: int = 64 << 20
    loss: list[str] | None = None
    max_tokens: int | None = None

    def all_inputs(self) -> list[Input]:
        """Returns what is read, in order."""
        if self.inputs:
            return self.inputs
        shared = {item.name: getattr(self, item.name) for item in fields(Input)}
        return [Input(**shared)]

    def all_paths(self) -> list[str]:
        """Returns the files of all inputs, in order."""
        return [name for item in self.all_inputs() for name in item.paths]


@dataclass
class Deduplicate:
    """What counts as a repeated document, over all sources; the first one stays, held-out sources come first.

    Attributes:
        exact: The same text.
        near: Least estimated Jaccard similarity of 5-word shingles, in (0, 1); None does not look.
    """

    exact: bool = True
    near: float | None = None


@dataclass
class Decontaminate:
    """Evaluation sets whose text must not be trained on.

    Attributes:
        against: JSON lines or text files; every text inside a record counts as an item.
        ngram: A document that shares this many consecutive words with an item is left out.
    """

    against: list[str]
    ngram: int = 13


@dataclass
class Retention:
    """The share of general text that keeps the base model's abilities.

    Attributes:
        share: The least share of training tokens, in (0, 1].
        sources: Names of the sources that count as general text.
    """

    share: float
    sources: list[str]


@dataclass
class Mixture:
    """A named set of sources.

    Attributes:
        name: For reports.
        sources: In the order of the file.
        retention: None only where the author wrote `retention: none`.
        deduplicate: None keeps repeated documents.
        decontaminate: None looks for no evaluation set.
    """

    name: str
    sources: list[Source] = field(default_factory=list)
    retention: Retention | None = None
    deduplicate: Deduplicate | None = None
    decontaminate: Decontaminate | None = None

    def shares(self) -> dict[str, float]:
        """Returns each source's share of training tokens; the shares sum to 1."""
        total = sum(source.weight for source in self.sources)
        return {source.name: source.weight / total for source in self.sources}


def check_mixture(mixture: Mixture, where: str) -> None:
    """Checks what concerns the mixture as a whole, however it was made.

    Args:
        mixture: Its paths must be files, not patterns.
        where: The file name, or words for a mixture made in Python; starts every message.

    Raises:
        InputError: Duplicate names, weights, missing or empty files, or a retention share that is not met.
    """
    if not mixture.sources:
        raise InputError(f"{where}: sources: a mixture needs at least one source.")
    seen: set[str] = set()
    for i, source in enumerate(mixture.sources):
        key = f"{where}: sources[{i}]"
        if not _SAFE_NAME.fullmatch(source.name):
            raise InputError(
                f"{key}.name: {source.name!r} becomes a file name; use letters, digits, '.', '_' and '-' only."
            )
        if source.name in seen:
            raise InputError(f"{key}.name: {source.name!r} is used twice; give every source its own name.")
        seen.add(source.name)
        if not math.isfinite(source.weight) or source.weight < 0:
            raise InputError(f"{key}.weight: {source.weight} must be 0 or more (a share of the training tokens).")
        if source.max_epochs is not None and not source.max_epochs > 0:
            raise InputError(f"{key}.max_epochs: {source.max_epochs} must be positive, or leave it out for no limit.")
        if source.max_bad < 0 or source.max_document_bytes < 1:
            raise InputError(
                f"{key}: max_bad {source.max_bad} must be 0 or more, max_document_bytes "
                f"{source.max_document_bytes} 1 or more."
            )
        if source.max_tokens is not None and source.max_tokens < 1:
            raise InputError(f"{key}.max_tokens: {source.max_tokens} must be positive, or leave it out to take all.")
        if source.inputs and (source.paths or source.hub is not None):
            raise InputError(f"{key}: source {source.name!r} has `inputs` and paths or a hub beside them; choose one.")
        for number, item in enumerate(source.all_inputs()):
            _check_input(source.name, item, f"{key}.inputs[{number}]" if source.inputs else key)
        if not any(item.hub for item in source.all_inputs()) and not any(map(_size, source.all_paths())):
            raise InputError(
                f"{key}.paths: source {source.name!r} is empty: all of its {len(source.all_paths())} file(s) are."
            )
    if not any(source.weight > 0 for source in mixture.sources):
        raise InputError(f"{where}: sources: every weight is 0, so there is nothing to train on; give one a weight.")
    _check_held_out(mixture, where)
    if mixture.retention is not None:
        _check_retention(mixture, mixture.retention, f"{where}: retention")
    if mixture.deduplicate is not None:
        near = mixture.deduplicate.near
        if near is not None and not 0 < near < 1:
            raise InputError(f"{where}: deduplicate.near: {near} must be a similarity between 0 and 1, such as 0.8.")
        if near is None and not mixture.deduplicate.exact:
            raise InputError(f"{where}: deduplicate: neither exact nor near; leave it out to keep repeated documents.")
    if mixture.decontaminate is not None:
        _check_decontaminate(mixture, mixture.decontaminate, f"{where}: decontaminate")


def file_kind(name: str) -> str | None:
    """Returns the kind of a file by its name, one of the values of `SUFFIXES`, or None."""
    return next((kind for suffix, kind in SUFFIXES.items() if name.endswith(suffix)), None)


def loss_names(item: Input) -> set[str] | None:
    """Returns the names, as the pieces of a document carry them, that are trained on; None for all text."""
    if item.loss is None:
        return None
    return {(role_of(name) or name) if item.turns is not None else name for name in item.loss}


def nearest(word: str, choices: Iterable[str]) -> str:
    """Returns `; did you mean 'x'?` for the most similar choice, or the list of choices when none is similar."""
    choices = list(choices)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(choices)}."


def _check_retention(mixture: Mixture, retention: Retention, key: str) -> None:
    if not 0 < retention.share <= 1:
        raise InputError(
            f"{key}.share: {retention.share} must be above 0 and at most 1; for no retention write `none`."
        )
    shares = mixture.shares()
    for name in retention.sources:
        if name not in shares:
            raise InputError(f"{key}.sources: no source is called {name!r}{nearest(name, shares)}")
    found = sum(shares[name] for name in set(retention.sources))
    if found < retention.share - _SHARE_TOLERANCE:
        raise InputError(
            f"{key}.share: {', '.join(retention.sources) or 'no source'} make up {found:.2%} of the training tokens, "
            f"less than the retention share of {retention.share:.2%}; raise their weights or lower the share."
        )


def _check_held_out(mixture: Mixture, where: str) -> None:
    trained = {name: source.name for source in mixture.sources if source.weight > 0 for name in source.all_paths()}
    for source in mixture.sources:
        for name in source.all_paths():
            if source.weight == 0 and name in trained:
                raise InputError(
                    f"{where}: sources: {name} is held out by {source.name!r} (weight 0) and trained on by "
                    f"{trained[name]!r}; a held-out file that is trained on measures nothing."
                )


def _check_input(source: str, item: Input, key: str) -> None:
    if item.hub is not None and item.paths:
        raise InputError(f"{key}: source {source!r} has both paths and a hub; choose one, or list both as `inputs`.")
    if item.hub is None and not item.paths:
        raise InputError(f"{key}.paths: source {source!r} lists no files; name at least one.")
    if item.template is not None and item.turns is not None:
        raise InputError(f"{key}: source {source!r} has both a template and turns; choose one.")
    if item.template is not None:
        render_template(item.template, f"{key}.template")
    if item.loss is not None:
        _check_loss(item, item.loss, f"{key}.loss")
    for text in item.filter:
        Expression(text, f"{key}.filter")
    for name in item.paths:
        _check_file(name, f"{key}.paths")
        kind = file_kind(name)
        if kind in ("text", "tokens") and (item.filter or item.template is not None or item.turns is not None):
            raise InputError(f"{key}: {name} has no fields, so a filter, template or turns cannot apply to it.")


def _check_loss(item: Input, loss: list[str], key: str) -> None:
    if item.template is not None:
        what, known = "field of the template", render_template(item.template)[1]
    elif item.turns is not None:
        what, known = "role", role_names()
    else:
        raise InputError(
            f"{key}: names fields of a `template` or roles of `turns`, and there is neither; leave it out to train on "
            "the whole text."
        )
    if not loss:
        raise InputError(f"{key}: is empty, so nothing would be trained on; leave it out to train on the whole text.")
    for name in loss:
        if name not in known:
            raise InputError(f"{key}: {name!r} is no {what}{nearest(name, known)}")


def _check_file(name: str, key: str) -> None:
    file = Path(name)
    if not file.is_file():
        raise InputError(f"{key}: {file} does not exist or is not a file (for a folder, write a pattern).")
    kind = file_kind(name)
    if kind is None:
        raise InputError(f"{key}: {file} is of an unknown kind; known: {', '.join(SUFFIXES)}.")
    if kind == "tokens" and not file.with_suffix(".idx").is_file():
        raise InputError(f"{key}: {file} has no {file.stem}.idx beside it; tokens need both files.")


def _check_decontaminate(mixture: Mixture, wanted: Decontaminate, key: str) -> None:
    if not 2 <= wanted.ngram <= 100:
        raise InputError(f"{key}.ngram: {wanted.ngram} must be from 2 to 100 words; 13 is usual.")
    if not wanted.against:
        raise InputError(f"{key}.against: names no file; leave decontaminate out to look for no evaluation set.")
    read = {name: source.name for source in mixture.sources for name in source.all_paths()}
    for name in wanted.against:
        _check_file(name, f"{key}.against")
        if file_kind(name) == "tokens":
            raise InputError(f"{key}.against: {name} holds tokens; evaluation sets must be text.")
        if name in read:
            raise InputError(f"{key}.against: {name} is also read by source {read[name]!r}, which it would empty.")


def _size(name: str) -> int:
    return Path(name).stat().st_size
