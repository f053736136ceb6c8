"""See the package."""

from . import base

__all__ = ["base"]
