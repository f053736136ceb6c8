"""Several models to look into: whether they are one function, and what to call them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prism_nemo.errors import InputError
from prism_nemo.evaluation.engines.open import architecture_of
from prism_nemo.models.family import Architecture


def same_architecture(paths: Sequence[Path]) -> Architecture:
    """The architecture of checkpoints that must all be one function.

    Raises:
        InputError: Naming the checkpoint and all fields in which it differs from the first.
    """
    first = architecture_of(paths[0])
    for path in paths[1:]:
        different = first.differences(architecture_of(path))
        if different:
            raise InputError(f"{path}: is another architecture than {paths[0]}: {'; '.join(different)}")
    return first


def names_of(paths: Sequence[Path]) -> list[str]:
    """Short names that tell checkpoints apart: the last parts of their paths, as many as it takes.

    Raises:
        InputError: If one is named twice.
    """
    whole = [path.resolve() for path in paths]
    if len(set(whole)) != len(whole):
        twice = next(path for path in paths if whole.count(path.resolve()) > 1)
        raise InputError(f"{twice}: is named twice; name different checkpoints")
    for parts in range(1, max(len(path.parts) for path in whole) + 1):
        names = ["/".join(path.parts[-parts:]) for path in whole]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]
