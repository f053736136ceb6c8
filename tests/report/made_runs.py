"""Folders of a small pipeline as the commands leave them, written by hand: runs, a merge, results."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

START = "2026-11-28T0{hour}:00:00+0000"


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def make_run(
    path: Path,
    stage: str,
    lines: list[dict[str, Any]],
    parent: Path | None = None,
    recorded_as: str | None = None,
    hours: tuple[tuple[int, int], ...] = ((1, 0),),
    steps: int = 40,
) -> Path:
    """A run directory with one checkpoint; `hours` are the hour and the step of each start."""
    manifest = write(path / f"checkpoints/step_{steps:08d}/manifest.json", {"of": str(path)})
    events: list[dict[str, Any]] = []
    parents = []
    if parent is not None:
        parents = [recorded_as or str(parent)]
        digest = hashlib.sha256((parent / "manifest.json").read_bytes()).hexdigest()
        events = [{"event": "started from", "checkpoint": parents[0], "manifest_sha256": digest}]
    starts = [
        {"time": START.format(hour=hour), "step": step, "command": ["prism-nemo", stage, path.name]}
        for hour, step in hours
    ]
    write(path / "lineage.json", {"stage": stage, "parents": parents, "versions": {"torch": "2.13.0+cpu"},
                                  "starts": starts, "events": events})  # fmt: skip
    parallel = {f"{name}_parallel_size": 1 for name in ("tensor_model", "pipeline_model", "context")}
    config = {"seed": 7, "train_steps": steps, "init_from": parents[0] if parents else None,
              "parallel": {**parallel, "data_parallel_size": 2}}  # fmt: skip
    (path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return manifest.parent


def midtrain_lines(count: int = 40, source: str = "maths") -> list[dict[str, Any]]:
    return [
        {"step": i, "loss": 3 - i / 50, "grad_norm": 1.0, "tokens": 1000 * i, "tokens_per_second": 900.0,
         "seconds": 10.0 * i, f"loss/{source}": 2 - i / 50}
        for i in range(1, count + 1)
    ]  # fmt: skip


def rl_lines(count: int = 40, task: str = "sums") -> list[dict[str, Any]]:
    return [
        {"step": i, "loss": 0.1, "reward": i / 50, "reward_by_task": {task: i / 60}, "response_length": 20.0 + i,
         "entropy": 1 / i, "live_groups": 0.5, "finished": 0.9, "logprob_gap": 1e-6, "seconds": 5.0 * i}
        for i in range(1, count + 1)
    ]  # fmt: skip


def evaluation(path: str, name: str, score: float, split: str = "test", questions: str = "q1") -> dict[str, Any]:
    task = {"domain": "math", "metric": "pass@1", "estimate": score, "low": score - 0.05, "high": score + 0.05,
            "questions": 48, "higher_is_better": True, "chance": None}  # fmt: skip
    average = {"estimate": score, "low": score - 0.05, "high": score + 0.05, "of": {"math": ["sums"]}}
    return {"suite": "reasoning", "split": split, "model": {"path": path, "name": name, "hash": "00"},
            "settings": {"tasks": {"sums": {"questions": questions}}}, "tasks": {"sums": task},
            "averages": {"domain_weighted": average}, "marks": []}  # fmt: skip


def retention(name: str = "rl_on_mid", task: str = "sums") -> dict[str, Any]:
    line = {"name": task, "unit": "share", "base": 0.5, "model": 0.4, "change": -0.1, "low": -0.2, "high": -0.02,
            "verdict": "lost", "questions": 48, "items": {"forgotten": ["a", "b", "c"], "learned": ["d"]}}  # fmt: skip
    text = {**line, "name": "held out", "unit": "nats", "change": -0.25, "low": -0.3, "high": -0.2, "items": None}
    return {"base": "base", "margin": 0.01, "models": [{"name": name, "lines": [line, text]}], "marks": []}


def weights(before: str, after: str, part: str = "mlp.up") -> dict[str, Any]:
    change = {"changed_fraction_1pct": 0.61, "relative_l2": 0.02}
    nulls = [{"name": "random_walk", "thresholds": {"1": 0.66}}, {"name": "fitted", "thresholds": {"1": 0.61}}]
    transition = {**change, "before": before, "after": after, "by_subcomponent": {part: change},
                  "by_layer": {"0": change, "1": change}, "nulls": {"total": nulls, part: nulls}}  # fmt: skip
    return {"transitions": [transition], "overlaps": [], "trajectory": []}


def cka(pair: str = "base / mid") -> dict[str, Any]:
    row = {"pair": pair, "input": "general", "pooling": "mean", "treatment": "raw", "measure": "debiased"}
    rows = [{**row, "layer": i, "value": 0.9 - 0.1 * i, "null": 0.99} for i in range(3)]
    maps = [{"pair": pair, "input": "general", "measure": "debiased", "values": [[1.0, 0.5], [0.5, 1.0]]}]
    return {"models": [], "rows": rows, "maps": maps}


def path_result(name: str = "general") -> dict[str, Any]:
    points = ((0, 0, 3.0), (1, 0, 2.5), (1, 1, 2.25), (0.5, 0.5, 9.0))
    rows = [
        {"alpha": a, "beta": b, "measure": "loss", "name": name, "value": v, "low": v - 0.1, "high": v + 0.1}
        for a, b, v in points
    ]
    return {"models": ["base", "mid", "rl"], "rows": rows, "barriers": []}


def make_job(run: Path) -> None:
    """What slurm/stage.sh and slurm/chain.sh leave in a run whose job was queued again twice."""
    write(run / "slurm.json", {"job": "4711", "nodes": "node[1-4]", "restarts": 2, "log": "/logs/mid-4711.out"})
    (run / "chain").mkdir()
    for name, content in (("restarts", "2"), ("stalled", "1"), ("bad_nodes", "node7")):
        (run / "chain" / name).write_text(f"{content}\n", encoding="utf-8")


def make_pipeline(root: Path, name: str = "sums") -> Path:
    """Everything that a chain leaves, in one folder."""
    base = make_run(root / "runs/base", "midtrain", midtrain_lines(source=name))
    mid = make_run(root / "runs/mid", "midtrain", midtrain_lines(source=name), base, hours=((2, 0), (4, 20)))
    tuned = make_run(root / "runs/rl_on_mid", "rl", rl_lines(task=name), mid, hours=((5, 0),))
    plain = make_run(root / "runs/rl_on_base", "rl", rl_lines(task=name), base, hours=((6, 0),))
    merge = {"method": "linear", "weights": [0.15, 0.85], "parents": [{"path": str(base)}, {"path": str(mid)}]}
    write(root / "merged/merge.json", merge)
    scores = ((base, 0.1), (mid, 0.4), (tuned, 0.7), (plain, 0.2))
    for number, (checkpoint, score) in enumerate(scores):
        write(root / f"results/{number}/evaluation.json", evaluation(str(checkpoint), name, score))
    write(root / "results/r.json", retention(name))
    write(root / "results/w.json", weights(str(base), str(mid), name))
    write(root / "results/c.json", cka(name))
    write(root / "results/p.json", path_result(name))
    card = {"model": "base", "family": "llama", "verified": {"logits at TP 2": {"command": name, "date": "2026-11-28"}},
            "failed": {"weights bit for bit": {"command": "verify"}}, "not_verified": {"training": name}}  # fmt: skip
    (root / "results/card.yaml").write_text(yaml.safe_dump(card), encoding="utf-8")
    return root
