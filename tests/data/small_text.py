"""Text to build small sources from. Not in conftest.py, whose name other folders of tests use as well."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

SPECIAL = ("<pad>", "<eos>", "<think>", "</think>")


def words(letters: str, count: int, seed: int) -> str:
    """Returns `count` random words over an alphabet."""
    rng = random.Random(seed)
    return " ".join("".join(rng.choices(letters, k=rng.randint(1, 7))) for _ in range(count))


def write_jsonl(path: Path, texts: Sequence[str], field: str = "text") -> Path:
    """Writes one document per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def seed_of(name: str) -> int:
    """A number from a name that is the same in every process."""
    return int.from_bytes(name.encode())
