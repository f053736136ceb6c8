"""Strict reading of a Hugging Face ``config.json``.

A configuration is read key by key. A key that no one asked for must be known to be harmless, or the configuration is
refused: a value that changes the function and is dropped would give another model without a word.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from prism_nemo.errors import InputError
from prism_nemo.models.family import Rope

_REQUIRED = object()

# Keys that do not change the function computed from the weights, whatever the family.
HARMLESS = {
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache", "bos_token_id",
    "eos_token_id", "pad_token_id", "initializer_range", "pretraining_tp", "is_llama_config", "_name_or_path",
    "return_dict", "output_attentions", "output_hidden_states", "transformers.js_config", "chunk_size_feed_forward",
    "id2label", "label2id", "problem_type", "is_encoder_decoder", "task_specific_params", "tokenizer_class",
    "_attn_implementation", "unsloth_fixed", "auto_map",
}  # fmt: skip


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number; JSON as Python reads it also has NaN and Infinity."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _sequence(value: Any) -> list[Any]:
    """A list's entries; none of anything else."""
    return list(value) if isinstance(value, (list, tuple)) else []


class HFConfig:
    """One configuration while it is read.

    Args:
        values: Contents of ``config.json``.
        source: The file, for messages.
        family: Name of the reading family, for messages.
    """

    def __init__(self, values: dict[str, Any], source: str, family: str) -> None:
        self.values, self.source, self.family = values, source, family
        self._read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """A value as it stands."""
        self._read.add(key)
        return self.values.get(key, default)

    def _number(self, key: str, default: Any, convert: type[int] | type[float]) -> Any:
        value = self.get(key)
        if value is None:
            if default is _REQUIRED:
                problem = "is null" if key in self.values else "is missing"
                raise InputError(f"{self.source}: key '{key}' {problem}")
            return default
        if not _is_number(value) or convert(value) != value:
            kind = "a whole number" if convert is int else "a number"
            raise InputError(f"{self.source}: {key} is {value!r}; expected {kind}")
        return convert(value)

    def size(self, key: str, default: Any = _REQUIRED) -> Any:
        """A whole number of at least 1; the default if the key is absent or null.

        Raises:
            InputError: If it is missing without a default, or is something else.
        """
        value = self._number(key, default, int)
        if value is not None and value < 1:
            raise InputError(f"{self.source}: {key} is {value}; it must be at least 1")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        """A number; the default if the key is absent or null.

        Raises:
            InputError: If it is missing without a default, or is something else.
        """
        return self._number(key, default, float)

    def flag(self, key: str, default: bool) -> bool:
        """True or false; the default if the key is absent or null.

        Raises:
            InputError: If it is something else.
        """
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise InputError(f"{self.source}: {key} is {value!r}; expected true or false")
        return value

    def require(self, key: str, *allowed: Any) -> None:
        """Refuse any value but these; an absent or null key passes.

        Raises:
            InputError: Naming the key.
        """
        value = self.get(key)
        if value is not None and value not in allowed:
            only = allowed[0] if allowed else None
            raise InputError(
                f"{self.source}: {key} = {value!r} is not supported by the {self.family} family (only {only!r}); "
                "converting would give another function"
            )

    def limit(self, key: str) -> tuple[float, float]:
        """A pair (lowest, highest); no limit if the key is absent.

        Raises:
            InputError: If it is something else.
        """
        value = self.get(key)
        if value is None:
            return 0.0, float("inf")
        # transformers writes an infinity, which JSON lacks, as {"__float__": "Infinity"}.
        pair = [float("inf") if x in ({"__float__": "Infinity"}, float("inf")) else x for x in _sequence(value)]
        if len(pair) != 2 or not _is_number(pair[0]) or not (_is_number(pair[1]) or pair[1] == float("inf")):
            raise InputError(f"{self.source}: {key} is {value!r}; expected [lowest, highest]")
        if pair[0] > pair[1]:
            raise InputError(f"{self.source}: {key} is {value!r}; the lowest is above the highest")
        return float(pair[0]), float(pair[1])

    def rope(self) -> Rope:
        """The rotary embedding in its old (rope_theta, rope_scaling) or new (rope_parameters) spelling.

        Raises:
            InputError: For a kind of scaling, or a value of one, that is not represented.
        """
        for key in ("rope_parameters", "rope_scaling"):
            if self.get(key) is not None and not isinstance(self.values[key], dict):
                raise InputError(f"{self.source}: {key} is {self.values[key]!r}; expected a mapping with a rope_type")
        old, new = self.get("rope_scaling"), self.get("rope_parameters")
        if old and new and old != new:
            raise InputError(f"{self.source}: rope_scaling {old} and rope_parameters {new} contradict each other")
        scaling = dict(old or new or {})
        inner, outer = scaling.pop("rope_theta", None), self.number("rope_theta", None)
        if None not in (inner, outer) and inner != outer:
            raise InputError(f"{self.source}: rope_theta is {outer}, but {inner} with the rotary embedding's scaling")
        theta = next((x for x in (inner, outer) if x is not None), 10000.0)
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        known: dict[str, tuple[str, ...]] = {
            "default": (),
            "linear": ("factor",),
            "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        }
        if kind not in known:
            raise InputError(
                f"{self.source}: rope_scaling of type '{kind}' is not supported; supported: {sorted(known)}. "
                "Ignoring it would give wrong positions silently"
            )
        missing = [key for key in known[kind] if key not in scaling]
        unknown = sorted(set(scaling) - set(known[kind]) - {"rope_type", "type"})
        if missing or unknown:
            raise InputError(
                f"{self.source}: rope_scaling of type '{kind}': missing {missing}, not understood {unknown}"
            )
        if not all(_is_number(x) and x > 0 for x in (theta, *(scaling[k] for k in known[kind]))):
            raise InputError(
                f"{self.source}: the rotary embedding has a value that is not a positive number: rope_theta {theta!r}, "
                f"{scaling}"
            )
        if kind == "default":
            return Rope(theta=float(theta))
        return Rope(theta=float(theta), scaling={"rope_type": kind, **{k: float(scaling[k]) for k in known[kind]}})

    def finish(self, harmless: Iterable[str] = ()) -> None:
        """Refuse the configuration if a key was neither read nor is known to be harmless.

        Raises:
            InputError: Naming the key.
        """
        known = self._read | HARMLESS | set(harmless)
        unknown = sorted(key for key, value in self.values.items() if key not in known and value is not None)
        if unknown:
            raise InputError(
                f"{self.source}: key '{unknown[0]}' is not mapped by the {self.family} family; if it does not change "
                f"the function, add it to the harmless keys in prism_nemo/models/{self.family}.py"
            )
