"""Directories and files that exist whole or not at all.

A save goes into a fresh temporary directory; it is verified, given a manifest, synced to disk and renamed. Readers
accept only renamed directories with a manifest whose files have the recorded sizes. So a kill or a full disk at any
instant leaves the previous checkpoint as it was. (Megatron's own completeness check says True for a save that was
killed while it overwrote an older, complete checkpoint.)
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import psutil

from prism_nemo.errors import InputError, PrismError

MANIFEST = "manifest.json"
HASHES = "sha256"  # key of the manifest: SHA-256 by file, beside the sizes in "files"
ORIGIN = "prism_nemo_export.json"  # in a Hugging Face folder: the checkpoint that it was exported from
_TEMPORARY = ".tmp-"


def temporary_name(final: Path) -> Path:
    """The directory to write into before `publish`."""
    return final.with_name(f"{final.name}{_TEMPORARY}{os.getpid()}")


def sync(path: Path) -> None:
    """Wait until a file or directory is on disk.

    A rename can reach the disk before the data it names; after a power cut that is a whole-looking file of zeros.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader, or a power cut, finds the old content or the new, never half of it."""
    temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{path.name}")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def publish(temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Make a complete temporary directory the final one.

    Args:
        temporary: Directory with every file written.
        final: Name that readers look for; must not exist.
        manifest: Recorded beside the sizes of all files; with `HASHES` if the SHA-256 of every file is known.

    Raises:
        InputError: If `final` exists.
        PrismError: If a file has no hash, where there are hashes.
    """
    if final.exists():
        raise InputError(f"{final}: already exists; remove it or choose another name")
    files = sorted(p for p in temporary.rglob("*") if p.is_file())
    record = {**manifest, "files": {str(p.relative_to(temporary)): p.stat().st_size for p in files}}
    if HASHES in record:
        unhashed = sorted(record["files"].keys() ^ record[HASHES].keys())
        if unhashed:
            raise PrismError(f"{temporary / unhashed[0]}: was written, but could not be read back")
    (temporary / MANIFEST).write_text(json.dumps(record, indent=2) + "\n")
    publish_folder(temporary, final)


def publish_folder(temporary: Path, final: Path) -> None:
    """Bring a complete temporary directory to disk and give it its final name.

    Raises:
        InputError: If `final` exists.
    """
    if os.path.lexists(final):
        raise InputError(f"{final}: already exists; remove it or choose another name")
    # Files before the folders that name them.
    for path in sorted(temporary.rglob("*"), key=lambda p: (p.is_dir(), -len(p.parts))):
        sync(path)
    sync(temporary)
    os.rename(temporary, final)
    sync(final.parent)


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read and check the manifest of a published directory.

    Raises:
        InputError: If the directory is not a published checkpoint, or a file is missing or has another size.
    """
    path = directory / MANIFEST
    if _TEMPORARY in directory.name or not path.is_file():
        raise InputError(f"{directory}: not a complete prism-nemo checkpoint ({MANIFEST} is missing)")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        files = dict(manifest.get("files", {}))
    except (ValueError, TypeError, AttributeError) as error:  # also bytes that are no text
        raise InputError(f"{path}: not valid JSON: {error}") from error
    for name, size in files.items():
        file = directory / name
        if not file.is_file():
            raise InputError(f"{file}: missing from the checkpoint; copy the whole directory again")
        if file.stat().st_size != size:
            raise InputError(f"{file}: has {file.stat().st_size} bytes, the manifest says {size}; copy it again")
    return manifest


def remove_leftovers(final: Path, alone: bool = False) -> list[Path]:
    """Delete temporary directories that killed saves of this name, or of other steps of the same run, left behind.

    Only names that `temporary_name` makes are touched, and none whose process is still alive.

    Args:
        final: Name of a checkpoint.
        alone: It is known that no other process writes here (see prism_nemo/checkpoint/lock.py): a living process of
            the same id is another one.

    Returns:
        What was removed.
    """
    name = r"step_\d{8}" if re.fullmatch(r"step_\d{8}", final.name) else re.escape(final.name)
    pattern = re.compile(name + re.escape(_TEMPORARY) + r"(\d+)")
    removed = []
    for path in final.parent.iterdir() if final.parent.is_dir() else ():
        match = pattern.fullmatch(path.name)
        if match and path.is_dir() and (alone or not _alive(int(match[1]))):
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path)
    return removed


def _alive(pid: int) -> bool:
    """Whether another process has this id; our own leftovers are from before."""
    return pid != os.getpid() and psutil.pid_exists(pid)
