"""Tables as files, and tidy rows as figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prism_nemo.analysis.row_figures import row_figures
from prism_nemo.analysis.tables import write_tables
from prism_nemo.errors import InputError
from prism_nemo.report.standalone import figure_page

ROWS = [
    {"model": "base", "on": "lists", "measure": "entropy", "value": 1.5, "low": 1.25, "high": 1.75},
    {"model": "mid", "on": "lists", "measure": "entropy", "value": 0.5, "low": None, "high": None},
    {"model": "base", "on": "lists", "measure": "nll_right", "value": None, "low": None, "high": None},
]


def test_a_figure_for_each_measure_a_row_for_each_model() -> None:
    figures = row_figures(ROWS, ("on", "measure"), "Nats.")
    assert [heading for heading, _, _ in figures] == ["lists, entropy", "lists, nll_right"]
    drawn = str(figures[0][1])
    assert drawn.index("base: 1.5") < drawn.index("mid: 0.5")
    assert "not measured" in str(figures[1][1]).lower() or "no data" in str(figures[1][1]).lower()


def test_points_of_a_path_are_named_by_their_place() -> None:
    row = {"alpha": 1.0, "beta": 0.25, "name": "web", "measure": "loss", "value": 3.0, "low": 2.9, "high": 3.1}
    assert "alpha 1.00, beta 0.25" in str(row_figures([row], ("measure", "name"), "")[0][1])


def test_a_page_shows_hostile_names_as_text() -> None:
    rows = [{**ROWS[0], "model": "<script>alert(1)</script>"}]
    page = figure_page("<b>title</b>", "<i>intro</i>", row_figures(rows, ("on", "measure"), "<u>caption</u>"))
    for tag in ("<script>alert", "<b>title", "<i>intro", "<u>caption"):
        assert tag not in page
    assert "&lt;script&gt;" in page


def test_tables_hold_every_row(tmp_path: Path) -> None:
    import pyarrow.parquet

    paths = write_tables(tmp_path / "out", "entropy", {"rows": ROWS}, ROWS)
    assert [path.name for path in paths] == ["entropy.json", "entropy.jsonl", "entropy.parquet"]
    assert [json.loads(line) for line in paths[1].read_text().splitlines()] == ROWS
    assert pyarrow.parquet.read_table(paths[2]).to_pylist() == ROWS
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        write_tables(tmp_path / "file" / "out", "entropy", {}, [])
