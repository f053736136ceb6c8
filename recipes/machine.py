"""What a machine is; apart from `recipes.hardware`, so that a file of recipes holds no class of its own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """What a stage runs on.

    Attributes:
        gpu: Type, as `prism_nemo.planning.hardware` names it; None for processes on a CPU.
        nodes: Number of them.
        per_node: GPUs, or processes, of each.
    """

    gpu: str | None
    nodes: int
    per_node: int

    @property
    def processes(self) -> int:
        """Of all nodes."""
        return self.nodes * self.per_node
