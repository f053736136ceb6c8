"""What a build produced: `manifest.json`, and what training on it would mean in shares and epochs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prism_nemo.data.mixture import nearest
from prism_nemo.errors import InputError

MANIFEST = "manifest.json"
FORMAT = 3
"""Of what is written. Formats 1 (no reports, deduplication, decontamination) and 2 (no loss masks) are still read."""

_READABLE = (1, 2, 3)


@dataclass
class InputFile:
    """One file that went into a source."""

    path: str
    sha256: str
    bytes: int


@dataclass
class BuiltSource:
    """One source after tokenising.

    Attributes:
        name: As in the mixture.
        domain: As in the mixture.
        weight: As in the mixture, before normalisation.
        max_epochs: As in the mixture.
        documents: Number of documents with at least one character.
        tokens: Including one end-of-document token per document.
        characters: Of the text, before tokenising.
        dtype: numpy name of the stored ids, `uint16` or `int32`.
        fingerprint: Over everything that decides the stored tokens: input bytes, text field, tokenizer, format.
        prefix: File name of the `.bin` and `.idx` pair without suffix, inside the build folder; with a loss mask there
            is a `.loss` as well, one byte (0 or 1) for every token of the `.bin`, in its order.
        inputs: The files read.
        report: What was left out, as `removed.add_reports` gives it; empty for a build of format 1.
        loss_tokens: Of `tokens`, those that the loss counts; None where there is no mask and all of them count.
        max_tokens: As in the mixture; with it, `inputs` are the files up to the one where it was reached.
    """

    name: str
    domain: str
    weight: float
    max_epochs: float | None
    documents: int
    tokens: int
    characters: int
    dtype: str
    fingerprint: str
    prefix: str
    inputs: list[InputFile]
    report: dict[str, Any] = field(default_factory=dict)
    loss_tokens: int | None = None
    max_tokens: int | None = None


@dataclass
class BuiltTokenizer:
    """The tokenizer that a build used."""

    path: str
    sha256: str
    vocab_size: int
    eos_id: int
    pad_id: int


@dataclass
class Manifest:
    """A finished build.

    Attributes:
        dir: Absolute path of the build folder; not stored, so that the folder can be moved.
        mixture: The mixture's name.
        retention: `{"share": ..., "sources": [...]}`, or None where the mixture says `none`.
        tokenizer: What encoded the text.
        versions: Of prism-nemo, megatron-core and tokenizers at the time.
        sources: In the order of the mixture.
        deduplicate: The mixture's rule, or None.
        decontaminate: The evaluation files with their hashes, how many texts were looked for and how many were too
            short; or None.
        rebuilt: Names of the sources that this call of `build_mixture` wrote; not stored, empty when loaded.
    """

    dir: Path
    mixture: str
    retention: dict[str, Any] | None
    tokenizer: BuiltTokenizer
    versions: dict[str, str]
    sources: list[BuiltSource]
    deduplicate: dict[str, Any] | None = None
    decontaminate: dict[str, Any] | None = None
    rebuilt: tuple[str, ...] = field(default=(), compare=False)

    def source(self, name: str) -> BuiltSource:
        """Returns a source by name.

        Raises:
            InputError: No such source; the message has the nearest name.
        """
        for item in self.sources:
            if item.name == name:
                return item
        names = [item.name for item in self.sources]
        raise InputError(f"{self.dir / MANIFEST}: no source is called {name!r}{nearest(name, names)}")

    def prefix(self, name: str) -> str:
        """Returns the absolute path prefix that Megatron's IndexedDataset takes for a source."""
        return str(self.dir / self.source(name).prefix)

    def to_json(self) -> str:
        """Returns the content of `manifest.json`; the same build gives the same bytes."""
        content = asdict(self)
        del content["dir"], content["rebuilt"]
        return json.dumps({"format": FORMAT, **content}, indent=2, ensure_ascii=False) + "\n"


