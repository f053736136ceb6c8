"""Packages are known by the symbol that is needed: stand-ins of the right name must not pass, whatever they do."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest

from prism_nemo.runtime.detect import APEX, CAUSAL_CONV1D, TRANSFORMER_ENGINE, Package, load, look

ABSENT = Package("absent", "prism_nemo_has_no_such_module.x", "y", "prism-nemo-has-no-such-module")


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder at the front of sys.path; what is imported from it is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("apex", "transformer_engine", "causal_conv1d"):
            del sys.modules[name]


def write(root: Path, module: str, text: str) -> None:
    folder = root / module
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(text)


def test_nothing_there() -> None:
    assert (look(ABSENT).status, look(ABSENT).problem, load(ABSENT)) == ("missing", None, None)


def test_another_project_called_apex(stand_in: Path) -> None:
    """PyPI's apex is one: the name is there, the symbol is not."""
    write(stand_in, "apex", "VERSION = '0.9.10dev'\n")
    found = look(APEX)
    assert (found.status, found.usable, load(APEX)) == ("wrong", False, None)
    assert "apex.optimizers" in (found.problem or "")


def test_module_without_the_symbol(stand_in: Path) -> None:
    write(stand_in, "apex", "")
    write(stand_in, "apex/optimizers", "class FusedSGD: ...\n")
    assert look(APEX).status == "wrong"
    assert look(APEX).problem == "apex.optimizers has no FusedAdam"
    assert load(APEX) is None


def test_the_right_apex(stand_in: Path) -> None:
    write(stand_in, "apex", "")
    write(stand_in, "apex/optimizers", "class FusedAdam: ...\n")
    assert look(APEX).usable
    assert load(APEX).__name__ == "FusedAdam"


def test_empty_meta_package(stand_in: Path) -> None:
    """It raises RuntimeError, which `except ImportError` lets through."""
    write(stand_in, "transformer_engine", 'raise RuntimeError("Found empty `transformer-engine` meta package")\n')
    found = look(TRANSFORMER_ENGINE)
    assert (found.status, load(TRANSFORMER_ENGINE)) == ("broken", None)
    assert (found.problem or "").startswith("RuntimeError: Found empty")
    assert "transformer_engine" not in sys.modules


def test_an_import_that_ends_the_process(stand_in: Path) -> None:
    """A compiled extension for another torch can do that; it happens to the child."""
    write(stand_in, "causal_conv1d", "import os\nprint('noise')\nos.abort()\n")
    found = look(CAUSAL_CONV1D)
    assert found.status == "broken"
    assert "ended the process" in (found.problem or "")
    assert "causal_conv1d" not in sys.modules


def test_output_of_an_import_is_not_taken_for_the_answer(stand_in: Path) -> None:
    write(stand_in, "causal_conv1d", "import sys\nprint('null')\ncausal_conv1d_fn = 1\nsys.stderr.write('warning')\n")
    assert look(CAUSAL_CONV1D).usable


def test_base_install_names_neither() -> None:
    """apex is another project on PyPI, and the bare transformer-engine breaks Megatron-Core on CPU machines."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    base = " ".join(project["dependencies"]).lower()
    assert "apex" not in base
    assert "transformer-engine" not in base
    assert not any("apex" in name for extra in project["optional-dependencies"].values() for name in extra)
