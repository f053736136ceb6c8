"""A quickstart as part of a story: what its summary and its run directories say together, moved, twice, or in part."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from fake_run import summary, write_run
from made_runs import evaluation, make_run, midtrain_lines, write

from prism_nemo.checkpoint.atomic import ORIGIN
from prism_nemo.errors import InputError
from prism_nemo.report.find import find
from prism_nemo.report.page import write_report
from prism_nemo.report.story import Story, tell
from prism_nemo.report.story_page import lineage_figure, parts

CHAIN = {
    "Base": ("pretrain", []),
    "Mid-trained": ("midtrain", ["Base"]),
    "Longer mid-training": ("midtrain", ["Mid-trained"]),
    "RL on base": ("base_rl", ["Base"]),
    "RL on mid-trained": ("prism_rl", ["Mid-trained"]),
    "HF checkpoint": ("hf", ["RL on mid-trained"]),
}


def story_of(*folders: Path) -> Story:
    return tell(find(folders))


def lineage(story: Story) -> dict[str, tuple[str, list[str]]]:
    return {model.name: (model.role, [story.models[one].name for one in model.parents]) for model in story.models}


def test_the_stages_have_their_names_and_their_parents(tmp_path: Path) -> None:
    assert lineage(story_of(write_run(tmp_path / "run"))) == CHAIN


def test_the_styles_are_those_of_the_pipeline(tmp_path: Path) -> None:
    story = story_of(write_run(tmp_path / "run"))
    assert {model.name: model.style.css for model in story.models} == {
        "Base": "s-base", "Mid-trained": "s-midtrained", "Longer mid-training": "s-longer", "RL on base": "s-base-rl",
        "RL on mid-trained": "s-prism-rl", "HF checkpoint": "s-other",
    }  # fmt: skip


def test_the_same_from_the_summary_alone(tmp_path: Path) -> None:
    """Run directories are large; who keeps the summary alone keeps the lineage and the results."""
    directory = write_run(tmp_path / "run")
    for stage in ("base", "midtrained", "midtrained_longer", "base_rl", "prism_rl"):
        shutil.rmtree(directory / stage)
    story = story_of(directory)
    assert lineage(story) == CHAIN
    assert all(len(model.evaluations) == 1 for model in story.models if model.role != "hf")


def test_the_same_from_the_runs_alone_where_the_quickstart_was_cut(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run")
    (directory / "summary.json").unlink()
    found = lineage(story_of(directory))
    assert found["prism_rl"] == ("prism_rl", ["midtrained"])
    assert found["midtrained_longer"] == ("midtrain", ["midtrained"])
    assert "midtrained: scores" in [what for what, _ in gaps(story_of(directory))]


def gaps(story: Story) -> list[tuple[str, str]]:
    parts(story)
    return story.gaps


def test_a_damaged_summary_is_a_warning_beside_runs_that_can_be_read(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run")
    (directory / "summary.json").write_text("{torn")
    page = write_report(directory).read_text(encoding="utf-8")
    assert "run/summary.json cannot be read" in page


def test_the_export_that_was_checked_is_drawn_and_the_others_are_listed(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run")
    for name in ("base", "prism_rl"):
        write(directory / f"hf/{name}/config.json", {})
        (directory / f"hf/{name}/model.safetensors").touch()
        write(directory / f"hf/{name}" / ORIGIN, {"checkpoint": f"{name}/checkpoints/step_00000400"})
    content = summary()
    content["hf_export"]["path"] = "elsewhere/hf/prism_rl"
    write(directory / "summary.json", content)
    story = story_of(directory)
    assert lineage(story) == CHAIN
    assert next(model.path for model in story.models if model.role == "hf") == directory / "hf/prism_rl"
    figure = lineage_figure(story)
    assert figure.table is not None
    assert [row[0] for row in figure.table.rows if row[1] == "Hugging Face folder"] == ["HF checkpoint", "base"]


def test_two_quickstarts_are_told_apart(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_run(tmp_path / name)
    page = write_report(tmp_path, tmp_path / "out.html").read_text(encoding="utf-8")
    story = story_of(tmp_path)
    assert {"one/Base", "two/Base", "one/RL on mid-trained", "two/RL on mid-trained"} <= set(lineage(story))
    assert lineage(story)["two/Mid-trained"] == ("midtrain", ["two/Base"])
    for found in ("one: Mixture: midtraining", "two: Mixture: midtraining", "two: Parts of the quickstart"):
        assert found in page
    assert "What did mid-training do, and what did RL add?" not in page, "no headline can speak for two runs"


def test_results_of_the_commands_stand_beside_those_of_the_quickstart(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run")
    checkpoint = str(directory / "midtrained/checkpoints/step_00000400")
    write(directory / "more/evaluation.json", evaluation(checkpoint, "midtrained", 0.5))
    story = story_of(directory)
    mid = next(model for model in story.models if model.name == "Mid-trained")
    assert sorted(content["suite"] for _, content in mid.evaluations) == ["quickstart", "reasoning"]


def test_a_restart_brings_the_time_line_of_starts(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run")
    assert "<caption>Time line</caption>" not in write_report(directory).read_text(encoding="utf-8")
    path = directory / "midtrained/lineage.json"
    content = json.loads(path.read_text())
    content["starts"].append({"time": "2026-11-28T09:00:00+0000", "step": 200, "command": []})
    path.write_text(json.dumps(content))
    assert "<caption>Time line</caption>" in write_report(directory).read_text(encoding="utf-8")


def test_different_seeds_of_different_stages_are_no_repetition(tmp_path: Path) -> None:
    """Stages of one chain with seeds of their own say nothing about how much a second run would differ."""
    directory = write_run(tmp_path / "run")
    assert "One seed only" in write_report(directory).read_text(encoding="utf-8")
    assert len({run.config["seed"] for _, run in story_of(directory).runs}) > 1


def test_one_stage_with_two_seeds_is(tmp_path: Path) -> None:
    base = make_run(tmp_path / "base", "midtrain", midtrain_lines())
    for name, seed in (("a", 1), ("b", 2)):
        make_run(tmp_path / name, "midtrain", midtrain_lines(), base)
        path = tmp_path / name / "config.yaml"
        path.write_text(path.read_text().replace("seed: 7", f"seed: {seed}"))
    assert "One seed only" not in write_report(tmp_path, tmp_path / "out.html").read_text(encoding="utf-8")


def test_another_file_with_stages_is_no_quickstart(tmp_path: Path) -> None:
    write(tmp_path / "plan.json", {"stages": {"base": {}}})
    with pytest.raises(InputError, match=r"summary\.json of a quickstart does not exist"):
        find([tmp_path])


def test_what_many_stages_lack_is_one_line_by_command(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "run")).read_text(encoding="utf-8")
    assert "<li>Base: MFU; Mid-trained: MFU; Longer mid-training: MFU;" in page
