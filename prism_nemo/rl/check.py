"""What an RL stage refuses before processes start."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from prism_nemo.checkpoint.native import read_architecture
from prism_nemo.config import GRPOConfig, RLConfig, RolloutConfig
from prism_nemo.data.tokenizer import load_tokenizer
from prism_nemo.errors import InputError
from prism_nemo.evaluation.in_training.suite import Suite, resolve_suite
from prism_nemo.generation.vllm import check_vllm
from prism_nemo.models.family import Architecture
from prism_nemo.models.recompute import check_recompute_of
from prism_nemo.precision.check import check_precision
from prism_nemo.rl.controls import CONTROLS
from prism_nemo.rl.grpo import AGGREGATIONS, KL_ESTIMATORS, RATIOS
from prism_nemo.rl.prompt_file import check_prompt_lengths
from prism_nemo.rl.prompts import SHARES, PromptStream
from prism_nemo.rl.rewards.judge import check_rewards
from prism_nemo.rl.rewards.task import Task, task_named
from prism_nemo.training.guards import check_guards
from prism_nemo.training.layout import check_layout
from prism_nemo.training.monitors import check_monitors
from prism_nemo.training.stage import check_stage

KEEP_ROLLOUTS = ("all", "none")
BACKENDS = ("native", "vllm")


def check(config: RLConfig) -> list[Task]:
    """Everything that can be refused before processes start.

    Returns:
        The tasks.

    Raises:
        InputError: Naming the key and what would work.
    """
    counts = ("rollout.prompts_per_step", "rollout.max_new_tokens", "rollout.slots", "grpo.mini_batches", "grpo.epochs")
    check_stage(config, *counts)
    if not config.tasks:
        raise InputError("tasks: name at least one, for example tasks=[arithmetic]")
    _check_repeats(config.tasks)
    tasks = tasks_of(config)
    _choice("task_shares", config.task_shares, SHARES)
    PromptStream(tasks, config.seed, config.task_shares)
    _check_layout(config)
    check_guards(config.guards)
    check_monitors(config.monitor)
    if config.guards.spike == "rollback":
        raise InputError("guards.spike: an RL stage samples anew and has no data to leave out; use off, warn or skip")
    architecture = read_architecture(Path(config.init_from))
    _check_rollout(config.rollout, architecture.max_position_embeddings)
    _choice("rollout.backend", config.rollout.backend, BACKENDS)
    if config.rollout.backend == "vllm":
        check_vllm(architecture, config.parallel, config.rollout.vllm_memory_share)
    _check_objective(config.grpo, config.rollout)
    check_rewards(config.rewards)
    _choice("control", config.control, CONTROLS)
    _choice("keep_rollouts", config.keep_rollouts, KEEP_ROLLOUTS)
    if not 0 < config.control_rate < 1:
        raise InputError(f"control_rate: {config.control_rate} must be between 0 and 1")
    tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer.vocab_size > architecture.vocab_size:
        raise InputError(
            f"{config.tokenizer}: {tokenizer.vocab_size} tokens, but the model has {architecture.vocab_size}"
        )
    check_prompt_lengths(tasks, tokenizer, architecture.max_position_embeddings - config.rollout.max_new_tokens)
    suite_of(config, architecture)
    return tasks


def suite_of(config: RLConfig, architecture: Architecture) -> Suite | None:
    """What is asked beside the rollouts while training goes on.

    Raises:
        InputError: Naming the key.
    """
    return resolve_suite(config.evaluation, architecture, config.parallel, tokenizer=config.tokenizer)


def tasks_of(config: RLConfig) -> list[Task]:
    """The tasks that a configuration names; those of prompt files are read here.

    Raises:
        InputError: For one that does not exist, or a file that cannot be used.
    """
    return [task_named(name, config.prompt_templates) for name in config.tasks]


def _check_repeats(names: Sequence[str]) -> None:
    """Refuse a task that is named twice: both would draw the same questions, one after the other."""
    seen: dict[str, str] = {}
    for name in names:
        kind, _, path = name.partition(":")
        key = str(Path(path).resolve()) if kind == "prompts" else name
        if key in seen:
            raise InputError(
                f"tasks: '{name}' repeats '{seen[key]}', and each of its questions would be drawn twice in a row; name "
                "it once"
            )
        seen[key] = name


def _choice(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"{key}: '{value}' is unknown; choose one of {', '.join(known)}")


def _check_layout(config: RLConfig) -> None:
    architecture, layout = read_architecture(Path(config.init_from)), config.parallel
    check_layout(architecture, layout, config.use_distributed_optimizer)
    check_recompute_of(config.recompute, architecture, layout, config.precision)
    check_precision(config.precision, architecture, layout, config.use_distributed_optimizer, config.recompute)
    if config.precision.fp8 != "off":
        # Rollouts decode from the weights without FP8 (generation/layers.py): another policy than the one trained.
        raise InputError(
            f"precision.fp8: {config.precision.fp8} is not available for RL: rollouts are sampled without FP8, and "
            "every update would follow another policy than the sampled one; leave it off"
        )
    if config.rollout.prompts_per_step % layout.data_parallel_size:
        raise InputError(
            f"rollout.prompts_per_step {config.rollout.prompts_per_step} is not a multiple of "
            f"parallel.data_parallel_size {layout.data_parallel_size}"
        )
    if layout.context_parallel_size > 1 or layout.overlap_grad_reduce:
        raise InputError(
            "parallel.context_parallel_size, parallel.overlap_grad_reduce: responses have any length and ranks any "
            "number of micro-batches; RL runs with 1 and without overlap; use tensor, pipeline or data parallelism"
        )
    if layout.virtual_pipeline_model_parallel_size > 1:
        raise InputError(
            "parallel.virtual_pipeline_model_parallel_size: rollouts are sampled by one part per stage; use 1"
        )


def _check_rollout(config: RolloutConfig, positions: int) -> None:
    if config.group_size < 2:
        raise InputError("rollout.group_size: a group of fewer than 2 responses has no relative advantage")
    if config.temperature != 1.0 or config.top_p != 1.0:
        # The loss compares log-probabilities of the policy itself with those of the sampler; tokens drawn from another
        # distribution would get an importance weight that does not know of it.
        raise InputError(
            f"rollout.temperature {config.temperature}, rollout.top_p {config.top_p}: training needs "
            "samples of the policy itself, temperature 1 and top_p 1"
        )
    if config.cache_tokens < 0:
        raise InputError(f"rollout.cache_tokens: {config.cache_tokens} must be 0 (what fits) or more")
    if config.max_new_tokens >= positions:
        raise InputError(
            f"rollout.max_new_tokens {config.max_new_tokens} leaves no room for a prompt within the model's "
            f"{positions} positions"
        )


def _check_objective(config: GRPOConfig, rollout: RolloutConfig) -> None:
    _choice("grpo.aggregation", config.aggregation, AGGREGATIONS)
    _choice("grpo.ratio", config.ratio, RATIOS)
    _choice("grpo.kl_estimator", config.kl_estimator, KL_ESTIMATORS)
    for name in ("kl_beta", "clip_low", "clip_high", "importance_cap", "overlong_penalty"):
        value = getattr(config, name)
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"grpo.{name}: {value} must be a number of 0 or more")
    if config.clip_low >= 1:
        raise InputError(f"grpo.clip_low: {config.clip_low} must be below 1, so that a ratio can be clipped from below")
    if 0 < config.importance_cap < 1:
        raise InputError(
            f"grpo.importance_cap: {config.importance_cap} would cut the weight of equal policies; use 1 "
            "or more, or 0 for no correction"
        )
    if not 0 < config.reference_alpha <= 1:
        raise InputError(f"grpo.reference_alpha: {config.reference_alpha} must be above 0 and at most 1")
    if config.reference_period < 0:
        raise InputError(f"grpo.reference_period: {config.reference_period} must be 0 (never) or more")
    if config.max_sampling_rounds < 1:
        raise InputError(f"grpo.max_sampling_rounds: {config.max_sampling_rounds} must be at least 1")
    if not 0 <= config.overlong_buffer <= rollout.max_new_tokens:
        raise InputError(
            f"grpo.overlong_buffer: {config.overlong_buffer} must be between 0 and rollout.max_new_tokens "
            f"{rollout.max_new_tokens}"
        )
    if config.mini_batches > rollout.prompts_per_step:
        raise InputError(
            f"grpo.mini_batches: {config.mini_batches} is more than the {rollout.prompts_per_step} prompts of a step"
        )
