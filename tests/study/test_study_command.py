"""The command without training: what it refuses, and the page from tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from made_up_study import made_up
from typer.testing import CliRunner

from prism_nemo.commands.study import study
from prism_nemo.errors import InputError
from prism_nemo.study.tidy import read, write
from recipes import pocket_study

APP = typer.Typer()
APP.command()(study)


@pytest.mark.parametrize(
    ("more", "named"),
    [(["--families", "lama"], "--families"), (["--budget", "huge"], "--budget"), (["--page", "p.md"], "no cell")],
)
def test_bad_input_is_refused_before_work(tmp_path: Path, more: list[str], named: str) -> None:
    out = tmp_path / "study"
    found = CliRunner().invoke(APP, ["--out", str(out), *more])
    assert isinstance(found.exception, InputError)
    assert named in str(found.exception)
    assert not out.exists()


def test_page_from_tables(tmp_path: Path) -> None:
    write(made_up(), tmp_path / "data")
    page = tmp_path / "docs" / "study.md"
    arguments = ["--out", str(tmp_path / "none"), "--data", str(tmp_path / "data"), "--page", str(page), "--json"]
    found = CliRunner().invoke(APP, arguments)
    assert found.exit_code == 0, found.exception
    assert json.loads(found.stdout)["files"][0] == str(page)
    assert page.is_file()
    assert read(tmp_path / "data").rows == made_up().rows  # they were read, not written anew


def test_script_says_how_it_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert pocket_study.main([]) == 2
    assert "usage" in capsys.readouterr().err
