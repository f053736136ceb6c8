"""Real text that is on every machine with Python: the standard library's sources, with their documentation strings.

It stands for general text at pocket size: large enough (about twelve million characters) that a small model can learn
it, and natural enough that forgetting it can be measured. Documentation strings stay inside their sources; as documents
of their own they would only repeat text. What comes out depends on the Python version and on nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from prism_nemo.errors import InputError

SPECIAL_TOKENS = ("<eos>", "<pad>", "<think>", "</think>")
"""Documents with one of these are left out: written in a text they would be read as control tokens."""

# Installed packages differ between machines; tests and codec tables are lists of data rather than text.
_SKIPPED = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "lib2to3", "encodings", "idlelib", "__pycache__")
)
_HELD_OUT_ONE_IN = 20


def write_general_corpus(
    out_dir: str | Path, max_chars: int | None = None, *, special_tokens: Sequence[str] = SPECIAL_TOKENS
) -> tuple[Path, Path]:
    """Writes `general.jsonl` and `general-heldout.jsonl`; the same Python version gives the same bytes.

    A file is held out if the MD5 of its relative name says so (one in twenty), so no text of a file is on both sides
    and a limit on the characters moves nothing from one side to the other.

    Args:
        out_dir: Created if missing.
        max_chars: Most characters in each of the two files; whole documents only. None writes everything.
        special_tokens: Documents that contain one of these strings are left out.

    Returns:
        The paths of the training and the held-out file; lines are `{"id": relative name, "text": source}`.

    Raises:
        InputError: `max_chars` has no room for a single document, or this Python has no library sources.
    """
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    paths = (folder / "general.jsonl", folder / "general-heldout.jsonl")
    lines: tuple[list[str], list[str]] = ([], [])
    used = [0, 0]
    for name, text in _library_documents(special_tokens):
        side = int(_is_held_out(name))
        # A document that does not fit is passed over, not cut: a smaller one further on may still fit.
        if max_chars is None or used[side] + len(text) <= max_chars:
            lines[side].append(json.dumps({"id": name, "text": text}, ensure_ascii=False) + "\n")
            used[side] += len(text)
    if not all(lines):
        raise InputError(
            f"max_chars: {max_chars} gives {len(lines[0])} training and {len(lines[1])} held-out documents from "
            f"{sysconfig.get_paths()['stdlib']}; raise it (a million is a good start)."
        )
    for path, content in zip(paths, lines, strict=True):
        temporary = path.with_name(f".tmp-{path.name}")
        temporary.write_text("".join(content), encoding="utf-8")
        os.replace(temporary, path)
    return paths


def _is_held_out(name: str) -> bool:
    return int.from_bytes(_digest(name)[:8]) % _HELD_OUT_ONE_IN == 0


def _digest(name: str) -> bytes:
    return hashlib.md5(name.encode("utf-8"), usedforsecurity=False).digest()


def _library_documents(special_tokens: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields relative names and texts, ordered by a hash, so that a limit takes a sample and not the letter a."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [file.relative_to(root) for file in root.rglob("*.py")]
    kept = [name.as_posix() for name in names if not _SKIPPED.intersection(name.parts)]
    # The last digest bytes, because the first ones decide the split.
    for name in sorted(kept, key=lambda item: (_digest(item)[8:], item)):
        try:
            text = (root / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # a few sources are in other encodings on purpose
        # One token of indentation instead of several: small vocabularies would spend a third of their ids on spaces.
        text = text.replace("    ", "\t")
        if text.strip() and not any(token in text for token in special_tokens):
            yield name, text
