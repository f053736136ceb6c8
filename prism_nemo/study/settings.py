"""Sizes and budgets of the pocket study, and the models of its four families."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from prism_nemo.errors import InputError

_DENSE: dict[str, Any] = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
# The four scalars are what makes Granite another function than Llama; all differ from 1 here.
_GRANITE: dict[str, Any] = {
    **_DENSE,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.15,
    "logits_scaling": 1.5,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        **_DENSE,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "hidden_act": "silu",
    },
    "granite": {
        **_GRANITE,
        "architectures": ["GraniteForCausalLM"],
        "model_type": "granite",
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "hidden_act": "silu",
    },
    "granite_hybrid": {
        **{key: value for key, value in _GRANITE.items() if key != "rope_theta"},
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "model_type": "granitemoehybrid",
        "shared_intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "layer_types": ["mamba", "attention", "mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_chunk_size": 32,
    },
    "nemotron_h": {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "hidden_size": 128,
        "hybrid_override_pattern": "M-*-M-*-",
        "intermediate_size": 384,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "ssm_state_size": 16,
        "mamba_num_heads": 8,
        "mamba_head_dim": 32,
        "n_groups": 1,
        "conv_kernel": 4,
        "chunk_size": 32,
    },
}
FAMILIES = tuple(MODELS)
HYBRIDS = ("granite_hybrid", "nemotron_h")
_RL_STEP = 4.8  # updates of mid-training that take the processor time of one step of RL; mean over families


@dataclass(frozen=True)
class StudySettings:
    """Everything that decides the study's numbers, but for which cells there are. Lengths are in tokens.

    Steps and rates were chosen in trials with other seeds, other test questions, and mostly by RL's reward on its
    training questions: at 850 steps of mid-training it rises over RL's 120 steps; after 600 the model solves too
    little, after 1,000 there is little left to learn; at a higher rate the reward falls before it rises. `pool` makes
    few questions come twice: with half of it, the reward rose three times as much as the accuracy on other questions.

    Attributes:
        base_steps: Updates of the base.
        midtrain_steps: Of each mid-trained model.
        rl_steps: Of each RL run.
        hybrid_share: Hybrids learn these tasks in fewer updates; they get this share of those of base and mid-training,
            so that RL starts where there is something left to learn.
        base_lr: Peak learning rate of the base.
        midtrain_lr: Of mid-training.
        rl_lr: Of RL.
        retention: Share of general text in mid-training.
        prompts_per_step: Of RL.
        group_size: Responses to each prompt.
        max_new_tokens: Longest response.
        pool: Training questions of each task that the prompt filter measures.
        filter_samples: Responses to each of them.
        least_right: Right ones that a prompt needs to be kept; 0 only where a test trains models that solve nothing.
        questions: Test questions of each task.
        held_out_rows: Rows of held-out general text for loss, remembered tokens and representations.
        path_rows: The same at each point between two models.
        path_questions: Questions of each task at the ends and the middle.
        documents_per_task: Worked problems of each task.
        general_chars: Characters of general text.
    """

    base_steps: int = 600
    midtrain_steps: int = 850
    rl_steps: int = 120
    hybrid_share: float = 0.6
    base_lr: float = 3e-3
    midtrain_lr: float = 2e-3
    rl_lr: float = 1.5e-4
    retention: float = 0.15
    vocab_size: int = 1024
    seq_length: int = 128
    global_batch_size: int = 8
    prompts_per_step: int = 16
    group_size: int = 8
    max_new_tokens: int = 40
    pool: int = 512
    filter_samples: int = 6
    least_right: int = 1
    questions: int = 400
    held_out_rows: int = 160
    path_rows: int = 48
    path_questions: int = 32
    documents_per_task: int = 12000
    general_chars: int = 2_600_000

    def steps(self, stage: str, family: str) -> int:
        """Updates of `base`, `midtrain` or `rl` for a family, at least one."""
        share = self.hybrid_share if family in HYBRIDS and stage != "rl" else 1.0
        return max(1, round(int(getattr(self, f"{stage}_steps")) * share))

    @property
    def longer_steps(self) -> int:
        """Updates of more mid-training in place of RL, in the same time."""
        return max(1, round(self.rl_steps * _RL_STEP))

    @property
    def longer_lr(self) -> float:
        """Peak learning rate of more mid-training: less than at first, as in the quickstart."""
        return self.midtrain_lr / 2


def check_settings(settings: StudySettings) -> None:
    """Refuse what would fail in the middle of the study, or measure nothing.

    Raises:
        InputError: Naming the key.
    """
    for item in fields(settings):
        value = getattr(settings, item.name)
        if not value > 0 and item.name != "least_right":
            raise InputError(f"{item.name}: {value} must be above 0")
    for name in ("retention", "hybrid_share"):
        if getattr(settings, name) > 1:
            raise InputError(f"{name}: {getattr(settings, name)} is a share; use at most 1")
    if settings.group_size < 2 or settings.filter_samples < 2:
        raise InputError("group_size and filter_samples must be at least 2: one answer has no relative advantage")
    hidden = max(int(model["hidden_size"]) for model in MODELS.values())
    if settings.held_out_rows <= hidden:
        raise InputError(f"held_out_rows: {settings.held_out_rows} must exceed the width {hidden}, or CKA says nothing")


_TINY = StudySettings(
    base_steps=6, midtrain_steps=5, rl_steps=2, pool=6, filter_samples=2, least_right=0, questions=12,
    held_out_rows=136, path_rows=8, path_questions=2, prompts_per_step=4, group_size=2, documents_per_task=400,
    general_chars=200_000,
)  # fmt: skip
BUDGETS = {
    "full": StudySettings(),
    "half": replace(StudySettings(), base_steps=300, midtrain_steps=425, rl_steps=60, pool=256, questions=200),
    "tiny": _TINY,
}


def budget_named(name: str) -> StudySettings:
    """A budget by its name.

    Raises:
        InputError: If there is none.
    """
    if name not in BUDGETS:
        raise InputError(f"--budget {name}: choose from {', '.join(BUDGETS)}")
    return BUDGETS[name]
