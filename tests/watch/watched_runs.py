"""Directories of runs as an RL stage leaves them, and hostile ones."""

from __future__ import annotations

import json
from pathlib import Path

import zstandard

HOSTILE = (
    '<img src=x onerror="window.broken=1"><script>window.broken=1</script></script>&lt;b&gt; '
    "\u202ereversed \x00\x1b[31m"
)


def make_run(folder: Path, steps: int, text: str = "2+2=?") -> Path:
    """An RL run of 100 steps that has done some; `text` stands wherever text can."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("train_steps: 100\n")
    lineage = {"stage": "rl", "starts": [{"time": "2026-11-28T04:25:18+0000", "step": 0}], "events": [{"event": text}]}
    (folder / "lineage.json").write_text(json.dumps(lineage))
    more_steps(folder, 1, steps, text)
    lines = [
        {"step": steps, "index": i, "prompt_number": i, "task": text, "prompt": text, "answer": text, "response": text,
         "reward": float(i % 2)}
        for i in range(12)
    ]  # fmt: skip
    (folder / "rollouts").mkdir()
    packed = zstandard.ZstdCompressor().compress("".join(json.dumps(line) + "\n" for line in lines).encode())
    (folder / f"rollouts/step_{steps:08d}.dp0000.jsonl.zst").write_bytes(packed)
    return folder


def more_steps(folder: Path, first: int, last: int, text: str = "arithmetic") -> None:
    """Append to metrics.jsonl, as a stage does."""
    with (folder / "metrics.jsonl").open("a") as file:
        for step in range(first, last + 1):
            line = {
                "step": step, "loss": 2.0 / step, "reward": step / 100, "reward_by_task": {text: step / 100},
                "response_length": 20.0, "entropy": 1.0 / step, "grad_norm": 0.5, "lr": 1e-4, "seconds": step * 0.5,
                "tokens_per_second": 8000.0, "logprob_gap": 1e-7, f"loss/{text}": 1.0 / step,
            }  # fmt: skip
            file.write(json.dumps(line) + "\n")
