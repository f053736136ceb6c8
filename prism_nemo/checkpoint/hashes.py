"""SHA-256 of a checkpoint's files: made after writing, compared before training goes on from them.

A file of the right size can still be wrong: a flipped bit on a disk, a block of zeros, a copy that went on from the
wrong place. Loading such a file succeeds, and the run is wrong from there. The files are shared out over the ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch.distributed as dist

from prism_nemo.checkpoint.atomic import HASHES, MANIFEST, read_manifest
from prism_nemo.errors import InputError


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_below(folder: Path) -> list[str]:
    """Names, relative to `folder`, of all files below it but the manifest; the same order on every rank."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != MANIFEST)


def shared_hashes(folder: Path, names: Iterable[str], known: dict[str, str] | None = None) -> dict[str, str]:
    """SHA-256 of some files, each read by one rank; every rank calls this and gets all of them.

    Args:
        folder: Where the files lie; every rank sees the same.
        names: Relative to it, in the same order on every rank. A file that cannot be read is left out.
        known: What this rank has hashed already; nobody reads these files again.
    """
    done = _gathered(known) if known is not None else {}
    found: dict[str, str] = {}
    for name in [name for name in names if name not in done][dist.get_rank() :: dist.get_world_size()]:
        try:
            found[name] = sha256(folder / name)
        except OSError:
            continue
    return {**done, **_gathered(found)}


def _gathered(own: dict[str, str]) -> dict[str, str]:
    everyone: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, own)
    return {name: value for part in everyone for name, value in part.items()}


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None; every rank calls this and gets the same answer.

    A checkpoint without recorded hashes (written before there were any) is only looked at for sizes.
    """
    try:
        recorded = read_manifest(checkpoint).get(HASHES, {})
    except InputError as error:
        return str(error)
    found = shared_hashes(checkpoint, sorted(recorded))
    for name in sorted(recorded):
        if name not in found:
            return f"{checkpoint / name}: cannot be read"
        if found[name] != recorded[name]:
            return f"{checkpoint / name}: its SHA-256 is not the one in {MANIFEST}: the file has changed or is damaged"
    return None
