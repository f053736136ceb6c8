r"""RL with verifiable rewards, with the study's hyper-parameters (arXiv 2603.17074, table 21).

prism-nemo rl recipes/rl.py checkpoint=CKPT tokenizer=DIR run_dir=runs/rl model=granite-3.3-8b hardware=h100x64 \
    prompts=FOLDER mixture=mcs
"""

from pathlib import Path

from prism_nemo.config import RLConfig
from prism_nemo.errors import InputError
from prism_nemo.models.catalog import find
from recipes.hardware import layout_values
from recipes.provenance import Values, fill, given, inferred, ours, study

MIXTURES = {"mc": ("math", "code"), "mcs": ("math", "code", "science")}
CONTEXT = 16_384
PROMPT = 2048

STUDY_VALUES: Values = {
    "train_steps": study(1000, "Table 21; curves of one model run to 2,000 steps (Figure 17)"),
    "rollout.group_size": study(16, "Table 21"),
    "rollout.prompts_per_step": study(64, "Table 21"),
    "rollout.temperature": study(1.0, "Table 21"),
    "rollout.top_p": study(1.0, "Table 21"),
    "optimizer.lr": study(5e-7, "Table 21"),
    "optimizer.weight_decay": ours(0.0, "not stated; none, so that a step of 5e-7 is the gradient's alone"),
    "schedule.decay": study("linear", "Table 21"),
    "schedule.min_lr_ratio": ours(0.0, "the end of the linear decay is not stated"),
    "schedule.lr_warmup_steps": ours(0, "not stated"),
    "grpo.aggregation": study("group", "Appendix 15: divided by the tokens of the group"),
    "grpo.normalize_advantage": study(True, "Appendix 15: (r - mean) / (std + eta)"),
    "grpo.importance_cap": study(2.0, "Table 21: truncated importance sampling, C"),
    "grpo.kl_beta": study(0.05, "Table 21"),
    "grpo.clip_low": ours(0.2, "the study has two symbols and no values; the usual one"),
    "grpo.clip_high": ours(0.28, "the study has two symbols and no values; DAPO's (arXiv 2503.14476)"),
    "grpo.reference_alpha": ours(0.6, "soft update, no value stated; TR-DPO's (arXiv 2404.09656)"),
    "grpo.reference_period": ours(100, "soft update, no period stated"),
    "grpo.mini_batches": study(1, "Table 21: strictly on-policy"),
    "grpo.epochs": study(1, "Table 21: strictly on-policy"),
    "rewards.gate": study("think", "Section 9: answers of another form get 0"),
}


def values(
    checkpoint: str,
    tokenizer: str,
    run_dir: str,
    hardware: str = "cpu",
    model: str = "",
    prompts: str = "",
    mixture: str = "mcs",
) -> Values:
    """The recipe with where each value came from; see `rl`.

    Raises:
        InputError: For a mixture that the study did not train with.
    """
    if mixture not in MIXTURES:
        raise InputError(f"mixture '{mixture}' of RL prompts is unknown; choose one of {', '.join(MIXTURES)}")
    found: Values = {
        "run_dir": given(run_dir),
        "init_from": given(checkpoint),
        "tokenizer": given(tokenizer),
        **STUDY_VALUES,
        **layout_values(hardware, model, "rl"),
    }
    if prompts:
        files = [f"prompts:{Path(prompts) / f'{domain}.jsonl'}" for domain in MIXTURES[mixture]]
        found["tasks"] = study(files, f"Section 9.1: the {mixture} mixture of prompts")
        found["task_shares"] = inferred("size", "Section 9.1: one pool of all prompts, so each is as likely")
    if model:
        room = min(CONTEXT, find(model).context_length)
        why = f"Table 21: {CONTEXT:,} for prompt and response, split not stated: {PROMPT:,} left for the prompt"
        if room < CONTEXT:
            why = f"{model} reads {room:,} tokens, not the study's {CONTEXT:,}; {PROMPT:,} left for the prompt"
        found["rollout.max_new_tokens"] = ours(room - PROMPT, why)
        found["micro_batch_size"] = ours(1, "one response of up to 14,336 tokens at a time: more may not fit")
    return found


def rl(
    checkpoint: str,
    tokenizer: str,
    run_dir: str,
    hardware: str = "cpu",
    model: str = "",
    prompts: str = "",
    mixture: str = "mcs",
) -> RLConfig:
    """GRPO with 64 prompts x 16 responses, 1000 steps at 5e-7, KL 0.05.

    Args:
        checkpoint: Native checkpoint to start from.
        tokenizer: Hugging Face folder.
        run_dir: Directory of the run.
        hardware: Name in `recipes.hardware`.
        model: Name in the catalog: a layout, and lengths that fit it; empty for the defaults of `RLConfig`.
        prompts: Folder with math.jsonl, code.jsonl and science.jsonl; else give ``tasks=[...]``.
        mixture: Of prompts: mcs, or mc without science.
    """
    return fill(RLConfig, values(checkpoint, tokenizer, run_dir, hardware, model, prompts, mixture))
