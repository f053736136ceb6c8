"""Recipes: what they are called and what they are told. They ignore names that they do not know, as the real ones do.

(Those are dataclasses of pydantic's, which drops unknown arguments without a word: so a misspelt one would be, too.)
"""

from __future__ import annotations

import enum
from typing import Any, ClassVar


class Format(enum.Enum):
    """By name only."""

    E4M3 = "e4m3"
    E5M2 = "e5m2"
    HYBRID = "hybrid"


class Recipe:
    """Fields with their defaults are in `defaults`."""

    defaults: ClassVar[dict[str, Any]] = {}

    def __init__(self, **given: Any) -> None:
        for name, value in self.defaults.items():
            setattr(self, name, given.get(name, value))

    def told(self) -> dict[str, Any]:
        """Every field; a format by its name."""
        values = {name: getattr(self, name) for name in self.defaults}
        return {name: value.name if isinstance(value, Format) else value for name, value in values.items()}


class DelayedScaling(Recipe):
    defaults: ClassVar[dict[str, Any]] = {
        "margin": 0,
        "fp8_format": Format.HYBRID,
        "amax_history_len": 1024,
        "amax_compute_algo": "max",
        "scaling_factor_compute_algo": None,
        "reduce_amax": True,
        "fp8_dpa": False,
        "fp8_mha": False,
    }


class Float8CurrentScaling(Recipe):
    defaults: ClassVar[dict[str, Any]] = {"fp8_format": Format.HYBRID, "fp8_dpa": False, "fp8_mha": False}


class Float8BlockScaling(Recipe):
    defaults: ClassVar[dict[str, Any]] = {"fp8_format": Format.E4M3, "fp8_dpa": False, "fp8_mha": False}


class MXFP8BlockScaling(Recipe):
    defaults: ClassVar[dict[str, Any]] = {"margin": 0, "fp8_format": Format.E4M3, "fp8_dpa": False, "fp8_mha": False}
