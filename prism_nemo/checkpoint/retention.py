"""Which checkpoints of a run stay: the newest few, and every n-th step for ever."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from prism_nemo.checkpoint.atomic import read_manifest, temporary_name
from prism_nemo.errors import InputError


def step_of(checkpoint: Path) -> int | None:
    """Step in a checkpoint's name, or None if it is no such name."""
    match = re.fullmatch(r"step_(\d{8,})", checkpoint.name)
    return int(match[1]) if match else None


def is_complete(checkpoint: Path) -> bool:
    """Whether the manifest is there and every file has its size."""
    try:
        read_manifest(checkpoint)
    except InputError:
        return False
    return True


def remove_old(checkpoints: Path, keep: int, keep_every: int | None = None) -> list[Path]:
    """Delete the complete checkpoints that no rule keeps.

    The newest complete one always stays, and what is incomplete is neither counted nor touched. A folder loses its
    name before its files: whoever is killed in the middle leaves a leftover, not half a checkpoint.

    Args:
        checkpoints: Folder of a run.
        keep: How many of the newest stay.
        keep_every: Steps that are a multiple of this stay for ever.

    Returns:
        What was deleted.
    """
    complete = sorted((step, path) for path in checkpoints.iterdir() if (step := step_of(path)) and is_complete(path))
    removed = []
    for step, path in complete[: -max(1, keep)]:
        if keep_every and step % keep_every == 0:
            continue
        leftover = temporary_name(path)
        try:
            os.rename(path, leftover)
        except OSError:
            continue  # somebody else removed or renamed it
        shutil.rmtree(leftover, ignore_errors=True)
        removed.append(path)
    return removed
