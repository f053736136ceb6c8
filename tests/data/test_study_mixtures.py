"""The shipped mixtures have the study's percentages: typed here a second time, from its Figure 2 and Table 18."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from prism_nemo.data.mixture import Mixture
from prism_nemo.data.mixture_file import load_mixture
from prism_nemo.errors import InputError

RECIPES = Path(__file__).parents[2] / "recipes/mixtures"
#                            maths   MC     MCS
STUDY = {
    "dclm-edu":              (15,    5,     5),
    "chat":                  (10,    5,     5),
    "nemotron-math":         (10,    10,    10),
    "mot-math":              (10,    10,    7),
    "megamath-web-pro":      (55,    27.5,  20),
    "mot-code":              (0,     5,     3),
    "open-code-reasoning-2": (0,     10,    10),
    "refinecode":            (0,     13.75, 13.75),
    "starcoder2":            (0,     13.75, 13.75),
    "openthoughts3-science": (0,     0,     7.75),
    "mot-science":           (0,     0,     4.75),
}  # fmt: skip
DOMAINS = {"math": (25, 75, 0, 0), "mc": (10, 47.5, 42.5, 0), "mcs": (10, 37, 40.5, 12.5)}
LONG_CONTEXT = {
    "dclm-edu": 2.51,
    "nemotron-math": 5.08,
    "megamath-web-pro": 4.33,
    "starcoder2": 37.52,
    "codex": 3.86,
}


def load(name: str, folder: Path) -> Mixture:
    """Loads a recipe beside stand-ins for the files that are not on the Hub."""
    for source in ("refinecode", "starcoder2", "codex"):
        (folder / "data" / source).mkdir(parents=True)
        (folder / "data" / source / "0.jsonl.zst").write_bytes(b"x")
    shutil.copy(RECIPES / f"{name}.yaml", folder)
    return load_mixture(folder / f"{name}.yaml")


@pytest.mark.parametrize(("column", "name"), list(enumerate(DOMAINS)))
def test_the_percentages_are_those_of_the_study(column: int, name: str, tmp_path: Path) -> None:
    mixture = load(name, tmp_path)
    expected = {source: row[column] for source, row in STUDY.items() if row[column]}
    assert {source.name: source.weight for source in mixture.sources} == expected
    assert sum(expected.values()) == 100
    domains = dict.fromkeys(("general", "math", "code", "science"), 0.0)
    for source in mixture.sources:
        domains["general" if source.domain == "chat" else source.domain] += source.weight
    assert tuple(domains.values()) == DOMAINS[name]
    assert mixture.retention is not None
    assert mixture.retention.share == pytest.approx(DOMAINS[name][0] / 100)


def test_long_context(tmp_path: Path) -> None:
    mixture = load("long-context", tmp_path)
    assert {source.name: source.weight for source in mixture.sources} == LONG_CONTEXT


@pytest.mark.parametrize("name", ["math", "mc", "mcs", "long-context"])
def test_less_general_text_is_refused(name: str, tmp_path: Path) -> None:
    load(name, tmp_path)
    path = tmp_path / f"{name}.yaml"
    text = path.read_text()
    weight = next(line for line in text.splitlines() if "weight:" in line)
    path.write_text(text.replace(weight, "    weight: 0.01", 1))
    with pytest.raises(InputError, match=r"retention\.share"):
        load_mixture(path)


def test_every_shipped_mixture_is_covered() -> None:
    assert {file.stem for file in RECIPES.glob("*.yaml")} == {*DOMAINS, "long-context", "example"}
