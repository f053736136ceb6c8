"""Configuration: plain dataclasses, one place per default, strict overrides.

A configuration is made in three steps, later ones winning: the dataclass defaults, a recipe or a ``config.yaml``, and
``key=value`` overrides by dotted name. OmegaConf merges them in struct mode, so a key that does not exist is an error,
which names the nearest key that does.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prism_nemo.errors import InputError


@dataclass
class ParallelConfig:
    """How a model and its batches are laid out over processes."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    data_parallel_size: int = 1
    sequence_parallel: bool = False

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.data_parallel_size

    def describe(self) -> str:
        """Short form for progress lines and reports, such as ``TP2 PP1 DP1``."""
        sp = " SP" if self.sequence_parallel else ""
        return (
            f"TP{self.tensor_model_parallel_size} PP{self.pipeline_model_parallel_size} DP{self.data_parallel_size}{sp}"
        )


@dataclass
class OptimizerConfig:
    """AdamW with gradient clipping; weight decay never touches norms and biases."""

    lr: float = 5e-5
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-10
    clip_grad: float = 1.0


@dataclass
class ScheduleConfig:
    """Learning rate: linear warm-up, then `decay` to ``min_lr_ratio`` of the peak at the last step."""

    lr_warmup_steps: int = 500
    decay: str = "cosine"  # cosine, linear or constant
    min_lr_ratio: float = 0.1


@dataclass
class DataConfig:
    """Where the tokens are: a folder written by ``prism-nemo data build``."""

    path: str = "???"
    validation_source: str | None = None
    validation_rows: int = 64


@dataclass
class CheckpointConfig:
    """When to save, and how many checkpoints to keep."""

    save_interval: int = 500
    keep: int = 2


@dataclass
class MidtrainConfig:
    """One mid-training stage (also used for pre-training a pocket-size base)."""

    run_dir: str = "???"
    init_from: str | None = None  # a native checkpoint; None trains from random weights, given by `model`
    model: dict[str, Any] | None = None  # HF config values, used only when init_from is None
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    train_steps: int = 25_000
    seq_length: int = 8192
    micro_batch_size: int = 1
    global_batch_size: int = 128
    init_method_std: float = 0.02  # used only when init_from is None, as is the next
    embedding_init_method_std: float = 0.02
    eval_interval: int = 500
    log_interval: int = 10
    max_seconds: float | None = None  # stop cleanly, with a checkpoint, after this many seconds
    use_distributed_optimizer: bool = True
    seed: int = 1234


@dataclass
class RolloutConfig:
    """How the policy is sampled."""

    group_size: int = 16
    prompts_per_step: int = 64
    max_new_tokens: int = 8192
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass
class GRPOConfig:
    """The objective. Defaults follow the study (arXiv 2603.17074, table 21) where it states a value."""

    kl_beta: float = 0.05
    clip_low: float = 0.2
    clip_high: float = 0.28  # the study gives no value; DAPO's (arXiv 2503.14476)
    normalize_advantage: bool = True  # divide by the group's standard deviation
    importance_cap: float = 2.0  # truncation C of the sampler/trainer ratio


@dataclass
class RLConfig:
    """One stage of reinforcement learning with verifiable rewards."""

    run_dir: str = "???"
    init_from: str = "???"
    tokenizer: str = "???"
    tasks: list[str] = field(default_factory=list)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=5e-7, weight_decay=0.0))
    schedule: ScheduleConfig = field(
        default_factory=lambda: ScheduleConfig(lr_warmup_steps=0, decay="linear", min_lr_ratio=0.0)
    )
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(save_interval=100))
    train_steps: int = 1000
    micro_batch_size: int = 16
    log_interval: int = 1
    max_seconds: float | None = None
    use_distributed_optimizer: bool = True
    seed: int = 1234


ConfigType = TypeVar("ConfigType")


def resolve(
    schema: type[ConfigType], values: dict[str, Any] | None = None, overrides: Iterable[str] = (), source: str = ""
) -> ConfigType:
    """Merge defaults, values and overrides into one configuration.

    Args:
        schema: The dataclass to fill.
        values: Nested values, as from a recipe or a YAML file.
        overrides: ``dotted.key=value`` strings.
        source: Where `values` came from, for messages.

    Returns:
        An instance of `schema`.

    Raises:
        InputError: For an unknown key (naming the nearest), a value of the wrong type, or a required value not given.
    """
    merged = OmegaConf.structured(schema)
    try:
        if values:
            _refuse_unknown(schema, values, source or "configuration")
            merged = OmegaConf.merge(merged, OmegaConf.create(values))
        for override in overrides:
            key, separator, _ = override.partition("=")
            if not separator:
                raise InputError(f"override '{override}' is not of the form key=value")
            _refuse_unknown_path(schema, key.split("."), f"override '{override}'")
            try:
                merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([override]))
            except yaml.YAMLError as error:
                raise InputError(f"override '{override}': the value is not valid YAML") from error
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise InputError(f"{source or schema.__name__}: no value for {', '.join(missing)}; give it as key=value")
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        where = f" ({error.full_key})" if getattr(error, "full_key", None) else ""
        raise InputError(f"{source or schema.__name__}{where}: {str(error).splitlines()[0]}") from error


def check_positive(config: Any, *names: str) -> None:
    """Refuse counts below 1: each would end in a division by zero, or delete every checkpoint, after work was done.

    Args:
        config: A configuration.
        names: Dotted names of its counts.

    Raises:
        InputError: Naming the key.
    """
    for name in names:
        value = config
        for part in name.split("."):
            value = getattr(value, part)
        if value < 1:
            raise InputError(f"{name}: {value} must be at least 1")


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of nested values.

    Raises:
        InputError: If the file does not exist, is not YAML, or is not a mapping.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:
        raise InputError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise InputError(f"{path}: expected a mapping at the top")
    return {str(k): v for k, v in loaded.items()}


def to_yaml(config: Any) -> str:
    """The configuration as YAML, every value resolved."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _field_schema(schema: Any, name: str) -> Any:
    """The dataclass of a nested field, or None where the field is a plain value."""
    default = {f.name: f for f in dataclasses.fields(schema)}[name]
    if default.default_factory is not dataclasses.MISSING:
        value = default.default_factory()
        return type(value) if dataclasses.is_dataclass(value) else None
    return None


def _unknown(schema: Any, name: str, prefix: str, where: str) -> InputError:
    names = [f.name for f in dataclasses.fields(schema)]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    advice = f"did you mean '{prefix}{near[0]}'?" if near else f"known keys: {', '.join(names)}"
    return InputError(f"{where}: unknown key '{prefix}{name}'; {advice}")


def _refuse_unknown_path(schema: Any, path: list[str], where: str) -> None:
    prefix = ""
    for name in path:
        if name not in {f.name for f in dataclasses.fields(schema)}:
            raise _unknown(schema, name, prefix, where)
        nested = _field_schema(schema, name)
        if nested is None:
            return
        schema, prefix = nested, f"{prefix}{name}."


def _refuse_unknown(schema: Any, values: dict[str, Any], where: str, prefix: str = "") -> None:
    for name, value in values.items():
        if name not in {f.name for f in dataclasses.fields(schema)}:
            raise _unknown(schema, str(name), prefix, where)
        nested = _field_schema(schema, name)
        if nested is not None and isinstance(value, dict):
            _refuse_unknown(nested, value, where, f"{prefix}{name}.")
