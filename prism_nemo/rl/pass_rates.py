"""Pass rates of prompts on disk, so that a measurement which was cut short goes on where it was."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prism_nemo.checkpoint.atomic import write_text
from prism_nemo.errors import InputError
from prism_nemo.rl.rollout import Rollout


class PassRates:
    """The measured prompts on disk: a first line that says what was measured, then a line each, in order.

    Args:
        path: Where.
        identity: What is measured.

    Attributes:
        count: Prompts that were measured before.

    Raises:
        InputError: If what is there was measured with something else, or is damaged.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self._path = path
        self.count = 0
        if path.is_file():
            header, lines = read_measured(path)
            if header != identity:
                changed = [key for key in identity if header.get(key) != identity[key]]
                raise InputError(f"{path}: was measured with another {', '.join(changed)}; remove it to measure anew")
            self.count = len(lines)
            # Without a last line that a kill cut short.
            write_text(path, "".join(json.dumps(line) + "\n" for line in [header, *lines]))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(identity) + "\n")

    def append(self, lines: Sequence[dict[str, Any]]) -> None:
        """Add the pass rates of more prompts."""
        with self._path.open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())


def read_measured(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What was measured, and the pass rate of each prompt so far.

    Raises:
        InputError: If the file is damaged before its last line.
    """
    found: list[dict[str, Any]] = []
    raw = path.read_text().splitlines()
    for number, line in enumerate(raw):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            if number + 1 < len(raw) or number == 0:
                raise InputError(f"{path}:{number + 1}: not valid JSON; remove the file to measure anew") from None
    if not found:
        raise InputError(f"{path}: is empty; remove the file to measure anew")
    return found[0], found[1:]


def pass_rate(group: Sequence[Rollout]) -> dict[str, Any]:
    """What is kept of the answers to one prompt; right are those with full marks, whatever penalties they have."""
    return {
        "domain": group[0].problem.domain,
        "right": sum(r.score.right for r in group),
        "well_formed": sum(r.score.well_formed for r in group),
        "finished": sum(r.response.finished for r in group),
        "tokens": sum(len(r.response.tokens) for r in group),
        "failures": dict(Counter(r.score.failure for r in group if r.score.failure)),
    }


def solved(lines: Sequence[dict[str, Any]]) -> float:
    """Share of prompts that were solved at least once."""
    return sum(line["right"] > 0 for line in lines) / len(lines)
