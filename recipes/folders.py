"""Where things lie below one folder, as the pipeline and the scripts in `slurm/` have it.

``hf/MODEL`` (given), ``data/MODEL/MIXTURE`` (``prism-nemo data build`` with the model's tokenizer), ``prompts/SET``
(given), ``checkpoints/MODEL``, ``runs/NAME``, ``evaluations/NAME-SUITE``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Folders:
    """Paths below one folder.

    Attributes:
        root: The folder.
    """

    root: Path

    def hf(self, name: str) -> str:
        """A Hugging Face folder."""
        return str(self.root / "hf" / name)

    def checkpoint(self, name: str) -> str:
        """A native checkpoint that was imported."""
        return str(self.root / "checkpoints" / name)

    def data(self, model: str, mixture: str) -> str:
        """Tokens of a mixture, made with a model's tokenizer."""
        return str(self.root / "data" / model / mixture)

    def prompts(self, name: str) -> str:
        """Prompts of RL."""
        return str(self.root / "prompts" / name)

    def run(self, name: str) -> str:
        """Directory of a stage."""
        return str(self.root / "runs" / name)

    def evaluation(self, name: str) -> str:
        """Folder of one suite's results."""
        return str(self.root / "evaluations" / name)
