"""FP8 by name: layers compute as without it, and note with which recipe they were to.

`noted` has, by linear layer, the recipe of its last forward pass and whether its weights were to be made in FP8.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..common.recipe import Recipe


@dataclass
class Note:
    """What a layer was asked to do in FP8."""

    made: Recipe | None = None
    ran: Recipe | None = None


noted: weakref.WeakKeyDictionary[Any, Note] = weakref.WeakKeyDictionary()
_running: list[Recipe] = []
_making: list[Recipe] = []


def note_made(layer: Any) -> None:
    """Called by a layer when it is made."""
    noted[layer] = Note(made=_making[-1] if _making else None)


def note_run(layer: Any) -> None:
    """Called by a layer in its forward pass."""
    noted[layer].ran = _running[-1] if _running else None


class FP8GlobalStateManager:
    """Asked by Megatron whether FP8 is on."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return bool(_running)


@contextmanager
def fp8_autocast(
    enabled: bool = True,
    calibrating: bool = False,
    fp8_recipe: Recipe | None = None,
    fp8_group: Any = None,
    _graph: bool = False,
) -> Iterator[None]:
    """Layers within run with the recipe; largest values are shared over the group."""
    if not enabled or calibrating or fp8_recipe is None or fp8_group is None:
        raise NotImplementedError
    _running.append(fp8_recipe)
    try:
        yield
    finally:
        _running.pop()


@contextmanager
def fp8_model_init(
    enabled: bool = True, recipe: Recipe | None = None, preserve_high_precision_init_val: bool = False
) -> Iterator[None]:
    """Layers that are made within hold their weights in FP8."""
    if not enabled or recipe is None:
        raise NotImplementedError
    _making.append(recipe)
    try:
        yield
    finally:
        _making.pop()
