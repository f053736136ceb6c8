"""Cells that are really run, at the smallest budget: the same numbers again, also after a kill and a lost model."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prism_nemo.errors import StoppedEarly
from prism_nemo.study.folders import Folders
from prism_nemo.study.plan import Cell, plan
from prism_nemo.study.pool import Study
from prism_nemo.study.settings import budget_named

# Random reward, because a model of five steps solves nothing: the real reward would change no weight.
WANTED = ("base", "mcs", "prompts-mcs", "rl-mcs-random")
_SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_study_cells import study_of
if __name__ == "__main__":
    study_of(Path(sys.argv[1])).run()
"""


def _cells() -> list[Cell]:
    return [cell for cell in plan(("llama",), 1) if cell.name in WANTED]


def study_of(out: Path) -> Study:
    """A study of four cells, one at a time."""
    return Study(out, budget_named("tiny"), _cells(), lambda line: print(line, flush=True), 1)


def _results(out: Path) -> dict[str, bytes]:
    folders = Folders(out)
    names = ("measures", "items")
    found = {
        f"{cell.name}/{name}": folders.results(cell) / f"{name}.json" for cell in _cells() for name in names
    }  # fmt: skip
    return {key: path.read_bytes() for key, path in found.items() if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    study_of(out).run()
    return out


@pytest.mark.slow
def test_every_measure_is_there(whole: Path) -> None:
    rl = Folders(whole).read(_cells()[-1])
    assert rl is not None
    assert rl["outcome"] == "trained"
    assert set(rl["tasks"]) == {"arithmetic", "lists", "formulas"}
    assert set(rl["forgotten"]) == {"base", "mcs"}
    assert set(rl["weights"]["nulls"]) >= {"decay", "random_walk", "drift"}
    assert 0 < rl["weights"]["total"]["thresholds"]["0.1"] <= 1
    assert {"plain", "debiased", "null_plain", "null_debiased"} == set(rl["cka"])
    assert [point["alpha"] for point in rl["path"]] == [0.0, 0.25, 0.5, 0.75, 1.0]
    # The ends of the way are the two models: their general loss on the same rows must be the parent's and its own.
    assert rl["path"][0]["loss"] != rl["path"][-1]["loss"]
    assert not list((whole / "models").rglob("step_*"))  # every model is dropped once nothing needs it


@pytest.mark.slow
def test_a_cell_from_nothing_gives_the_same_bytes_after_a_kill(whole: Path, tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(_SCRIPT)
    out = tmp_path / "again"
    command = [sys.executable, str(script), str(out), str(Path(__file__).parent)]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    base, mcs = _cells()[:2]
    folders = Folders(out)
    deadline = time.monotonic() + 300
    while not (folders.run(mcs) / "config.yaml").is_file() and time.monotonic() < deadline:
        assert running.poll() is None, "the study ended before it could be killed"
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert set(_results(out)) == {"base/measures", "base/items"}
    # Worse than a kill: an empty machine, on which only what was measured is left.
    shutil.rmtree(out / "models")
    shutil.rmtree(out / "data")
    study_of(out).run()
    assert _results(out) == _results(whole)
    assert folders.read(base) is not None


@pytest.mark.slow
def test_a_slice_that_is_too_short_stops_with_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(StoppedEarly, match="4 of 4 cells left"):
        study_of(tmp_path).run(slice_minutes=0.0)
    assert StoppedEarly("").exit_code == 75
