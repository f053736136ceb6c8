"""A model of the story: where it lies, what made it, and the one colour and mark that it keeps on the page."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prism_nemo.report.find import Run
from prism_nemo.report.svg import Style

# How the roles look; a second model of the same role gets the next of the spare styles. Mark and dash repeat what the
# colour says, so that a print in grey or a reader who confuses two hues loses nothing.
STYLES = {
    "base": Style("s-base", "circle"),
    "pretrain": Style("s-base", "circle"),
    "midtrain": Style("s-midtrained", "square"),
    "base_rl": Style("s-base-rl", "triangle", "2 3"),
    "prism_rl": Style("s-prism-rl", "star"),
    "merge": Style("s-longer", "diamond", "7 3"),
    "hf": Style("s-other", "circle"),
    "stage": Style("s-other", "circle"),
}
SPARE = tuple(
    Style(css, mark, dash)
    for mark, dash in (("diamond", "7 3"), ("triangle", "2 3"), ("square", "9 2 2 2"), ("star", "5 5"))
    for css in ("s-longer", "s-other", "s-midtrained", "s-base-rl", "s-prism-rl", "s-base")
)
_ROLES = {
    "base": "base",
    "pretrain": "pre-training",
    "midtrain": "mid-training",
    "base_rl": "base → RL",
    "prism_rl": "mid-trained → RL",
    "merge": "merge",
    "hf": "Hugging Face folder",
    "stage": "a stage",
}


@dataclass
class Model:
    """One model of the story.

    Attributes:
        path: Its run directory, or the folder of its checkpoint.
        role: base, pretrain, midtrain, base_rl, prism_rl, merge, hf, or stage where it is not known.
        name: On the page.
        parents: Places of the models that it was made from; the first one is where it started.
        run: Its run, where it has one.
        evaluations: Those of its checkpoints, with the step (None for the whole folder).
        style: Colour, mark and dash, the same in every chart.
        origin: Path of the model that it was made from, for one whose lineage does not say.
        told: What was done, where the role says too little.
        lines: What the picture of the lineage says of it; empty for what its run and its evaluations say.
        text_loss: Loss on general text in nats per token, where it was measured beside the scores.
    """

    path: Path
    role: str
    name: str
    parents: list[int] = field(default_factory=list)
    run: Run | None = None
    evaluations: list[tuple[int | None, dict[str, Any]]] = field(default_factory=list)
    style: Style = field(default_factory=lambda: Style("s-other"))
    origin: str = ""
    told: str = ""
    lines: tuple[str, ...] = ()
    text_loss: float | None = None

    @property
    def what(self) -> str:
        """What was done, in a few words."""
        return self.told or _ROLES[self.role]


def real(path: Path) -> Path:
    """The path without links; as it is where it cannot be one of this machine, since it comes from a file."""
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError):
        return path