@dataclass
class SourceShare:
    """What a source contributes to a run.

    Attributes:
        name: The source.
        domain: Its domain.
        share: Of the training tokens; the shares sum to 1.
        available_tokens: One pass over the source.
        train_tokens: share x tokens to train.
        epochs: train_tokens / available_tokens.
        max_epochs: The limit of the mixture, or None.
    """

    name: str
    domain: str
    share: float
    available_tokens: int
    train_tokens: float
    epochs: float
    max_epochs: float | None

    @property
    def over_limit(self) -> bool:
        """Whether the run would repeat this source more often than the mixture allows."""
        return self.max_epochs is not None and self.epochs > self.max_epochs


def load_manifest(dir: str | Path) -> Manifest:
    """Reads a build folder and checks that its token files are there and whole.

    Raises:
        InputError: Not a finished build, or a token file is missing or of the wrong size.
    """
    folder = Path(dir).resolve()
    file = folder / MANIFEST
    if not file.is_file():
        raise InputError(f"{file}: not found, so {folder} holds no finished build; run `prism-nemo data build` first.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] not in _READABLE:
            raise InputError(
                f"{file}: format {content['format']}, this version reads {_READABLE[0]} to {FORMAT}; build the data "
                "again."
            )
        manifest = Manifest(
            dir=folder,
            mixture=content["mixture"],
            retention=content["retention"],
            tokenizer=BuiltTokenizer(**content["tokenizer"]),
            versions=content["versions"],
            sources=[source_from_json(item) for item in content["sources"]],
            deduplicate=content.get("deduplicate"),
            decontaminate=content.get("decontaminate"),
        )
    except (ValueError, KeyError, TypeError) as err:
        raise InputError(f"{file}: is damaged ({err!r}); build the data again.") from err
    for item in manifest.sources:
        problem = damage(folder, item)
        if problem:
            raise InputError(f"{folder / item.prefix}: {problem}; build the data again.")
    return manifest


def describe(manifest: Manifest, tokens_to_train: float, include: Iterable[str] | None = None) -> list[SourceShare]:
    """Returns what each source contributes to a run of `tokens_to_train` tokens; weight 0 gives share and epochs 0.

    Args:
        manifest: From `build_mixture` or `load_manifest`.
        tokens_to_train: Tokens that the run sees, all sources together.
        include: Names to keep; their shares are normalised anew. None keeps all.

    Raises:
        InputError: An unknown name, or weights that sum to 0.
    """
    chosen = manifest.sources if include is None else [manifest.source(name) for name in dict.fromkeys(include)]
    total = sum(item.weight for item in chosen)
    if not total > 0:
        names = ", ".join(item.name for item in chosen) or "no source"
        raise InputError(f"{manifest.dir / MANIFEST}: the weights of {names} sum to 0; there is nothing to train on.")
    rows = []
    for item in chosen:
        share = item.weight / total
        train = share * tokens_to_train
        rows.append(
            SourceShare(item.name, item.domain, share, item.tokens, train, train / item.tokens, item.max_epochs)
        )
    return rows


def source_from_json(item: dict[str, Any]) -> BuiltSource:
    """Returns the source that a mapping from `manifest.json` describes."""
    return BuiltSource(**{**item, "inputs": [InputFile(**entry) for entry in item["inputs"]]})


def damage(folder: Path, item: BuiltSource) -> str | None:
    """Returns what is wrong with the token files of a source, or None."""
    sizes = {".bin": item.tokens * (2 if item.dtype == "uint16" else 4), ".idx": None}
    if item.loss_tokens is not None:
        sizes[".loss"] = item.tokens
    for suffix, size in sizes.items():
        file = folder / (item.prefix + suffix)
        if not file.is_file():
            return f"{file.name} is missing"
        if size is not None and file.stat().st_size != size:
            return f"{file.name} has {file.stat().st_size} bytes instead of {size}"
    return None
