"""A quickstart directory with made-up but realistic numbers, small enough to be written for every test."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

STAGES = ("base", "midtrained", "midtrained_longer", "base_rl", "prism_rl")
ACCURACY = {
    "arithmetic": (0.0312, 0.4727, 0.4961, 0.0586, 0.7813),
    "code_execution": (0.01953, 0.3867, 0.4219, 0.0234, 0.6016),
    "science_choice": (0.2383, 0.4453, 0.4414, 0.2656, 0.6289),
}
PAIRS = (("base", "midtrained"), ("midtrained", "prism_rl"), ("base", "base_rl"))


def summary() -> dict[str, Any]:
    """Returns a complete `summary.json`."""
    stages: dict[str, Any] = {}
    for place, name in enumerate(STAGES):
        tasks = {}
        for task, values in ACCURACY.items():
            value, half = values[place], 1.96 * math.sqrt(values[place] * (1 - values[place]) / 256) + 0.004
            tasks[task] = {
                "accuracy": value,
                "ci95": [round(max(0, value - half), 4), round(min(1, value + half), 4)],
                "n": 256,
                "greedy_accuracy": round(min(1, value * 1.08), 4),
                "greedy_ci95": [round(max(0, value * 1.08 - half), 4), round(min(1, value * 1.08 + half), 4)],
                "format_rate": round(0.1 + 0.85 * (name not in ("base", "base_rl")), 4),
                "mean_response_tokens": 21.375 + place,
            }
        losses = (3.2014, 3.2471, 3.2633, 3.3158, 3.2622)
        domain = {"general": losses[place], "math": 4.9 - 1.7 * (place > 0), "code": 4.4 - 1.2 * (place in (1, 2, 4))}
        stages[name] = {"tasks": tasks, "retention_loss": losses[place], "domain_losses": domain}
    weights = {}
    for (before, after), size in zip(PAIRS, (0.91, 0.34, 0.41), strict=True):
        parts = {
            name: {"changed_fraction_1pct": round(size * factor, 4), "relative_l2": round(0.2 * size * factor, 5)}
            for name, factor in (("attention", 1.0), ("mlp", 0.95), ("embedding", 0.5), ("norm", 0.1))
        }
        weights[f"{before}->{after}"] = {
            "changed_fraction_1pct": size,
            "relative_l2": 0.2134 * size,
            "by_component": parts,
        }
    cka = {
        f"{before}/{after}": {"min": 1 - 4 * drop, "by_layer": [1 - place * drop for place in range(5)]}
        for (before, after), drop in zip(PAIRS, (0.06, 0.0021, 0.012), strict=True)
    }
    return {
        "seconds": 512.3,
        "peak_rss_gb": 3.1,
        "versions": {"python": "3.11.7", "torch": "2.13.0", "megatron-core": "0.16.1", "transformers": "5.24.0"},
        "command": "prism-nemo quickstart --out runs/first",
        "machine": "2 cores, 23 GB, Linux",
        "seed": 1234,
        "model": {"family": "llama", "parameters": 935_000, "layers": 4, "hidden_size": 128, "vocab_size": 1024},
        "timeline": timeline(),
        "stages": stages,
        "weights": weights,
        "cka": cka,
        "conversion": [
            {"check": "HF -> Megatron TP2", "max_abs_logit_diff": 1.1e-6, "tolerance": 1e-4, "passed": True},
            {"check": "Megatron PP2 -> HF", "max_abs_logit_diff": 9.5e-7, "tolerance": 1e-4, "passed": True},
        ],
        "hf_export": {"path": "runs/first/hf", "max_abs_logit_diff": 1.2e-6, "loads_in_transformers": True},
        "expected": [
            {"claim": "mid-trained beats base on every task family", "holds": True, "detail": "+44.1, +36.7, +20.7"},
            {"claim": "RL adds to mid-training on every family", "holds": True, "detail": "+30.9, +21.5, +18.4"},
            {"claim": "RL alone does not replace mid-training", "holds": True, "detail": "11.6% against 43.5%"},
            {
                "claim": "the longer control does not beat mid-training",
                "holds": False,
                "detail": "code_execution 42.2% against 38.7%, inside both intervals",
            },
        ],
        "mixtures": {"midtraining": mixture()},
        "samples": samples(),
    }


def timeline() -> list[dict[str, Any]]:
    """Returns the parts of a run in order."""
    parts = [
        ("data", 21.4, "", None, "tokenizer and mixtures"),
        ("base", 101.2, "tp1 pp1 dp2", 1_024_000, ""),
        ("midtrained", 98.7, "tp2 pp1 dp1", 1_024_000, "resumed once"),
        ("midtrained_longer", 61.0, "tp1 pp2 dp1", 614_400, "control"),
        ("base_rl", 70.3, "tp1 pp1 dp2", 388_200, ""),
        ("prism_rl", 74.9, "tp1 pp1 dp2", 402_100, ""),
        ("evaluation", 64.2, "", None, "5 checkpoints"),
        ("analysis", 12.1, "", None, ""),
        ("export", 0.4, "", None, "safetensors"),
    ]
    found, now = [], 3.1
    for stage, seconds, layout, tokens, note in parts:
        entry = {"stage": stage, "start": round(now, 1), "seconds": seconds, "layout": layout, "note": note}
        found.append(entry if tokens is None else {**entry, "tokens": tokens})
        now += seconds + 0.5
    return found


def mixture() -> list[dict[str, Any]]:
    """Returns the sources of a mixture."""
    rows = [
        ("python docs", "general", 0.15, 0.6),
        ("man pages", "general", 0.1, 0.4),
        ("arithmetic problems", "math", 0.3, 1.0),
        ("short programs", "code", 0.25, 1.2),
        ("science questions", "science", 0.2, 1.5),
    ]
    return [
        {"source": name, "domain": domain, "weight": weight, "tokens": int(1_024_000 * weight), "epochs": epochs}
        for name, domain, weight, epochs in rows
    ]


def samples() -> dict[str, list[dict[str, Any]]]:
    """Returns sample responses of three stages to the same prompts."""
    found: dict[str, list[dict[str, Any]]] = {"base": [], "midtrained": [], "prism_rl": []}
    for place in range(9):
        task = list(ACCURACY)[place % 3]
        prompt = f"User: What is {place + 17} + {4 * place + 51}?\nAssistant:"
        answer = str(5 * place + 68)
        wrote = {
            "base": "the module :mod:`os` provides a portable way of using",
            "midtrained": f"<think>{place + 17} + {4 * place + 51} = {5 * place + 58}</think>{5 * place + 58}",
            "prism_rl": f"<think>{place + 17} + {4 * place + 51} = {answer}</think>{answer}",
        }
        for stage, response in wrote.items():
            reward = float(stage == "prism_rl")
            sample = {"task": task, "prompt": prompt, "response": response, "answer": answer, "reward": reward}
            found[stage].append(sample)
    return found


def training_lines(start: float, end: float, steps: int, seed: int) -> list[dict[str, Any]]:
    """Returns the metrics of a training stage whose loss falls from start to end."""
    noise = random.Random(seed)
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = end + (start - end) * math.exp(-5 * step / steps) + noise.gauss(0, 0.05)
        lines.append(
            {"step": step, "loss": round(loss, 4), "lr": 1e-3, "tokens": 2560 * step, "tokens_per_second": 11000,
             "grad_norm": 1.0, "seconds": 0.2 * step, "loss/python docs": round(loss + 0.2, 4)}
        )  # fmt: skip
        if step % 50 == 0:
            lines.append({"step": step, "validation_loss": round(loss + 0.1, 4)})
    return lines


def rl_lines(start: float, end: float, steps: int, seed: int) -> list[dict[str, Any]]:
    """Returns the metrics of an RL stage whose reward rises from start to end."""
    noise = random.Random(seed)
    lines = []
    for step in range(1, steps + 1):
        reward = start + (end - start) * (1 - math.exp(-4 * step / steps))
        by_task = {task: min(1, max(0, reward + noise.gauss(0, 0.07))) for task in ACCURACY}
        lines.append(
            {
                "step": step,
                "reward": round(sum(by_task.values()) / 3, 4),
                "reward_by_task": {task: round(value, 4) for task, value in by_task.items()},
                "response_length": round(21 + noise.gauss(0, 0.8) + 3 * reward, 2),
                "entropy": round(0.5 * math.exp(-2 * step / steps) + abs(noise.gauss(0, 0.02)), 4),
                "live_groups": round(min(1, max(0, 0.2 + 1.4 * reward * (1 - reward) + noise.gauss(0, 0.05))), 3),
                "kl": 0.001,
                "logprob_gap": 1.3e-6,
                "finished": 0.97,
                "tokens_per_second": 5000,
                "seconds": 0.5 * step,
            }
        )
    return lines


def write_metrics(directory: Path, stage: str, lines: list[dict[str, Any]]) -> Path:
    """Writes the `metrics.jsonl` of a stage and returns its path."""
    path = directory / stage / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def write_run(directory: Path, content: dict[str, Any] | None = None) -> Path:
    """Writes a complete quickstart directory, with another `summary.json` if one is given."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "summary.json").write_text(json.dumps(summary() if content is None else content), encoding="utf-8")
    stages: tuple[tuple[str, str, str, int, list[dict[str, Any]]], ...] = (
        ("base", "midtrain", "", 400, training_lines(6.9, 3.1, 400, 1)),
        ("midtrained", "midtrain", "base", 400, training_lines(3.6, 1.6, 400, 2)),
        ("midtrained_longer", "midtrain", "midtrained", 240, training_lines(1.7, 1.55, 240, 3)),
        ("base_rl", "rl", "base", 120, rl_lines(0.05, 0.11, 120, 4)),
        ("prism_rl", "rl", "midtrained", 120, rl_lines(0.43, 0.68, 120, 5)),
    )
    for place, (stage, kind, parent, steps, lines) in enumerate(stages):
        write_metrics(directory, stage, lines)
        write_lineage(directory / stage, kind, directory / parent if parent else None, steps, place)
    return directory


def write_lineage(run: Path, kind: str, parent: Path | None, steps: int, minute: int) -> None:
    """Writes `lineage.json` and `config.yaml` of a stage that began so many minutes after the others."""
    start = {"time": f"2026-11-28T08:{minute:02d}:00+0000", "step": 0, "command": ["prism-nemo", "quickstart"]}
    parents = [str(parent / "checkpoints/step_00000400")] if parent is not None else []
    versions = {"python": "3.11.7", "torch": "2.13.0+cpu"}
    lineage = {"stage": kind, "parents": parents, "versions": versions, "starts": [start], "events": []}
    (run / "lineage.json").write_text(json.dumps(lineage), encoding="utf-8")
    parallel = {f"{name}_parallel_size": 1 for name in ("tensor_model", "pipeline_model", "data", "context")}
    config = {"seed": 1234 + minute, "train_steps": steps, "parallel": parallel}
    (run / "config.yaml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
