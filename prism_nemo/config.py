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

from prism_nemo.as_written import file_values, override_values
from prism_nemo.errors import InputError


@dataclass
class ParallelConfig:
    """How a model and its batches are laid out over processes."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    data_parallel_size: int = 1
    sequence_parallel: bool = False
    context_parallel_size: int = 1  # ranks that share the tokens of a row; see models/layers/context_parallel.py
    virtual_pipeline_model_parallel_size: int = 1  # parts of the model on each pipeline stage; 1: not interleaved
    overlap_grad_reduce: bool = False  # reduce gradients while the backward pass goes on
    overlap_param_gather: bool = False  # gather updated parameters during the next forward pass
    bucket_size: int | None = None  # parameters per bucket of what overlaps; None: Megatron-Core's choice

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
            * self.data_parallel_size
        )

    def describe(self) -> str:
        """Short form for progress lines and reports, such as ``TP2 PP1 DP1``."""
        parts = [f"TP{self.tensor_model_parallel_size}", f"PP{self.pipeline_model_parallel_size}"]
        if self.virtual_pipeline_model_parallel_size > 1:
            parts.append(f"VPP{self.virtual_pipeline_model_parallel_size}")
        if self.context_parallel_size > 1:
            parts.append(f"CP{self.context_parallel_size}")
        parts.append(f"DP{self.data_parallel_size}")
        return " ".join(parts + ["SP"] * self.sequence_parallel)


@dataclass
class RecomputeConfig:
    """Activations that are computed again in the backward pass instead of being kept."""

    granularity: str = "none"  # none; selective: of parts of a layer; full: of whole layers, keeping their inputs
    method: str = "uniform"  # full: uniform keeps the input of every num_layers-th layer; block: see the next line
    num_layers: int = 1  # full, block: layers of each pipeline stage (or part of one) that are computed again
    modules: list[str] = field(default_factory=lambda: ["core_attn"])  # selective: core_attn, mlp


@dataclass
class OptimizerConfig:
    """AdamW with gradient clipping; weight decay never touches norms and biases."""

    lr: float = 5e-5
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-10
    clip_grad: float = 1.0  # largest norm of the gradient; 0: no clipping


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
    validation_rows: int = 64  # whatever the layout
    packing: str = "best_fit"  # or concatenate; see prism_nemo/data/packing.py
    isolate_documents: bool = True  # attention and positions start anew at each document
    index_dir: str | None = None  # where rows are kept; None: in the run directory. May be shared between runs
    change_mixture: bool = False  # go on with other data than the run was started with, from where it stands


@dataclass
class CheckpointConfig:
    """When to save, how, and which checkpoints to keep; see docs/checkpoints.md."""

    save_interval: int = 500
    keep: int = 2  # the newest so many
    keep_every: int | None = None  # and for ever those whose step is a multiple of this
    async_save: bool = True  # training goes on while a checkpoint is written
    verify_on_load: bool = True  # compare every file with its SHA-256 before going on from a checkpoint


@dataclass
class GuardConfig:
    """What a run does when its numbers, its processes or its machines go wrong; see prism_nemo/training/guards.py."""

    max_bad_steps: int = 5  # stop after so many steps in a row that are not finite, or left out as spikes
    spike: str = "warn"  # what a loss spike leads to: off, warn, skip or rollback
    spike_z: float = 8.0  # robust z-score from which a loss is a spike
    spike_window: int = 128  # steps that it is compared with
    max_rollbacks: int = 3
    watchdog_seconds: float | None = 1800.0  # end the run, with every rank's stack, when a step takes longer
    slow_rank_ratio: float = 1.5  # name a rank that is busy for so many times the median
    replica_check_interval: int = 500  # compare the parameters of data-parallel replicas every so many steps; 0: never


@dataclass
class MonitorConfig:
    """Where numbers go beside ``metrics.jsonl``."""

    tensorboard: bool | None = None  # null: where it is installed
    wandb: str = "off"  # off, online or offline
    mlflow_uri: str | None = None  # tracking server or folder
    project: str = "prism-nemo"  # of W&B; the experiment of MLflow


@dataclass
class PrecisionConfig:
    """The numbers that training computes in; see docs/precision.md. FP8 defaults are Megatron-Core's."""

    dtype: str | None = None  # of parameters and activations: fp32 or bf16; None: fp32 on CPU, bf16 on GPU
    fp8: str = "off"  # off; on: Transformer Engine; emulate: the same rounding in torch, on any device
    fp8_recipe: str = "delayed"  # delayed, tensorwise, blockwise or mxfp8
    fp8_format: str = "hybrid"  # hybrid: gradients in E5M2; e4m3: everything in E4M3
    fp8_param_gather: bool = False  # keep weights in FP8 and gather them as such
    fp8_margin: int = 0  # delayed: the scale is divided by 2 to this power
    fp8_amax_history_len: int = 1  # delayed: passes
    fp8_amax_compute_algo: str = "most_recent"  # delayed: most_recent or max of the history
    first_last_layers_bf16: bool = False
    num_layers_at_start_in_bf16: int = 1  # used only with first_last_layers_bf16, as is the next
    num_layers_at_end_in_bf16: int = 1


