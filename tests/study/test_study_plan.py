"""The list of cells: everything that the claims need is there, in an order that can be done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prism_nemo.errors import InputError, PrismError
from prism_nemo.study import pool, sections
from prism_nemo.study.cell import COMPARED, _check_rebuilt
from prism_nemo.study.figures import models
from prism_nemo.study.folders import Folders
from prism_nemo.study.plan import plan
from prism_nemo.study.pool import Study, _alone
from prism_nemo.study.settings import StudySettings, budget_named, check_settings
from prism_nemo.study.training import model_seed

CELLS = plan(("llama",), 1)
BY_NAME = {cell.name: cell for cell in CELLS}


def test_every_need_comes_before_the_cell() -> None:
    seen: set[str] = set()
    for cell in CELLS:
        assert set(cell.needs) <= seen, cell.name
        assert not cell.parent or cell.parent in cell.needs, cell.name
        assert cell.name not in seen
        seen.add(cell.name)


def test_all_controls_of_the_study_are_there() -> None:
    rl = [cell for cell in CELLS if cell.kind == "rl"]
    assert {cell.control for cell in rl} == {"none", "random", "shuffled", "format_only"}
    assert [cell.name for cell in rl if cell.factor == 10] == ["rl-mcs-x10"]
    assert BY_NAME["mcs-rl-rate"].rl_rate
    assert BY_NAME["mcs-again"].other_seed
    longer = BY_NAME["mcs-longer"]
    assert (longer.parent, longer.mixture, longer.longer) == ("mcs", "mcs", True)
    assert len({model_seed(BY_NAME[name]) for name in ("mcs", "mcs-again", "mcs-longer")}) == 3
    assert {model_seed(cell) for cell in rl} == {model_seed(BY_NAME["mcs"])}
    settings = budget_named("full")
    # RL's 120 steps of 16 x 8 answers take the time of 0.6 to 0.8 of a dense model's mid-training.
    assert 0.6 < settings.longer_steps / settings.steps("midtrain", "llama") < 0.8
    crossed = {(c.prompts, c.gate) for c in rl if c.parent == "base" and c.control == "none"}
    assert crossed == {("mcs", "think"), ("mcs", "none"), ("base", "think"), ("base", "none")}
    for start in ("math", "mc", "noret"):
        assert {c.prompts for c in rl if c.parent == start} == {"mcs", start}
    assert all("formulas" not in BY_NAME[f"rl-{start}-no-science"].domains for start in ("mc", "mcs"))


def test_what_is_compared_and_shown_is_in_the_plan() -> None:
    assert set(COMPARED) <= BY_NAME.keys()
    assert [cell.name for cell in models()] == [cell.name for cell in CELLS if cell.has_model]
    assert set(sections._MOVED) <= BY_NAME.keys()


def test_depth_first_by_seed_and_family() -> None:
    groups = list(dict.fromkeys((c.seed, c.family) for c in plan(("llama", "granite"), 2)))
    assert groups == [(1, "llama"), (1, "granite"), (2, "llama"), (2, "granite")]


@pytest.mark.parametrize("families", [(), ("llama", "llama"), ("lama",)])
def test_unknown_families_are_refused(families: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="--families"):
        plan(families, 1)


@pytest.mark.parametrize("change", [{"rl_steps": 0}, {"retention": 1.5}, {"held_out_rows": 100}, {"group_size": 1}])
def test_settings_that_measure_nothing_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(change))):
        check_settings(StudySettings(**change))


def test_unknown_budget() -> None:
    with pytest.raises(InputError, match="--budget"):
        budget_named("huge")


def _study(out: Path) -> Study:
    study = Study(out, budget_named("tiny"), CELLS, lambda line: None, 1)
    (study.folders.data(1)).mkdir(parents=True, exist_ok=True)
    (study.folders.data(1) / "done.json").write_text("{}")
    return study


def _finish(folders: Folders, name: str, model: bool = True) -> None:
    folders.write(BY_NAME[name], "measures", {"outcome": "trained"})
    if model:
        (folders.run(BY_NAME[name]) / "checkpoints" / "step_00000001").mkdir(parents=True)


def test_data_come_first(tmp_path: Path) -> None:
    found = Study(tmp_path / "s", budget_named("tiny"), CELLS, lambda line: None, 1)._next([])
    assert found is not None
    assert found[0].kind == "data"


def test_a_dropped_model_is_made_again_before_what_needs_it(tmp_path: Path) -> None:
    _finish(_study(tmp_path).folders, "base", model=False)
    found = _study(tmp_path)._next([])
    assert found == (BY_NAME["base"], True)


def test_a_dropped_chain_is_made_again_from_its_start(tmp_path: Path) -> None:
    folders = _study(tmp_path).folders
    for name in ("base", "math", "mc", "mcs", "noret", "mcs-again", "mcs-rl-rate"):
        _finish(folders, name, model=False)
    assert _study(tmp_path)._next([]) == (BY_NAME["base"], True)
    (folders.run(BY_NAME["base"]) / "checkpoints" / "step_00000001").mkdir(parents=True)
    assert _study(tmp_path)._next([]) == (BY_NAME["mcs"], True)
    assert _study(tmp_path)._next([(BY_NAME["mcs"], True)]) == (BY_NAME["prompts-base"], False)


def test_models_are_dropped_once_nothing_needs_them(tmp_path: Path) -> None:
    study = _study(tmp_path)
    for cell in CELLS:
        if cell.has_model:
            _finish(study.folders, cell.name)
        else:
            study.folders.write(cell, "measures", {"outcome": "filtered"})
    updates = BY_NAME["updates"]
    (study.folders.results(updates) / "measures.json").unlink()
    study = _study(tmp_path)
    study._drop()
    assert study.folders.run(BY_NAME["rl-mcs-x10"]).exists()  # the comparison of updates needs it
    study.done.add(updates.key)
    study._drop()
    assert not any(study.folders.run(cell).exists() for cell in CELLS)


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    _study(tmp_path)
    with pytest.raises(InputError, match="other settings"):
        Study(tmp_path, budget_named("half"), CELLS, lambda line: None, 1)


def test_all_machines_and_commits_of_a_study_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, commit in ((2, None), (2, "a1"), (8, "a1"), (8, "b2+changes")):
        monkeypatch.setattr(pool, "machine", lambda cores=cores: {"vectors": "AVX512", "cores": cores})
        monkeypatch.setattr(pool, "source_commit", lambda commit=commit: commit)
        _study(tmp_path)
    known = json.loads((tmp_path / "settings.json").read_text())
    assert [one["cores"] for one in known["machines"]] == [2, 8]
    assert known["commits"] == ["a1", "b2+changes"]


def test_two_studies_in_one_folder_are_refused(tmp_path: Path) -> None:
    study = _study(tmp_path)
    with _alone(tmp_path / "lock"), pytest.raises(InputError, match="a study is running there"):
        study.run()


def test_a_model_made_again_must_be_the_one_that_was_measured(tmp_path: Path) -> None:
    folders, cell = _study(tmp_path).folders, BY_NAME["prompts-mcs"]
    folders.write(cell, "measures", {"outcome": "filtered", "tasks": {"lists": {"kept": 3}}})
    _check_rebuilt(cell, BY_NAME, folders, {"tasks": {"lists": {"kept": 3}}})
    with pytest.raises(PrismError, match="another one than was measured"):
        _check_rebuilt(cell, BY_NAME, folders, {"tasks": {"lists": {"kept": 4}}})


def test_a_cell_that_fails_is_told_and_not_kept(tmp_path: Path) -> None:
    study = _study(tmp_path)  # its data are an empty promise
    with pytest.raises(PrismError, match="what was measured is kept"):
        study.run()
    assert not study.done
