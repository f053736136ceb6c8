"""The weights of the pocket mixtures: what is not general text is shared out over the tasks, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from prism_nemo.quickstart.corpus import BASE_DOMAIN_SHARE, HELD_OUT, mixture_sources, mixtures
from prism_nemo.quickstart.settings import GENERAL_SHARE

DOCUMENTS = {name: Path(f"{name}.jsonl") for name in ("arithmetic", "lists", "formulas")}
SHARES = {"arithmetic": 0.5, "lists": 0.3, "formulas": 0.2}


@pytest.mark.parametrize(
    ("name", "general"), [("base", 1 - BASE_DOMAIN_SHARE), ("midtraining", GENERAL_SHARE)], ids=["base", "midtraining"]
)
def test_general_text_has_its_share_and_the_tasks_the_rest(name: str, general: float) -> None:
    mixture = mixtures(Path("general.jsonl"), Path("heldout.jsonl"), DOCUMENTS, SHARES)[name]
    weights = {source.name: source.weight for source in mixture.sources}
    assert weights["general"] == pytest.approx(general)
    assert sum(weights.values()) == pytest.approx(1.0)
    assert {task: weights[task] / (1 - general) for task in SHARES} == pytest.approx(SHARES)
    assert weights[HELD_OUT] == 0.0


def test_without_general_text_the_tasks_are_everything() -> None:
    """The study's mixture without retention."""
    sources = mixture_sources(Path("general.jsonl"), Path("heldout.jsonl"), DOCUMENTS, SHARES, 0.0)
    assert [source.weight for source in sources] == [0.0, 0.5, 0.3, 0.2, 0.0]