@dataclass
class InTrainingConfig:
    """A small evaluation while a stage trains; see docs/evaluation.md."""

    every: int = 0  # steps; 0: never. The last step is evaluated too
    mode: str = "ranks"  # ranks: training waits; process: saved checkpoints, while training goes on
    at_start: bool = True  # ranks: also before the first step
    sources: list[str] = field(default_factory=list)  # held-out sources of built data
    data: str | None = None  # the folder that they are in; None: the stage's own
    rows: int = 64  # of each source
    seq_length: int | None = None  # tokens of a row; None: the stage's
    tasks: list[str] = field(default_factory=list)  # names, reasoning_gym:NAME, prompts:FILE.jsonl
    questions: int = 64  # of each task, from the validation split
    max_new_tokens: int = 256
    temperature: float = 0.0  # 0: greedy
    gate: str = "think"  # required form of an answer, as rewards.gate
    tokenizer: str | None = None  # that tasks are asked with; None: the stage's, or that of its data
    process_devices: str = ""  # process: its CUDA_VISIBLE_DEVICES; empty: the CPU
    wait_seconds: float = 600.0  # process: for the last checkpoint, once training is done


@dataclass
class MidtrainConfig:
    """One mid-training stage (also used for pre-training a pocket-size base)."""

    run_dir: str = "???"
    init_from: str | None = None  # a native checkpoint; None trains from random weights, given by `model`
    model: dict[str, Any] | None = None  # HF config values, used only when init_from is None
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guards: GuardConfig = field(default_factory=GuardConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    evaluation: InTrainingConfig = field(default_factory=InTrainingConfig)
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
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)


@dataclass
class RolloutConfig:
    """How the policy is sampled."""

    group_size: int = 16
    prompts_per_step: int = 64
    max_new_tokens: int = 8192
    temperature: float = 1.0
    top_p: float = 1.0
    backend: str = "native"  # native: from the trainer's own weights; vllm: its copy of them, on GPUs; see docs/rl.md
    slots: int = 256  # native: responses that are written at a time, on each data-parallel rank
    cache_tokens: int = 0  # native: most tokens that their caches hold; 0: as many as fit in half of the free memory
    vllm_memory_share: float = 0.3  # of each GPU's memory; used only with vllm


