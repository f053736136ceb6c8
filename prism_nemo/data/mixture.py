"""What a run trains on: sources with shares of tokens, read from YAML and checked before any work.

A mixture file (relative paths are relative to the file)::

    name: pocket
    retention: {share: 0.10, sources: [general]}    # or, said out loud: retention: none
    sources:
      - {name: math, domain: math, paths: [math/*.jsonl], weight: 0.6}
      - {name: general, domain: general, paths: [general.jsonl], weight: 0.4, max_epochs: 4}
      - {name: general-heldout, domain: general, paths: [heldout.jsonl], weight: 0}

`weight` is a share of training *tokens*, normalised over the sources; it does not follow the size of the files.
A source of weight 0 is tokenised but never trained on: held-out text.
"""

from __future__ import annotations

import difflib
import glob
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prism_nemo.errors import InputError

TEXT_SUFFIXES = (".txt", ".py")
"""One document per file."""

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz")
"""One document per line."""

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Shares such as 0.1 are not exact in binary; ten shares of 0.1 must still meet a retention share of 1.0.
_SHARE_TOLERANCE = 1e-9


@dataclass
class Source:
    """One stream of documents.

    Attributes:
        name: Unique; becomes part of file names.
        domain: What the text is about (`math`, `general`, ...); for reports and per-domain losses.
        paths: Files, or patterns in the YAML; absolute file names after `load_mixture`.
        weight: Share of training tokens before normalisation; 0 means built but never trained on.
        text_field: The key that holds the document in a JSONL line; unused for plain text.
        max_epochs: Refuse to train on this source for more passes than this; None means no limit.
    """

    name: str
    domain: str
    paths: list[str]
    weight: float
    text_field: str = "text"
    max_epochs: float | None = None


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
    """

    name: str
    sources: list[Source] = field(default_factory=list)
    retention: Retention | None = None

    def shares(self) -> dict[str, float]:
        """Returns each source's share of training tokens; the shares sum to 1."""
        total = sum(source.weight for source in self.sources)
        return {source.name: source.weight / total for source in self.sources}


def load_mixture(path: str | Path) -> Mixture:
    """Reads and checks a mixture; file patterns are expanded and sorted.

    Args:
        path: The YAML file.

    Raises:
        InputError: Anything is wrong with the file or with what it names; the message has the file and the key.
    """
    path = Path(path)
    raw = _read_yaml(path)
    where = str(path)
    _check_keys(raw, Mixture, where)
    if "retention" not in raw:
        raise InputError(
            f"{where}: retention: missing. Name the general sources that protect the base model's abilities, "
            "`retention: {share: 0.10, sources: [...]}`, or write `retention: none` if no retention is wanted."
        )
    entries = raw.get("sources")
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{where}: sources: must be a list with at least one source, found {entries!r}.")
    sources = [_source(entry, f"{where}: sources[{i}]", path.parent) for i, entry in enumerate(entries)]
    mixture = Mixture(
        _text(raw.get("name"), f"{where}: name"), sources, _retention(raw["retention"], f"{where}: retention")
    )
    check_mixture(mixture, where)
    return mixture


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
        _check_files(source, key)
    if not any(source.weight > 0 for source in mixture.sources):
        raise InputError(f"{where}: sources: every weight is 0, so there is nothing to train on; give one a weight.")
    _check_held_out(mixture, where)
    if mixture.retention is not None:
        _check_retention(mixture, mixture.retention, f"{where}: retention")


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
    trained = {name: source.name for source in mixture.sources if source.weight > 0 for name in source.paths}
    for source in mixture.sources:
        for name in source.paths:
            if source.weight == 0 and name in trained:
                raise InputError(
                    f"{where}: sources: {name} is held out by {source.name!r} (weight 0) and trained on by "
                    f"{trained[name]!r}; a held-out file that is trained on measures nothing."
                )


def _check_files(source: Source, key: str) -> None:
    if not source.paths:
        raise InputError(f"{key}.paths: source {source.name!r} lists no files; name at least one.")
    for name in source.paths:
        file = Path(name)
        if not file.is_file():
            raise InputError(f"{key}.paths: {file} does not exist or is not a file (for a folder, write a pattern).")
        if not name.endswith(JSONL_SUFFIXES + TEXT_SUFFIXES):
            raise InputError(
                f"{key}.paths: {file} is of an unknown kind; known: {', '.join(JSONL_SUFFIXES + TEXT_SUFFIXES)}."
            )
    if not any(Path(name).stat().st_size for name in source.paths):
        raise InputError(f"{key}.paths: source {source.name!r} is empty: all of its {len(source.paths)} file(s) are.")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such mixture file; check the path.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as err:
        raise InputError(f"{path}: cannot be read as YAML: {err}") from err
    if not isinstance(raw, dict) or not raw:
        raise InputError(f"{path}: must be a mapping with the keys {', '.join(_names(Mixture))}.")
    return {str(key): value for key, value in raw.items()}


def _source(entry: Any, key: str, folder: Path) -> Source:
    if not isinstance(entry, dict):
        raise InputError(f"{key}: must be a mapping with the keys {', '.join(_names(Source))}, found {entry!r}.")
    _check_keys(entry, Source, key)
    limit = entry.get("max_epochs")
    return Source(
        name=_text(entry.get("name"), f"{key}.name"),
        domain=_text(entry.get("domain"), f"{key}.domain"),
        paths=_files(entry.get("paths"), f"{key}.paths", folder),
        weight=_number(entry.get("weight"), f"{key}.weight"),
        # The default lives in the dataclass alone.
        **({"text_field": _text(entry["text_field"], f"{key}.text_field")} if "text_field" in entry else {}),
        max_epochs=None if limit is None else _number(limit, f"{key}.max_epochs"),
    )


def _retention(entry: Any, key: str) -> Retention | None:
    if entry == "none":
        return None
    if not isinstance(entry, dict):
        raise InputError(f"{key}: found {entry!r}; write `{{share: 0.10, sources: [...]}}`, or the word `none`.")
    _check_keys(entry, Retention, key)
    sources = entry.get("sources")
    if not isinstance(sources, list) or not sources:
        raise InputError(f"{key}.sources: must list the names of the general sources, found {sources!r}.")
    return Retention(_number(entry.get("share"), f"{key}.share"), [str(name) for name in sources])


def _files(value: Any, key: str, folder: Path) -> list[str]:
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, list) or not all(isinstance(item, str) and item for item in patterns):
        raise InputError(f"{key}: must be a list of files or patterns, found {value!r}.")
    found: set[str] = set()  # two patterns that overlap must not read a file twice
    for pattern in patterns:
        full = (folder / Path(pattern).expanduser()).resolve()
        # A file whose real name has brackets or a star is taken as it stands.
        candidates = [str(full)] if full.exists() else glob.glob(str(full), recursive=True)
        matches = [match for match in candidates if full.exists() or Path(match).is_file()]
        if not matches:
            raise InputError(f"{key}: {pattern!r} matches no file (looked for {full}).")
        found.update(matches)
    return sorted(found)


def _check_keys(entry: Mapping[Any, Any], cls: type, where: str) -> None:
    known = _names(cls)
    for key in entry:
        if key not in known:
            raise InputError(f"{where}: unknown key {str(key)!r}{nearest(str(key), known)}")


def _names(cls: type) -> list[str]:
    return [item.name for item in fields(cls)]


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value:
        raise InputError(f"{key}: must be text and not empty, found {value!r}.")
    return value


def _number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{key}: must be a number, found {value!r}.")
    return float(value)
