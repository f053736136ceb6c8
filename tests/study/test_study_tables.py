"""Tidy tables: read back as written, and the page that is made from them."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_up_study import made_up

from prism_nemo.errors import InputError
from prism_nemo.study.behaviour import forgotten
from prism_nemo.study.page import page, write_page
from prism_nemo.study.tidy import MEASURES, read, write
from prism_nemo.study.verdicts import CLAIMS, HOLDS


def test_tables_read_back_as_written(tmp_path: Path) -> None:
    table = made_up({("mcs", "accuracy", "lists"): 1 / 3})
    write(table, tmp_path)
    again = read(tmp_path)
    assert again.rows == table.rows
    assert again.pairs == table.pairs


def test_page_is_that_of_the_tables(tmp_path: Path) -> None:
    write(made_up(), tmp_path / "data")
    write_page(read(tmp_path / "data"), tmp_path / "study.md")
    text = (tmp_path / "study.md").read_text()
    assert text == page(made_up())
    assert text.count(f"| **{HOLDS}** |") == len(CLAIMS)
    for claim in CLAIMS:
        figure = (tmp_path / "figures" / f"pocket_study_{claim.key}.svg").read_text()
        assert figure.startswith("<svg")
        assert 'xmlns="http://www.w3.org/2000/svg"' in figure
        assert f"figures/pocket_study_{claim.key}.svg" in text


def test_the_page_changes_with_a_number(tmp_path: Path) -> None:
    assert page(made_up()) != page(made_up({("mcs", "general_loss", ""): 4.1}))


def test_missing_and_foreign_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=MEASURES):
        read(tmp_path)
    write(made_up(), tmp_path)
    (tmp_path / MEASURES).write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="columns"):
        read(tmp_path)


def test_forgotten_counts_what_was_right_and_is_wrong() -> None:
    before = {"answers": {"lists": "1100"}, "general": f"{int('1' + '0110', 2):x}"}
    after = {"answers": {"lists": "1010"}, "general": f"{int('1' + '0011', 2):x}"}
    found = forgotten(before, after)
    assert found["lists"] == {"n": 4, "right_before": 2, "forgotten": 1, "learned": 1}
    assert found["general"] == {"n": 4, "right_before": 2, "forgotten": 1, "learned": 1}
