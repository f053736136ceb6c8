"""A mixture of text files becomes one Megatron IndexedDataset per source, and a manifest.

A source's token files carry the fingerprint of their content in the name (`math-3f2a9c01d4e7.bin`). So a changed source
never overwrites files that a running job has open, and Megatron's index caches, which are keyed by path and not by
content, can never be stale. A source counts as built once its `.json` lies beside its tokens, the mixture once
`manifest.json` names them all; a build killed in between continues with the source it was at.

Not covered yet: Parquet, deduplication, decontamination, packing, several processes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

from prism_nemo import __version__
from prism_nemo.data.documents import file_sha256, read_documents
from prism_nemo.data.manifest import (
    MANIFEST,
    BuiltSource,
    BuiltTokenizer,
    InputFile,
    Manifest,
    damage,
    describe,
    load_manifest,
    source_from_json,
)
from prism_nemo.data.mixture import JSONL_SUFFIXES, Mixture, Source, check_mixture
from prism_nemo.data.tokenizer import Tokenizer
from prism_nemo.errors import InputError

__all__ = ["Manifest", "build_mixture", "describe", "load_manifest"]

# Part of every fingerprint: raise it when the same text would give different stored tokens.
_RECIPE = 1
_TEMPORARY = ".tmp-"
# Large enough that the Rust tokenizer's threads have work, small enough that a batch of books fits in memory.
_BATCH_CHARACTERS = 1_000_000


def build_mixture(
    mixture: Mixture, tokenizer: Tokenizer, out_dir: str | Path, *, progress: Callable[[str], None] | None = None
) -> Manifest:
    """Tokenises what is new or changed; a second call with the same inputs writes nothing. One process at a time.

    Args:
        mixture: From `load_mixture`.
        tokenizer: From `load_tokenizer`.
        out_dir: Created if missing; belongs to this mixture: token files of sources that left it are removed.
        progress: Receives one line of text per source, and one per million characters.

    Returns:
        The manifest; `rebuilt` names the sources that were written by this call, empty where there was nothing to do.

    Raises:
        InputError: The mixture is wrong, a document cannot be read (file and line), or a source has no tokens.
    """
    say = progress or (lambda line: None)
    folder = Path(out_dir).resolve()
    check_mixture(mixture, f"mixture {mixture.name!r}")
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{_TEMPORARY}*"):  # of a build that was killed
        leftover.unlink()

    built, rebuilt = [], []
    for source in mixture.sources:
        inputs = [InputFile(name, file_sha256(name), Path(name).stat().st_size) for name in source.paths]
        fingerprint = _fingerprint(source, inputs, tokenizer)
        item = _finished(folder, source, fingerprint)
        if item is None:
            item = _build_source(folder, source, inputs, fingerprint, tokenizer, say)
            rebuilt.append(source.name)
        else:
            say(f"{source.name}: unchanged, {item.documents:,} documents, {item.tokens:,} tokens kept")
        # Weight, limit and the place of the files may change without touching the tokens.
        built.append(
            replace(item, domain=source.domain, weight=source.weight, max_epochs=source.max_epochs, inputs=inputs)
        )
    manifest = Manifest(
        dir=folder,
        mixture=mixture.name,
        retention=None if mixture.retention is None else asdict(mixture.retention),
        tokenizer=BuiltTokenizer(
            str(tokenizer.path.resolve()), tokenizer.sha256, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id
        ),
        versions={"prism_nemo": __version__, **{name: version(name) for name in ("megatron-core", "tokenizers")}},
        sources=built,
        rebuilt=tuple(rebuilt),
    )
    file = folder / MANIFEST
    text = manifest.to_json()
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        _write_atomically(file, text)
    _remove_orphans(folder, {item.prefix for item in built})
    if not rebuilt:
        say(f"{folder}: nothing to do, all {len(built)} sources are up to date")
    return manifest


def _build_source(
    folder: Path,
    source: Source,
    inputs: list[InputFile],
    fingerprint: str,
    tokenizer: Tokenizer,
    say: Callable[[str], None],
) -> BuiltSource:
    # Imported here because it loads torch, which checking a mixture or showing a manifest does not need.
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    prefix = f"{source.name}-{fingerprint[:12]}"
    bin_file, idx_file = (folder / f"{_TEMPORARY}{prefix}{suffix}" for suffix in (".bin", ".idx"))
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(str(bin_file), dtype=dtype)
    documents = tokens = characters = 0
    try:
        for batch in _batches(read_documents(source)):
            for ids in tokenizer.encode_batch(batch):
                ids.append(tokenizer.eos_id)
                builder.add_document(ids, [len(ids)])
                tokens += len(ids)
            documents += len(batch)
            characters += sum(map(len, batch))
            say(f"{source.name}: {documents:,} documents, {tokens:,} tokens")
        if not documents:
            raise InputError(f"source {source.name!r}: its {len(inputs)} file(s) hold no text, so it has no tokens.")
        builder.finalize(str(idx_file))
    except BaseException:
        builder.data_file.close()
        bin_file.unlink(missing_ok=True)
        raise
    for file, suffix in ((bin_file, ".bin"), (idx_file, ".idx")):
        _sync(file)
        os.replace(file, folder / (prefix + suffix))
    item = BuiltSource(
        name=source.name,
        domain=source.domain,
        weight=source.weight,
        max_epochs=source.max_epochs,
        documents=documents,
        tokens=tokens,
        characters=characters,
        dtype=dtype.__name__,
        fingerprint=fingerprint,
        prefix=prefix,
        inputs=inputs,
    )
    # Last: this file says that the pair is whole.
    _write_atomically(folder / f"{prefix}.json", json.dumps(asdict(item), indent=2) + "\n")
    return item


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _fingerprint(source: Source, inputs: list[InputFile], tokenizer: Tokenizer) -> str:
    """Over what decides the tokens; not over where the files lie or what the source weighs."""
    kinds = ["jsonl" if item.path.endswith(JSONL_SUFFIXES) else "text" for item in inputs]
    content = [
        _RECIPE,
        [[kind, item.sha256] for kind, item in zip(kinds, inputs, strict=True)],
        source.text_field if "jsonl" in kinds else None,
        [tokenizer.sha256, tokenizer.eos_id],
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _finished(folder: Path, source: Source, fingerprint: str) -> BuiltSource | None:
    file = folder / f"{source.name}-{fingerprint[:12]}.json"
    try:
        item = source_from_json(json.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return None if item.fingerprint != fingerprint or damage(folder, item) else item


def _remove_orphans(folder: Path, prefixes: set[str]) -> None:
    """Removes the token files of changed or dropped sources; only triples that a build here has finished."""
    for file in folder.glob("*.json"):
        pair = [file.with_name(file.stem + suffix) for suffix in (".bin", ".idx")]
        if file.name != MANIFEST and file.stem not in prefixes and all(item.is_file() for item in pair):
            for item in (file, *pair):
                item.unlink()


def _write_atomically(file: Path, text: str) -> None:
    temporary = file.with_name(f"{_TEMPORARY}{file.name}")
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    os.replace(temporary, file)


def _sync(file: Path) -> None:
    # A rename can reach the disk before the data it names; after a power cut that is a whole-looking file of zeros.
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())
