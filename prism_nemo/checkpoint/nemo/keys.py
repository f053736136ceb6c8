"""Names of tensors in NeMo's checkpoints, and where a stretch of one of ours lies there.

NeMo's weights are Megatron's, with ``module.`` before every name. What differs from release to release, and with the
options of the save:

- equal layers are one tensor with the layers in front (``decoder.layers.mlp.linear_fc2.weight``), or a tensor each
  (``decoder.layers.7.mlp.linear_fc2.weight``);
- the norm before a column-parallel layer has the name of Transformer Engine's fused layer, or its own;
- gate and up projection are one tensor, or two (``linear_fc1.weight_w`` and ``_v``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prism_nemo.errors import InputError

PREFIX = "module."
EMBEDDING = "embedding.word_embeddings.weight"
EXTRA_STATE = "._extra_state"
_LAYERS = "decoder.layers."
_OWN_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "mixer.in_proj.layer_norm_weight": "norm.weight",
}


@dataclass(frozen=True)
class Place:
    """A stretch of rows in a stored tensor.

    Attributes:
        key: Of the tensor.
        offset: Of the first element.
        stacked: Leading dimensions (layers) that the parameter does not have.
        rows: How many.
    """

    key: str
    offset: tuple[int, ...]
    stacked: int
    rows: int


class StoredKeys:
    """Model tensors of a NeMo checkpoint.

    Args:
        shapes: By key, of everything that is stored.
        source: For messages.

    Attributes:
        prefix: Before the name of every tensor of the model.

    Raises:
        InputError: If no tensor is the embedding of a model.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
        found = [key for key in shapes if re.fullmatch(r"(module\.)+" + re.escape(EMBEDDING), key)]
        if len(found) != 1:
            raise InputError(
                f"{source}: holds {len(found)} tensors '{PREFIX}{EMBEDDING}'; expected one language model's weights"
            )
        self.prefix = found[0].removesuffix(EMBEDDING)
        self.source = source
        self._shapes = {key: shape for key, shape in shapes.items() if key.startswith(self.prefix)}
        self._used: set[str] = set()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor of that name (without the prefix).

        Raises:
            InputError: If it is not stored.
        """
        key = self.prefix + name
        if key not in self._shapes:
            raise InputError(f"{self.source}: tensor '{key}' is missing")
        return self._shapes[key]

    def places(self, key: str, shape: tuple[int, ...], offset: tuple[int, ...], stacked: int, rows: int) -> list[Place]:
        """Where rows of one of our tensors are stored.

        Args:
            key: Our name of the tensor.
            shape: Its shape.
            offset: Of the first element.
            stacked: Leading dimensions that the parameter does not have: 1 where layers are stacked, else 0.
            rows: How many.

        Raises:
            InputError: If the tensor is not stored, or has another shape.
        """
        for name in _spellings(key, offset[0] if stacked else None):
            layered = stacked and name.startswith(_LAYERS) and not name.removeprefix(_LAYERS)[0].isdigit()
            keep = 0 if layered or not stacked else 1
            wanted, at = shape[keep:], offset[keep:]
            if self.prefix + name in self._shapes:
                self._check(name, wanted)
                return [Place(self.prefix + name, at, stacked - keep, rows)]
            if self.prefix + name + "_w" in self._shapes:
                return self._halves(name, wanted, at, stacked - keep, rows)
        raise InputError(f"{self.source}: tensor '{self.prefix}{key}' is missing; the weights are of another model")

    def _halves(self, name: str, shape: tuple[int, ...], offset: tuple[int, ...], axis: int, rows: int) -> list[Place]:
        """Rows of [gate; up] in two tensors."""
        half = shape[axis] // 2
        stored = (*shape[:axis], half, *shape[axis + 1 :])
        found, first, last = [], offset[axis], offset[axis] + rows
        for i, suffix in enumerate(("_w", "_v")):
            self._check(name + suffix, stored)
            low, high = max(first, i * half), min(last, (i + 1) * half)
            if low < high:
                at = (*offset[:axis], low - i * half, *offset[axis + 1 :])
                found.append(Place(self.prefix + name + suffix, at, axis, high - low))
        return found

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        stored = self.shape(name)
        self._used.add(self.prefix + name)
        # The vocabulary may be padded, to whatever number of rows.
        padded = name in (EMBEDDING, "output_layer.weight")
        if stored != shape and not (padded and stored[1:] == shape[1:] and stored[0] >= shape[0]):
            raise InputError(
                f"{self.source}: tensor '{self.prefix}{name}' has shape {stored}, but the configuration implies {shape}"
            )

    def left(self) -> list[str]:
        """Tensors of the model that `places` never named: something that the conversion would drop."""
        return sorted(self._shapes.keys() - self._used)


def _spellings(key: str, layer: int | None) -> Iterator[str]:
    """Names that a tensor may have: layers stacked or not, norms fused or not."""
    keys = [key]
    for fused, own in _OWN_NORMS.items():
        if key.endswith(f".{fused}"):
            keys.append(key.removesuffix(fused) + own)
    for name in keys:
        yield name
        if layer is not None and name.startswith(_LAYERS):
            yield f"{_LAYERS}{layer}.{name.removeprefix(_LAYERS)}"
