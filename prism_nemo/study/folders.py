"""Where the study keeps what: results stay, models go once nothing needs them.

``data/SEED`` texts and tokenizer; ``cells/FAMILY/SEED/NAME/`` with ``measures.json`` (what was measured, no times),
``items.json`` (which questions and tokens were right) and ``timing.json``; ``models/FAMILY/SEED/NAME`` a run
directory; ``prompts/FAMILY/SEED/NAME`` what a filter kept.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_nemo.checkpoint.atomic import write_text
from prism_nemo.study.plan import Cell


@dataclass(frozen=True)
class Folders:
    """The places of one study.

    Attributes:
        out: Its folder.
    """

    out: Path

    def data(self, seed: int) -> Path:
        """Of a seed."""
        return self.out / "data" / str(seed)

    def run(self, cell: Cell) -> Path:
        """Run directory of a cell."""
        return self.run_of(cell.family, cell.seed, cell.name)

    def run_of(self, family: str, seed: int, name: str) -> Path:
        """The same by name."""
        return self.out / "models" / family / str(seed) / name

    def prompts(self, family: str, seed: int, model: str, task: str) -> Path:
        """Prompts of a task that a model's filter kept."""
        return self.out / "prompts" / family / str(seed) / model / f"{task}.jsonl"

    def results(self, cell: Cell) -> Path:
        """Folder of what was measured."""
        return self.out / "cells" / cell.key

    def read(self, cell: Cell, name: str = "measures") -> dict[str, Any] | None:
        """A result of a cell, or None."""
        path = self.results(cell) / f"{name}.json"
        return dict(json.loads(path.read_text())) if path.is_file() else None

    def write(self, cell: Cell, name: str, value: dict[str, Any]) -> None:
        """Keep a result, whole or not at all; keys are sorted, so equal numbers are equal bytes."""
        path = self.results(cell) / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")

    def drop_model(self, cell: Cell) -> None:
        """Remove a cell's run directory."""
        shutil.rmtree(self.run(cell), ignore_errors=True)
