"""What a model answers and remembers: accuracy by task, length, entropy, and held-out general text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from prism_nemo.config import RewardConfig, RolloutConfig
from prism_nemo.data.held_out import held_out_rows
from prism_nemo.data.tokenizer import load_tokenizer
from prism_nemo.evaluation.statistics.differences import token_mean
from prism_nemo.evaluation.statistics.intervals import wilson_interval
from prism_nemo.generation.engine import Engine
from prism_nemo.models.decoder import LanguageModel
from prism_nemo.models.forward import positions
from prism_nemo.quickstart.corpus import HELD_OUT
from prism_nemo.rl.rewards.judge import Judge
from prism_nemo.rl.rewards.task import task_named
from prism_nemo.rl.rollout import judge_responses, sample_responses
from prism_nemo.study.plan import MIXTURES

TASKS = MIXTURES["mcs"]
_SAMPLING_SEED = 21


def answer(
    model: LanguageModel, data: Path, questions: int, max_new_tokens: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One sampled answer (temperature 1) to each test question, all tasks in one batch.

    The answers are judged twice: with the `<think>` gate, as in training, and without. Entropy is estimated from the
    sampled tokens themselves: the mean of -log p of a sample of p is p's entropy, without bias.

    Returns:
        By task: ``right``, ``n``, ``accuracy``, ``low``, ``high`` (Wilson, 95 %), ``free_accuracy`` (without the gate),
        ``format_rate``, ``response_tokens``, ``entropy`` (nats per token); and by task the string of 0 and 1 that says
        which questions were right.
    """
    tokenizer = load_tokenizer(data / "tokenizer")
    tasks = {name: task_named(name) for name in TASKS}
    asked = [problem for task in tasks.values() for problem in task.distinct(questions, "test", _SAMPLING_SEED)]
    numbered = list(enumerate(asked))
    rollout = RolloutConfig(group_size=1, prompts_per_step=1, max_new_tokens=max_new_tokens)
    engine = Engine(model)
    responses = sample_responses(engine, numbered, tokenizer, rollout, _SAMPLING_SEED)
    verdicts = {}
    for gate in ("think", "none"):
        with Judge(RewardConfig(gate=gate), tasks, max_new_tokens, tokenizer.end) as judge:
            verdicts[gate] = judge_responses(numbered, responses, judge, tokenizer)
    found, items = {}, {}
    for name in TASKS:
        mine = [n for n, problem in numbered if problem.task == name]
        gated = [verdicts["think"][n] for n in mine]
        right = [int(one.score.reward == 1) for one in gated]
        lengths = [len(one.response.tokens) for one in gated]
        bounds = wilson_interval(sum(right), len(right))
        logprobs = sum(sum(one.response.logprobs) for one in gated)
        found[name] = {
            "right": sum(right), "n": len(right), "accuracy": sum(right) / len(right),
            "low": bounds.low, "high": bounds.high,
            "free_accuracy": sum(verdicts["none"][n].score.reward == 1 for n in mine) / len(mine),
            "format_rate": sum(one.score.well_formed for one in gated) / len(gated),
            "response_tokens": sum(lengths) / len(lengths),
            "entropy": -logprobs / max(1, sum(lengths)),
        }  # fmt: skip
        items[name] = "".join(map(str, right))
    return found, items


@torch.no_grad()
def remember(model: LanguageModel, data: Path, rows: int, seq_length: int) -> tuple[dict[str, Any], str]:
    """Loss on held-out general text, and which of its tokens the model puts first.

    Returns:
        ``loss`` with ``low`` and ``high`` (95 %, rows drawn), ``top1`` (share), ``tokens``; and the tokens that were
        right as hexadecimal digits of a bit string, row by row.
    """
    tokens, labels = held_out_rows(data / "tokens" / "base", HELD_OUT, seq_length, rows)
    losses, bits = [], []
    for part, target in zip(tokens.split(32), labels.split(32), strict=True):
        logits = model(part, positions(part), None).float()
        flat = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        losses += flat.view(target.shape).double().mean(1).tolist()
        bits += (logits.argmax(-1) == target).flatten().int().tolist()
    mean = token_mean(losses, [float(seq_length)] * len(losses))
    packed = int("1" + "".join(map(str, bits)), 2)
    return (
        {"loss": mean.estimate, "low": mean.low, "high": mean.high, "top1": sum(bits) / len(bits), "tokens": len(bits)},
        f"{packed:x}",
    )


def forgotten(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What was right before and is wrong after, and the reverse, on the same questions and tokens.

    Answers are sampled, so a model beside itself would also lose some of them; the tokens of general text are not.

    Returns:
        For each task and for ``general``: ``right_before``, ``forgotten``, ``learned``, ``n``.
    """
    pairs = {task: (before["answers"][task], after["answers"][task]) for task in after["answers"]}
    pairs["general"] = (_bits(before["general"]), _bits(after["general"]))
    return {
        name: {
            "n": len(new),
            "right_before": old.count("1"),
            "forgotten": sum(a == "1" and b == "0" for a, b in zip(old, new, strict=True)),
            "learned": sum(a == "0" and b == "1" for a, b in zip(old, new, strict=True)),
        }
        for name, (old, new) in pairs.items()
    }


def _bits(packed: str) -> str:
    return f"{int(packed, 16):b}"[1:]
