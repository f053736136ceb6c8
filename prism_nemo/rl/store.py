"""Every rollout of a run, on disk: one compressed file of JSON lines for each step and data-parallel rank."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import zstandard

from prism_nemo.errors import InputError
from prism_nemo.rl.rollout import Rollout

FOLDER = "rollouts"
_NAME = re.compile(r"step_(\d{8})\.dp(\d{4})\.jsonl\.zst")


def record(step: int, index: int, rollout: Rollout) -> dict[str, Any]:
    """One rollout as a line: what was asked, what was written, and how it was scored."""
    response, score = rollout.response, rollout.score
    line: dict[str, Any] = {
        "step": step,
        "index": index,
        "prompt_number": rollout.number,
        "task": rollout.problem.task,
        "prompt": rollout.problem.prompt,
        "answer": rollout.problem.answer,
        "response": rollout.text,
        "extracted": score.answer,
        "reward": rollout.reward,
        "score": score.reward,
        "well_formed": score.well_formed,
        "finished": response.finished,
        "tokens": len(response.tokens),
        "mean_logprob": sum(response.logprobs) / max(1, len(response.logprobs)),
        "advantage": rollout.advantage,
    }
    if score.penalties:
        line["penalties"] = score.penalties
    if score.failure:
        line["failure"] = score.failure
    return line


class RolloutStore:
    """Where a rank writes its rollouts.

    Args:
        run: The run's directory.
        rank: Data-parallel rank.
        writes: Whether this process writes; one of each data-parallel rank does.
    """

    def __init__(self, run: Path, rank: int, writes: bool) -> None:
        self._folder, self._rank, self._writes = run / FOLDER, rank, writes
        if writes:
            self._folder.mkdir(parents=True, exist_ok=True)

    def write(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """Write a step's rollouts; a file is there whole or not at all."""
        if not self._writes:
            return
        lines = "".join(json.dumps(record(step, i, r)) + "\n" for i, r in enumerate(rollouts))
        path = self._folder / f"step_{step:08d}.dp{self._rank:04d}.jsonl.zst"
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))
        os.replace(temporary, path)

    def truncate(self, step: int) -> None:
        """Drop what was recorded after `step`, by any rank: a resumed run samples it again."""
        if self._writes and self._rank == 0:
            for found, path in _files(self._folder):
                if found > step:
                    path.unlink()


def _files(folder: Path) -> list[tuple[int, Path]]:
    found = [(match, path) for path in sorted(folder.glob("step_*")) if (match := _NAME.fullmatch(path.name))]
    return [(int(match[1]), path) for match, path in found]


def recorded_steps(run: Path) -> list[int]:
    """Steps whose rollouts are on disk, in order."""
    return sorted({step for step, _ in _files(run / FOLDER)})


def read_rollouts(run: Path, step: int) -> list[dict[str, Any]]:
    """All rollouts of a step, in the order of prompts.

    Args:
        run: Directory of an RL run.
        step: Which.

    Raises:
        InputError: If none were recorded for it; names the steps that were.
    """
    steps = recorded_steps(run)
    if step not in steps:
        kept = f"recorded are {len(steps)} steps, {steps[0]} to {steps[-1]}" if steps else "none are recorded there"
        raise InputError(f"{run}: has no rollouts of step {step}; {kept}")
    lines: list[dict[str, Any]] = []
    for found, path in _files(run / FOLDER):
        if found != step:
            continue
        try:
            # In one piece: zstandard's stream reader takes a file that was cut short for one that ends there.
            text = zstandard.ZstdDecompressor().decompress(path.read_bytes()).decode()
            lines += [json.loads(line) for line in text.splitlines()]
        except (zstandard.ZstdError, ValueError) as error:
            raise InputError(f"{path}: is damaged ({error})") from error
    return sorted(lines, key=lambda line: (line["prompt_number"], line["index"]))
