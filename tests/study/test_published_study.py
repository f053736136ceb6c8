"""The study that is published under docs: its page and tables belong together, and a cell can be made again."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

from prism_nemo.study.claims import CLAIMS
from prism_nemo.study.folders import Folders
from prism_nemo.study.page import write_page
from prism_nemo.study.plan import Cell, plan
from prism_nemo.study.pool import Study, machine
from prism_nemo.study.settings import FAMILIES, StudySettings
from prism_nemo.study.tidy import Table, collect, read
from prism_nemo.study.verdicts import decide

DOCS = Path(__file__).parents[2] / "docs"
SEEDS = 3


@pytest.fixture(scope="module")
def published() -> Table:
    return read(DOCS / "data")


def test_page_and_figures_are_those_of_the_tables(published: Table, tmp_path: Path) -> None:
    files = write_page(published, tmp_path / "pocket_study.md")
    assert len(files) > 5
    for file in files:
        kept = DOCS / file.relative_to(tmp_path)
        assert kept.read_text() == file.read_text(), f"{kept.name}: run `make study-page`"


def test_every_cell_that_is_done_was_measured(published: Table) -> None:
    cells = {cell.key: cell for cell in plan(FAMILIES, SEEDS)}
    done = published.lineage["measures_sha256"]
    assert set(done) <= set(cells)
    outcomes = {_key(row) for row in published.rows if row["measure"] == "outcome"}
    assert outcomes == set(done)
    diverged = {_key(row) for row in published.rows if (row["measure"], row["name"]) == ("outcome", "diverged")}
    measured = {_key(row) for row in published.rows if row["measure"] == "accuracy"}
    assert measured | diverged == {key for key in done if cells[key].has_model}


def test_the_page_says_whether_all_cells_are_done(published: Table) -> None:
    left = len(plan(FAMILIES, SEEDS)) - len(published.lineage["measures_sha256"])
    text = (DOCS / "pocket_study.md").read_text()
    assert (f"{left} of its {len(plan(FAMILIES, SEEDS))} cells are not done" in text) == (left > 0)


def test_the_summary_by_hand_has_the_verdicts_and_the_numbers_of_the_tables(published: Table) -> None:
    """Whole numbers and decimals of a summary are those of its claim, in its unit or in points of a hundred."""
    text = (DOCS / "study.md").read_text()
    for claim in CLAIMS:
        row = re.search(rf"pocket_study\.md#{claim.key}\) \| \*\*(.*?)\*\*(.*) \|", text)
        assert row is not None, claim.key
        bounds = claim.bounds(published, None)
        assert decide(bounds).removesuffix(" at this size") == row[1]
        found = [e for bound in bounds if (e := bound.effect) is not None]
        values = [value for e in found for value in (e.mean, e.low, e.high)] + [bound.high for bound in bounds]
        for number in re.findall(r"-?\d+(?:\.\d+)?", row[2]):
            digits = len(number.partition(".")[2])
            signed = {f"{value * scale:.{digits}f}" for value in values for scale in (1, 100)}
            assert number in signed | {shown.lstrip("-") for shown in signed}, (claim.key, number)  # or told as a loss


def test_tables_are_of_the_settings_that_stand_in_the_code(published: Table) -> None:
    """Whoever changes a budget publishes a study of it, or leaves the published one where it was."""
    assert StudySettings(**published.lineage["settings"]) == StudySettings()


@pytest.mark.slow
def test_a_published_cell_from_nothing(published: Table, tmp_path: Path) -> None:
    """The base of the first family and seed: data, training, measures. Bit for bit on the kind of machine that
    the study ran on; elsewhere, where the last bits of products differ, within what another seed would change.
    """
    cell = plan(FAMILIES, SEEDS)[0]
    assert cell.name == "base"
    Study(tmp_path, StudySettings(), [cell], lambda line: print(line, flush=True), 1).run()
    folders = Folders(tmp_path)
    again = collect(folders, [cell])
    of_cell = [row for row in published.rows if _of(row, cell)]
    assert [(row["measure"], row["name"]) for row in again.rows] == [(row["measure"], row["name"]) for row in of_cell]
    if published.lineage["machines"] == [machine()] and _same_versions(published, tmp_path):
        digest = hashlib.sha256((folders.results(cell) / "measures.json").read_bytes()).hexdigest()
        assert digest == published.lineage["measures_sha256"][cell.key]
        assert again.rows == of_cell
    for one, two in zip(again.rows, of_cell, strict=True):
        if one["measure"] == "general_loss":
            assert abs(one["value"] - two["value"]) < 0.2
        if one["measure"] == "accuracy":
            assert max(one["low"], two["low"]) <= min(one["high"], two["high"])


def _key(row: dict[str, object]) -> str:
    return f"{row['family']}/{row['seed']}/{row['cell']}"


def _of(row: dict[str, object], cell: Cell) -> bool:
    return _key(row) == cell.key


def _same_versions(published: Table, out: Path) -> bool:
    own = json.loads((out / "settings.json").read_text())["versions"]
    return bool(own == published.lineage["versions"])
