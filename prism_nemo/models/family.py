"""What a model family must say, the architecture it yields, and the registry.

A family reads a Hugging Face ``config.json``, refuses whatever it cannot represent, and gives one table of weight
mappings. Sizes are data, never code.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from prism_nemo.errors import InputError
from prism_nemo.models.weights import WeightMapping, expand


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
class Mamba:
    """Mamba-2 mixer.

    Attributes:
        heads: Heads of the state space model, all ranks together.
        head_dim: Channels of a head.
        state_size: State of a channel.
        groups: Groups of heads that share B and C; the gated norm normalises each group by itself.
        conv_kernel: Taps of the causal convolution.
        conv_bias: Whether the convolution has a bias.
        chunk_size: Of the scan; decides speed and rounding only.
        dt_limit: The step size is clamped to this after the softplus.
    """

    heads: int
    head_dim: int
    state_size: int
    groups: int
    conv_kernel: int = 4
    conv_bias: bool = True
    chunk_size: int = 256
    dt_limit: tuple[float, float] = (0.0, math.inf)

    @property
    def inner_size(self) -> int:
        """Channels of all heads."""
        return self.heads * self.head_dim


def mamba_fits(heads: int, groups: int, size: int) -> bool:
    """Whether a mixer's heads and groups can be cut into `size` parts.

    With fewer groups than parts, every rank computes the B and C that it needs.
    """
    return heads % size == 0 and (groups % size == 0 or size % groups == 0)


@dataclass(frozen=True)
class Architecture:
    """A decoder, in Megatron's terms; independent of the layout over processes.

    Attributes:
        family: Name in the registry.
        ffn_hidden_size: Width of the MLP (of each of gate and up).
        num_layers: Megatron's count: in a hybrid, each mixer, attention and MLP is a layer of its own.
        kv_channels: Head dimension.
        tied_embeddings: Whether the output layer is the embedding.
        rope: None for a model without positions (NoPE).
        activation: "swiglu", or "relu2" for a squared ReLU without a gate.
        sliding_window: Positions that a token attends to, itself included; None for all before it.
        attention_multiplier: Scale of the attention scores; None for head_dim^-1/2.
        residual_multiplier: Scale of what attention, mixer and MLP add to the residual stream.
        embedding_multiplier: Scale of the embeddings.
        logits_scaling: Divisor of the logits.
        layer_pattern: Kinds of layers of a hybrid, "M" Mamba, "*" attention, "-" MLP; empty for a transformer.
        mamba: The mixers of a hybrid.
        hf_prefix: Prefix of the Hugging Face tensor names.
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
    rope: Rope | None = field(default_factory=Rope)
    activation: str = "swiglu"
    sliding_window: int | None = None
    attention_multiplier: float | None = None
    residual_multiplier: float = 1.0
    embedding_multiplier: float = 1.0
    logits_scaling: float = 1.0
    layer_pattern: str = ""
    mamba: Mamba | None = None
    hf_prefix: str = "model"
    hf_config: dict[str, Any] = field(default_factory=dict)

    def differences(self, other: Architecture) -> list[str]:
        """Fields in which two architectures are not the same function, as ``name: ours, theirs``."""
        skipped = {"hf_config", "hf_prefix", "max_position_embeddings"}
        return [
            f"{f.name}: {getattr(self, f.name)}, {getattr(other, f.name)}"
            for f in fields(self)
            if f.name not in skipped and getattr(self, f.name) != getattr(other, f.name)
        ]

    def padded_vocab_size(self, tensor_model_parallel_size: int) -> int:
        """Vocabulary rounded up so that every tensor-parallel rank holds the same number of rows."""
        size = tensor_model_parallel_size
        return (self.vocab_size + size - 1) // size * size

    def layers_of(self, kind: str) -> tuple[int, ...]:
        """Indices of the layers of a kind: "M", "*" or "-"; of a transformer, every layer is of every kind but "M"."""
        if not self.layer_pattern:
            return () if kind == "M" else tuple(range(self.num_layers))
        return tuple(i for i, symbol in enumerate(self.layer_pattern) if symbol == kind)

    def fits_tensor_parallel(self, size: int) -> bool:
        """Whether every layer can be cut into `size` parts."""
        divided = [self.num_attention_heads, self.num_query_groups, self.ffn_hidden_size]
        mamba = self.mamba
        return not any(n % size for n in divided) and (mamba is None or mamba_fits(mamba.heads, mamba.groups, size))

    def tensor_parallel_sizes(self) -> list[int]:
        """Every size that fits."""
        return [n for n in range(1, self.num_query_groups + 1) if self.fits_tensor_parallel(n)]

    def fits_context_parallel(self, tensor_model_parallel_size: int, size: int) -> bool:
        """Whether `size` ranks can share a row: each computes some heads of every layer for all of its tokens."""
        tp, mamba = tensor_model_parallel_size, self.mamba
        heads = mamba_fits(self.num_attention_heads // tp, max(1, self.num_query_groups // tp), size)
        return heads and (mamba is None or mamba_fits(mamba.heads // tp, max(1, mamba.groups // tp), size))

    def check_layout(
        self,
        tensor_model_parallel_size: int,
        pipeline_model_parallel_size: int,
        context_parallel_size: int = 1,
        virtual_pipeline_model_parallel_size: int = 1,
    ) -> None:
        """Refuse a layout that this architecture cannot have.

        Raises:
            InputError: Naming the sizes that would work.
        """
        tp, pp, cp = tensor_model_parallel_size, pipeline_model_parallel_size, context_parallel_size
        parts = virtual_pipeline_model_parallel_size
        mamba = self.mamba and f", {self.mamba.heads} Mamba heads in {self.mamba.groups} groups"
        if not self.fits_tensor_parallel(tp):
            raise InputError(
                f"tensor_model_parallel_size {tp} does not divide {self.num_attention_heads} attention heads, "
                f"{self.num_query_groups} key/value heads and MLP width {self.ffn_hidden_size}{mamba or ''}; "
                f"these do: {self.tensor_parallel_sizes()}"
            )
        if self.num_layers % pp:
            works = [n for n in range(1, self.num_layers + 1) if self.num_layers % n == 0]
            raise InputError(
                f"pipeline_model_parallel_size {pp} does not divide {self.num_layers} layers; these do: {works}"
            )
        if not self.fits_context_parallel(tp, cp):
            works = [n for n in range(1, self.num_attention_heads // tp + 1) if self.fits_context_parallel(tp, n)]
            raise InputError(
                f"context_parallel_size {cp} at tensor_model_parallel_size {tp} does not share out "
                f"{self.num_attention_heads} attention heads, {self.num_query_groups} key/value heads{mamba or ''}; "
                f"these do: {works}"
            )
        if parts > 1 and pp == 1:
            raise InputError(
                f"virtual_pipeline_model_parallel_size {parts} needs pipeline_model_parallel_size 2 or more; "
                "without a pipeline it is 1"
            )
        if self.num_layers % (pp * parts):
            works = [n for n in range(1, self.num_layers // pp + 1) if self.num_layers % (pp * n) == 0]
            raise InputError(
                f"virtual_pipeline_model_parallel_size {parts} does not divide the {self.num_layers // pp} layers of "
                f"each of {pp} pipeline stages; these do: {works}"
            )

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for the checkpoint's manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Architecture:
        """Inverse of `to_dict`."""
        rope, mamba = values["rope"], values.get("mamba")
        if mamba is not None:
            mamba = Mamba(**{**mamba, "dt_limit": tuple(mamba["dt_limit"])})
        return cls(**{**values, "rope": rope and Rope(**rope), "mamba": mamba})


class Family(ABC):
    """One model family: configuration both ways and the weight table."""

    name: str
    architectures: tuple[str, ...]
    prefixes: tuple[str, ...] = ("model",)

    def claims(self, config: dict[str, Any]) -> bool:
        """Whether a configuration is of this family."""
        names = config.get("architectures") or []
        return bool(names) and names[0] in self.architectures

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
    def weight_table(self, architecture: Architecture, tensor_model_parallel_size: int) -> list[WeightMapping]:
        """Every parameter of the model, once.

        The tensor-parallel size decides the vocabulary's padding, and whether B and C of a Mamba mixer have parameters
        of their own.
        """


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
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{source}: architectures is {names!r}; expected a list of names")
    for family in _FAMILIES.values():
        if family.claims(config):
            return family.from_hf(config, source)
    known = sorted({a for f in _FAMILIES.values() for a in f.architectures})
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
    architecture = architecture_from_hf(config, str(path))
    prefixes = family_named(architecture.family).prefixes
    if len(prefixes) > 1:
        names = _tensor_names(folder)
        found = [p for p in prefixes if any(name.startswith(f"{p}.") for name in names)]
        architecture = replace(architecture, hf_prefix=(found or list(prefixes))[0])
    return architecture


def _tensor_names(folder: Path) -> list[str]:
    """Names of the folder's tensors, or none where there are no readable files (which whoever reads them reports)."""
    try:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            return list(json.loads(index.read_text())["weight_map"])
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError, json.JSONDecodeError, KeyError, TypeError):
        return []


def table_of(architecture: Architecture, tensor_model_parallel_size: int = 1) -> list[WeightMapping]:
    """The family's weight table for this architecture."""
    return family_named(architecture.family).weight_table(architecture, tensor_model_parallel_size)


def parameter_count(architecture: Architecture) -> int:
    """Parameters of the whole model, from the weight table."""
    return sum(math.prod(mapping.shape) for mapping, _ in expand(table_of(architecture)))


def _load_families() -> None:
    # Each registers itself.
    from prism_nemo.models import granite, granite_hybrid, llama, mistral, nemotron_h  # noqa: F401
