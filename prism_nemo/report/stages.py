"""The stages of the pipeline: their order, names, parents, and the one colour and mark that each keeps on the page."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from prism_nemo.report.svg import Style


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline as the page shows it.

    Attributes:
        key: Name in `summary.json` and of the run directory.
        label: Name on the page.
        parent: Key of the stage that it starts from, or None.
        explanation: What was done, in a few words.
        style: Colour class, mark and dash, the same in every chart.
    """

    key: str
    label: str
    parent: str | None
    explanation: str
    style: Style


# Colours live in page.css under the same class names. Mark and dash repeat what the colour says, so that a print in
# grey or a reader who confuses two hues loses nothing.
STAGES: tuple[Stage, ...] = (
    Stage("base", "Base", None, "pre-training", Style("s-base", "circle")),
    Stage("midtrained", "Mid-trained", "base", "mid-training", Style("s-midtrained", "square")),
    Stage(
        "midtrained_longer",
        "Longer mid-training",
        "midtrained",
        "control: more mid-training",
        Style("s-longer", "diamond", "7 3"),
    ),
    Stage("base_rl", "RL on base", "base", "RL without mid-training", Style("s-base-rl", "triangle", "2 3")),
    Stage("prism_rl", "RL on mid-trained", "midtrained", "RL", Style("s-prism-rl", "star")),
)
RL_KEYS = ("base_rl", "prism_rl")

_BY_KEY = {stage.key: stage for stage in STAGES}
_ORDER = {stage.key: place for place, stage in enumerate(STAGES)}


def stage(key: str) -> Stage:
    """Returns the stage of that name; an unknown one gets the neutral style and its own key as label."""
    return _BY_KEY.get(key) or Stage(key, key, None, "", Style("s-other", "circle"))


def ordered(keys: Iterable[str]) -> list[Stage]:
    """Returns the stages of these names in pipeline order, unknown ones last in their own order."""
    return sorted((stage(key) for key in keys), key=lambda found: _ORDER.get(found.key, len(_ORDER)))


@dataclass(frozen=True)
class Pair:
    """Two compared stages: the full label, a short one for charts, and the style of the later stage."""

    label: str
    short: str
    style: Style


def pair(name: str, separator: str) -> Pair:
    """Reads the name of a comparison such as `base->midtrained`.

    Args:
        name: Two stage keys with the separator between them.
        separator: `->` or `/`.

    Returns:
        The comparison. Its short label is the later stage alone if it is compared with the stage it started from.
    """
    before, found, after = name.partition(separator)
    if not found:
        return Pair(name, name, stage(name).style)
    label = f"{stage(before).label} → {stage(after).label}"
    return Pair(label, stage(after).label if stage(after).parent == before else label, stage(after).style)
