"""The parts of a model that one process holds under a virtual pipeline, saved and loaded as one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from prism_nemo.models.decoder import LanguageModel
from prism_nemo.models.family import Architecture


class ModelParts(torch.nn.ModuleList):
    """Parts in the order of their layers.

    In memory every part counts its layers from 0, so the parts' state dicts lie side by side under ``part0``, ``part1``
    and so on. In a checkpoint they have Megatron's keys, which know of no parts: it loads at any layout.
    """

    def __init__(self, parts: list[LanguageModel]) -> None:
        super().__init__(parts)

    @property
    def architecture(self) -> Architecture:
        """Of the whole model."""
        return self._parts[0].architecture

    @property
    def config(self) -> Any:
        """Megatron's configuration, which the parts share."""
        return self._parts[0].config

    def sharded_state_dict(self, metadata: dict[str, Any] | None = None) -> dict[str, Any]:
        """The parts' sharded state dicts."""
        return {f"part{i}": part.sharded_state_dict(metadata=metadata) for i, part in enumerate(self._parts)}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what `sharded_state_dict` described.

        Returns:
            Missing and unexpected names, as torch.nn.Module.load_state_dict.
        """
        missing, unexpected = [], [name for name in state_dict if name not in self._names()]
        for name, part in zip(self._names(), self._parts, strict=True):
            result = part.load_state_dict(state_dict.get(name, {}), strict=strict, assign=assign)
            missing += [f"{name}.{key}" for key in result.missing_keys]
            unexpected += [f"{name}.{key}" for key in result.unexpected_keys]
        return torch.nn.modules.module._IncompatibleKeys(missing, unexpected)

    @property
    def _parts(self) -> list[LanguageModel]:
        return list(self)  # type: ignore[arg-type]

    def _names(self) -> list[str]:
        return [f"part{i}" for i in range(len(self))]
