"""What a model family must say, the architecture it yields, and the registry.

A family reads a Hugging Face ``config.json``, refuses whatever it cannot represent, and gives one table of weight
mappings. Sizes are data, never code.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from prism_nemo.errors import InputError
from prism_nemo.models.weights import WeightMapping


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding.

    Attributes:
        theta: Base of the frequencies.
        scaling: None, or the values of a "linear" or "llama3" scaling (``rope_type``, ``factor``, ...).
    """

    theta: float = 10000.0
    scaling: dict[str, Any] | None = None


@dataclass(frozen=True)
class Architecture:
    """A decoder, in Megatron's terms; independent of the layout over processes.

    Attributes:
        family: Name in the registry.
        ffn_hidden_size: Width of the MLP (of each of gate and up).
        kv_channels: Head dimension.
        tied_embeddings: Whether the output layer is the embedding.
        hf_config: The Hugging Face configuration, kept so that an export says what the import read.
    """

    family: str
    vocab_size: int
    hidden_size: int
    ffn_hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    norm_epsilon: float
    tied_embeddings: bool
    max_position_embeddings: int
    rope: Rope = field(default_factory=Rope)
    hf_config: dict[str, Any] = field(default_factory=dict)

    def differences(self, other: Architecture) -> list[str]:
        """Fields in which two architectures are not the same function, as ``name: ours, theirs``."""
        skipped = {"hf_config", "max_position_embeddings"}
        return [
            f"{f.name}: {getattr(self, f.name)}, {getattr(other, f.name)}"
            for f in fields(self)
            if f.name not in skipped and getattr(self, f.name) != getattr(other, f.name)
        ]

    def padded_vocab_size(self, tensor_model_parallel_size: int) -> int:
        """Vocabulary rounded up so that every tensor-parallel rank holds the same number of rows."""
        size = tensor_model_parallel_size
        return (self.vocab_size + size - 1) // size * size

    def check_layout(self, tensor_model_parallel_size: int, pipeline_model_parallel_size: int) -> None:
        """Refuse a layout that this architecture cannot have.

        Raises:
            InputError: Naming the sizes that would work.
        """
        tp, pp = tensor_model_parallel_size, pipeline_model_parallel_size
        if self.num_attention_heads % tp or self.num_query_groups % tp or self.ffn_hidden_size % tp:
            works = [
                n
                for n in range(1, self.num_query_groups + 1)
                if not (self.num_attention_heads % n or self.num_query_groups % n or self.ffn_hidden_size % n)
            ]
            raise InputError(
                f"tensor_model_parallel_size {tp} does not divide {self.num_attention_heads} attention heads, "
                f"{self.num_query_groups} key/value heads and MLP width {self.ffn_hidden_size}; these do: {works}"
            )
        if self.num_layers % pp:
            works = [n for n in range(1, self.num_layers + 1) if self.num_layers % n == 0]
            raise InputError(
                f"pipeline_model_parallel_size {pp} does not divide {self.num_layers} layers; these do: {works}"
            )

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for the checkpoint's manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Architecture:
        """Inverse of `to_dict`."""
        return cls(**{**values, "rope": Rope(**values["rope"])})


class Family(ABC):
    """One model family: configuration both ways and the weight table."""

    name: str
    architectures: tuple[str, ...]

    @abstractmethod
    def from_hf(self, config: dict[str, Any], source: str) -> Architecture:
        """Read a Hugging Face configuration.

        Args:
            config: The contents of ``config.json``.
            source: The file, for messages.

        Raises:
            InputError: For a value or a key that changes the function and is not represented.
        """

    @abstractmethod
    def weight_table(self, architecture: Architecture, padded_vocab_size: int) -> list[WeightMapping]:
        """Every parameter of the model, once."""


_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Add a family to the registry."""
    _FAMILIES[family.name] = family
    return family


def family_named(name: str) -> Family:
    """The family of that name.

    Raises:
        InputError: If there is none.
    """
    _load_families()
    if name not in _FAMILIES:
        raise InputError(f"unknown model family '{name}'; known: {', '.join(sorted(_FAMILIES))}")
    return _FAMILIES[name]


def architecture_from_hf(config: dict[str, Any], source: str) -> Architecture:
    """Find the family that claims ``config['architectures']`` and read the configuration.

    Raises:
        InputError: If no family claims it, or the family refuses it.
    """
    _load_families()
    names = config.get("architectures") or []
    for family in _FAMILIES.values():
        if names and names[0] in family.architectures:
            return family.from_hf(config, source)
    known = sorted(a for f in _FAMILIES.values() for a in f.architectures)
    raise InputError(f"{source}: unknown architecture {names or '(key architectures missing)'}; supported: {known}")


def read_hf_config(folder: Path) -> Architecture:
    """Read ``config.json`` of a Hugging Face folder.

    Raises:
        InputError: If the file is missing, not JSON, or not representable.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a Hugging Face model folder")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return architecture_from_hf(config, str(path))


def _load_families() -> None:
    from prism_nemo.models import llama  # noqa: F401  (registers itself)
