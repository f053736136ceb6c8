"""Which settings of a stage a card names, and what they are called there."""

from __future__ import annotations

from typing import Any

from prism_nemo.checkpoint.model_card.lineage import Stage
from prism_nemo.checkpoint.model_card.markdown import number

_BOTH = (
    ("optimizer.lr", "learning rate (peak)"),
    ("schedule.lr_warmup_steps", "warm-up steps"),
    ("schedule.decay", "decay"),
    ("schedule.min_lr_ratio", "last learning rate over the peak"),
    ("optimizer.weight_decay", "weight decay"),
    ("optimizer.adam_beta1", "Adam beta1"),
    ("optimizer.adam_beta2", "Adam beta2"),
    ("optimizer.adam_eps", "Adam epsilon"),
    ("optimizer.clip_grad", "gradient clipping"),
    ("precision.dtype", "precision"),
    ("precision.fp8", "FP8"),
    ("parallel.tensor_model_parallel_size", "tensor parallel"),
    ("parallel.pipeline_model_parallel_size", "pipeline parallel"),
    ("parallel.context_parallel_size", "context parallel"),
    ("parallel.data_parallel_size", "data parallel"),
    ("seed", "seed"),
)
_MIDTRAIN = (
    ("global_batch_size", "sequences in a step"),
    ("seq_length", "tokens in a sequence"),
    ("data.packing", "packing"),
    ("data.isolate_documents", "documents kept apart"),
)
_RL = (
    ("tasks", "tasks"),
    ("control", "reward replaced by a control"),
    ("rollout.prompts_per_step", "prompts in a step"),
    ("rollout.group_size", "responses to a prompt"),
    ("rollout.max_new_tokens", "longest response (tokens)"),
    ("rollout.temperature", "sampling temperature"),
    ("rollout.top_p", "sampling top-p"),
    ("rewards.gate", "required form"),
    ("grpo.aggregation", "loss averaged over"),
    ("grpo.ratio", "importance ratio of"),
    ("grpo.clip_low", "clip range below"),
    ("grpo.clip_high", "clip range above"),
    ("grpo.normalize_advantage", "advantages divided by their deviation"),
    ("grpo.kl_beta", "KL weight"),
    ("grpo.dynamic_sampling", "dynamic sampling"),
)
KINDS = {"midtrain": "mid-training", "rl": "reinforcement learning with verifiable rewards"}


def kind(stage: Stage, first: bool) -> str:
    """What a stage is called: the first one of weights that began from nothing is no mid-training."""
    return "training from nothing" if first and stage.kind == "midtrain" else KINDS.get(stage.kind, stage.kind)


def settings(stage: Stage) -> list[tuple[str, str]]:
    """Names and values for the table of a stage; what the configuration does not hold is left out."""
    planned = stage.config.get("train_steps")
    rows = [("steps", f"{stage.step} of {planned}" if planned not in (None, stage.step) else str(stage.step))]
    tokens = stage.last.get("tokens")
    if isinstance(tokens, int | float) and stage.kind == "midtrain":
        rows.append(("tokens read, padding left out", number(float(tokens))))
    for key, name in (_RL if stage.kind == "rl" else _MIDTRAIN) + _BOTH:
        found, value = _at(stage.config, key)
        if found:
            rows.append((name, _shown(key, value)))
    return rows


def _at(config: dict[str, Any], key: str) -> tuple[bool, Any]:
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return False, None
        value = value[part]
    return True, value


def _shown(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        # A file of prompts by its name: where it lay is of no use to a reader.
        return ", ".join(str(item).rsplit("/", 1)[-1] for item in value) or "none"
    if value is None:
        return "by device (fp32 on CPU, bf16 on GPU)" if key == "precision.dtype" else "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