@dataclass
class RewardConfig:
    """How responses are judged; see docs/rewards.md. The defaults give 1 or 0."""

    gate: str = "think"  # required form: think (<think> ... </think> answer, ended by the end token), or none
    verifiers: dict[str, str] = field(default_factory=dict)  # more of them: name -> package.module:Class
    workers: int = 2  # processes for verdicts that may hang or crash
    time_limit: float = 10.0  # seconds for one verdict
    memory_gb: float = 4.0  # of each of these processes
    stop_penalty: float = 0.0  # for a response that was cut off (the study has one and gives no value)
    repetition_penalty: float = 0.0  # times the share of repeated n-grams (the study: no value)
    repetition_ngram: int = 8  # tokens
    sandbox: str = "bubblewrap"  # for code: bubblewrap, or process (weaker; see docs/rewards.md)
    code_score: str = "all"  # all: 1 if every test passes; share: of the tests that pass
    code_seconds: float = 8.0  # for code: of a program over all its tests; half of it for each test


@dataclass
class GRPOConfig:
    """The objective. Defaults follow the study (arXiv 2603.17074, table 21) where it states a value; see docs/rl.md."""

    aggregation: str = "group"  # what a token's loss is divided by: group (the study), token, sequence or constant
    ratio: str = "token"  # token, or sequence (GSPO)
    clip_low: float = 0.2
    clip_high: float = 0.28  # the study gives no value; DAPO's (arXiv 2503.14476)
    normalize_advantage: bool = True  # divide by the group's standard deviation
    importance_cap: float = 2.0  # truncation C of the sampler/trainer ratio; 0: no correction
    kl_beta: float = 0.05
    kl_estimator: str = "k3"  # k1, k2 or k3
    reference_alpha: float = 0.6  # share of the policy in a soft update of the reference (arXiv 2404.09656)
    reference_period: int = 100  # steps between soft updates (the study gives no value); 0: keep the starting policy
    mini_batches: int = 1  # updates from one batch of rollouts; 1 with one epoch is strictly on-policy
    epochs: int = 1
    dynamic_sampling: bool = False  # sample on until every group of a step teaches something
    max_sampling_rounds: int = 5
    overlong_buffer: int = 0  # tokens before the limit in which length is penalised; 0: not at all
    overlong_penalty: float = 1.0  # at the limit


@dataclass
class RLConfig:
    """One stage of reinforcement learning with verifiable rewards."""

    run_dir: str = "???"
    init_from: str = "???"
    tokenizer: str = "???"
    tasks: list[str] = field(default_factory=list)  # names, reasoning_gym:NAME, prompts:FILE.jsonl
    prompt_templates: list[str] = field(
        default_factory=list
    )  # forms of a file's prompts, with {question}; see docs/rewards.md
    task_shares: str = "equal"  # of prompts: equal, or size (prompt files by their number of rows)
    control: str = "none"  # what replaces the reward: random, shuffled, format_only or frozen; see docs/rl.md
    control_rate: float = 0.5  # share of responses that a random or frozen reward favours
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=5e-7, weight_decay=0.0))
    schedule: ScheduleConfig = field(
        default_factory=lambda: ScheduleConfig(lr_warmup_steps=0, decay="linear", min_lr_ratio=0.0)
    )
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(save_interval=100))
    guards: GuardConfig = field(default_factory=lambda: GuardConfig(spike="off"))
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    evaluation: InTrainingConfig = field(default_factory=InTrainingConfig)
    train_steps: int = 1000
    micro_batch_size: int = 16
    log_interval: int = 1
    keep_rollouts: str = "all"  # all, or none beside one response of each task
    max_seconds: float | None = None
    use_distributed_optimizer: bool = True
    seed: int = 1234
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)


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
                merged = OmegaConf.merge(merged, OmegaConf.create(override_values(override, schema)))
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


def load_yaml(path: Path, schema: type | None = None) -> dict[str, Any]:
    """Read a YAML file of nested values.

    Args:
        path: The file.
        schema: The dataclass that it fills: its strings are then taken as they are written (``spike: off``).

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
    values = {str(k): v for k, v in loaded.items()}
    return values if schema is None else file_values(path, values, schema)


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
    # An abbreviation is nearer than a word that happens to have its letters.
    near = [n for n in names if n.startswith(name)] or difflib.get_close_matches(name, names, n=1, cutoff=0.4)
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
