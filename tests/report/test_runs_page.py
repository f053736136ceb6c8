"""The page of any runs: what is found, what comes from what, and that every number is the recorded one."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from made_runs import (
    evaluation,
    make_pipeline,
    make_run,
    midtrain_lines,
    path_result,
    retention,
    rl_lines,
    weights,
    write,
)
from typer.testing import CliRunner

from prism_nemo.checkpoint.atomic import ORIGIN
from prism_nemo.errors import InputError
from prism_nemo.report import changed, costs, scores, trusted
from prism_nemo.report.find import find, kind_of
from prism_nemo.report.page import write_report
from prism_nemo.report.story import Story, tell

HOSTILE = "</title><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}\"'&\x00\u202e\ud800" + "x" * 3000


def story_of(*folders: Path) -> Story:
    return tell(find(folders))


def lineage(story: Story) -> dict[str, tuple[str, list[str]]]:
    return {model.name: (model.role, [story.models[one].name for one in model.parents]) for model in story.models}


def test_what_comes_from_what(tmp_path: Path) -> None:
    assert lineage(story_of(make_pipeline(tmp_path))) == {
        "base": ("pretrain", []),
        "mid": ("midtrain", ["base"]),
        "rl_on_mid": ("prism_rl", ["mid"]),
        "rl_on_base": ("base_rl", ["base"]),
        "merged": ("merge", ["mid", "base"]),
    }


def test_a_moved_pipeline_is_tied_by_hash_and_by_name(tmp_path: Path) -> None:
    make_pipeline(tmp_path / "old")
    shutil.move(tmp_path / "old", tmp_path / "new")
    story = story_of(tmp_path / "new")
    assert lineage(story)["rl_on_mid"] == ("prism_rl", ["mid"])
    assert [len(model.evaluations) for model in story.models if model.run] == [1, 1, 1, 1]


def test_the_hash_decides_where_the_path_names_another_run(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", "midtrain", midtrain_lines())
    other = make_run(tmp_path / "other", "midtrain", midtrain_lines())
    make_run(tmp_path / "child", "rl", rl_lines(), one, recorded_as=str(other))
    assert lineage(story_of(tmp_path))["child"][1] == ["one"]


def test_a_name_that_two_runs_have_ties_nothing(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        make_run(tmp_path / folder / "mid", "midtrain", midtrain_lines())
    gone = "/elsewhere/mid/checkpoints/step_00000040"
    write(tmp_path / "e/evaluation.json", evaluation(gone, "whose", 0.5))
    story = story_of(tmp_path)
    assert [len(model.evaluations) for model in story.models if model.run] == [0, 0]
    assert any(what == "whose: what it was exported from" for what, _ in _gaps(story))


def _gaps(story: Story) -> list[tuple[str, str]]:
    from prism_nemo.report.story_page import parts

    parts(story)
    return story.gaps


def test_a_parent_outside_is_the_base(tmp_path: Path) -> None:
    base = make_run(tmp_path / "away/base", "midtrain", midtrain_lines())
    make_run(tmp_path / "here/mid", "midtrain", midtrain_lines(), base)
    rl = make_run(tmp_path / "here/rl", "rl", rl_lines(), tmp_path / "here/mid/checkpoints/step_00000040")
    assert rl.is_dir()
    assert lineage(story_of(tmp_path / "here")) == {
        "base": ("base", []),
        "mid": ("midtrain", ["base"]),
        "rl": ("prism_rl", ["mid"]),
    }


def test_a_ring_of_parents_ends(tmp_path: Path) -> None:
    for one, other in (("a", "b"), ("b", "a")):
        parent = str(tmp_path / other / "checkpoints/step_00000001")
        write(tmp_path / one / "lineage.json", {"stage": "rl", "parents": [parent]})
    assert {model.name for model in story_of(tmp_path).models} == {"a", "b"}
    assert write_report(tmp_path).is_file()


def test_scores_are_the_recorded_ones(tmp_path: Path) -> None:
    averages, tasks = scores.score_figures(story_of(make_pipeline(tmp_path)))
    assert averages[0].table is not None
    assert tasks[0].table is not None
    assert [tuple(row) for row in averages[0].table.rows] == [
        ("base", "10.0%", "5.0 to 15.0%"),
        ("mid", "40.0%", "35.0 to 45.0%"),
        ("rl_on_mid", "70.0%", "65.0 to 75.0%"),
        ("rl_on_base", "20.0%", "15.0 to 25.0%"),
    ]
    assert [row[3] for row in tasks[0].table.rows] == ["48"] * 4


def test_other_questions_and_other_splits_are_not_put_beside_one_another_in_silence(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, "midtrain", midtrain_lines()) for name in ("a", "b", "c")]
    write(tmp_path / "e/1.json", evaluation(str(runs[0]), "a", 0.5))
    write(tmp_path / "e/2.json", evaluation(str(runs[1]), "b", 0.5, questions="q2"))
    write(tmp_path / "e/3.json", evaluation(str(runs[2]), "c", 0.5, split="validation"))
    story = story_of(tmp_path)
    averages, _ = scores.score_figures(story)
    assert any("not asked alike (questions of sums" in warning for warning in story.warnings)
    assert [len(figure.table.rows) for figure in averages if figure.table] == [2, 1]
    assert "which is for choosing, not for reporting" in averages[1].caption


def test_retention_counts_items_and_says_which_side_is_better(tmp_path: Path) -> None:
    write(tmp_path / "r.json", retention())
    score, loss = scores.retention_figures(story_of(tmp_path))
    assert score.table is not None
    assert list(score.table.rows[0]) == [
        "sums · lost", "50.0%", "40.0%", "−10.0 points", "−20.0 points to −2.0 points", "3", "1", "48"
    ]  # fmt: skip
    assert loss.caption.startswith("Nats per token that the loss fell")
    assert "right of the dashed line is better" in loss.caption


def test_slices_and_the_gaps_between_them(tmp_path: Path) -> None:
    make_run(tmp_path / "mid", "midtrain", midtrain_lines(), hours=((2, 0), (4, 20)))
    story = story_of(tmp_path)
    first, second = costs.slices(story.runs[0][1])
    assert (first.seconds, second.seconds, second.step) == (200.0, 200.0, 20)
    figure = costs.timeline(story)
    assert figure is not None
    assert figure.table is not None
    assert [row[4] for row in figure.table.rows] == ["–", "1 h 56 min"], "two hours less 200 seconds"
    row = costs.cost_table(story).rows[0]
    assert (row[1], row[5], row[6], row[7]) == ("40k", "0.2222 CPU process-hours", "2", "1")
    assert row[4] == "not measured", "no MFU was recorded"


def test_the_fitted_null_is_no_evidence(tmp_path: Path) -> None:
    write(tmp_path / "w.json", weights("base", "mid"))
    figure = changed.weight_figures(story_of(tmp_path))[0]
    assert figure.table is not None
    assert [tuple(row[:2]) for row in figure.table.rows] == [
        ("all weights: observed", "61.0%"),
        ("all weights: random walk", "66.0%"),
        ("mlp.up: observed", "61.0%"),
        ("mlp.up: random walk", "66.0%"),
    ]


def test_the_path_leaves_out_points_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "p.json", path_result())
    figure = changed.path_figures(story_of(tmp_path))[0]
    assert figure.table is not None
    assert [row[0] for row in figure.table.rows] == ["general at 0", "general at 1", "general at 2"]


def test_a_failed_check_and_a_wide_parity_gap_are_failures(tmp_path: Path) -> None:
    make_pipeline(tmp_path)
    lines = rl_lines()
    lines[7]["logprob_gap"] = -0.5
    make_run(tmp_path / "runs/wild", "rl", lines)
    found = {verdict.claim: verdict.state for verdict in trusted.verdicts(story_of(tmp_path))}
    assert found["base: logits at TP 2"] == "yes"
    assert found["base: weights bit for bit"] == "no"
    assert found["base: training"] == "unknown"
    assert found["wild: what was sampled is what was trained"] == "no"
    assert found["rl_on_mid: what was sampled is what was trained"] == "yes"


def test_different_versions_are_a_warning(tmp_path: Path) -> None:
    for name, version in (("a", "2.12"), ("b", "2.13")):
        make_run(tmp_path / name, "midtrain", midtrain_lines())
        content = json.loads((tmp_path / name / "lineage.json").read_text())
        write(tmp_path / name / "lineage.json", {**content, "versions": {"torch": version}})
    story = story_of(tmp_path)
    trusted.repeat(story)
    assert "The stages ran with different versions of torch: 2.12, 2.13." in story.warnings


def test_a_run_that_went_on_with_other_code_is_a_warning(tmp_path: Path) -> None:
    for name, commits in (("a", ["c0ffee", "c0ffee"]), ("b", ["c0ffee", HOSTILE])):
        make_run(tmp_path / name, "midtrain", midtrain_lines())
        content = json.loads((tmp_path / name / "lineage.json").read_text())
        starts = [{**content["starts"][0], "commit": commit} for commit in commits]
        write(tmp_path / name / "lineage.json", {**content, "starts": starts})
    story = story_of(tmp_path)
    assert next(row[2] for row in trusted.repeat(story)[0].rows) == "c0ffee"
    assert [text[:50] for text in story.warnings if "other code" in text] == [
        "b went on with other code than it began with: c0ff"
    ]
    assert "The commit of the code" not in dict(story.gaps)
    page = write_report(tmp_path, tmp_path / "out.html").read_text(encoding="utf-8")
    assert "<script>alert(1)" not in page


def test_one_running_stage_gives_a_useful_page(tmp_path: Path) -> None:
    make_run(tmp_path / "mid", "midtrain", midtrain_lines(10), steps=40)
    with (tmp_path / "mid/metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')
    page = write_report(tmp_path / "mid", tmp_path / "out.html").read_text(encoding="utf-8")
    assert "mid: how it went" in page
    assert "10 of 40 steps, 10k tokens" in page
    assert "the last line is cut off" in page
    for part in ("Scores", "Retention", "RL", "Weights", "CKA", "Path"):
        assert f"{part}: not measured." in page, part
    assert "prism-nemo eval CHECKPOINT --suite SUITE" in page
    assert not (tmp_path / "mid/report.html").exists()


def test_a_loss_that_is_nan_stays_a_gap_and_is_counted(tmp_path: Path) -> None:
    lines = midtrain_lines(6000)
    lines[3000]["loss"] = math.nan
    make_run(tmp_path / "mid", "midtrain", lines)
    page = write_report(tmp_path / "mid", tmp_path / "out.html").read_text(encoding="utf-8")
    table = page[page.index("<caption>Training loss") :]
    assert re.search(r"<td>1 to 6,000</td>.*?<td>1</td></tr>", table[: table.index("</table>")], re.DOTALL)
    chart = page[page.index('aria-label="Training loss"') :]
    line = chart[: chart.index("</svg>")]
    assert len(re.findall(r'<path d="M[^"]*L[^"]*" class="line"></path>', line)) == 2, "the curve runs across the NaN"


def test_hostile_text_is_text_in_every_part(tmp_path: Path) -> None:
    make_pipeline(tmp_path, HOSTILE)
    content = json.loads((tmp_path / "runs/mid/lineage.json").read_text())
    content["events"].append({"event": HOSTILE, HOSTILE: HOSTILE})
    content["versions"] = {HOSTILE: HOSTILE}
    content["starts"][0]["command"] = [HOSTILE]
    write(tmp_path / "runs/mid/lineage.json", content)
    write(tmp_path / "x/evaluation.json", evaluation(HOSTILE, HOSTILE, 0.5))
    page = write_report(tmp_path, tmp_path / "out.html").read_bytes().decode("utf-8")
    assert page.count("<script") == 1
    assert "<img" not in page
    assert "{{ 7*7 }}" in page
    assert "&lt;script&gt;alert(1)" in page
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", page)
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.parametrize("value", [None, "text", [1], {"a": 1}, 10**400], ids=lambda value: str(value)[:6])
def test_no_value_of_a_wrong_kind_breaks_the_page(tmp_path: Path, value: Any) -> None:
    make_pipeline(tmp_path)
    files = [*tmp_path.glob("results/**/*.json"), tmp_path / "runs/mid/lineage.json", tmp_path / "merged/merge.json"]
    for path in files:
        whole = json.loads(path.read_text())
        for key in whole:
            path.write_text(json.dumps({**whole, key: value}))
            page = write_report(tmp_path, tmp_path / "out.html").read_text(encoding="utf-8")
            assert ">nan<" not in page, (path.name, key)
        path.write_text(json.dumps(whole))


def test_what_is_no_result_is_told_apart() -> None:
    assert [kind_of(one) for one in ({}, [], None, {"models": 3, "rows": 2}, {"suite": 1, "tasks": 2})] == [None] * 5


def test_nothing_to_report_on_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        write_report(tmp_path / "absent", tmp_path / "out.html")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no run directory"):
        write_report([tmp_path / "empty"])
    with pytest.raises(InputError, match="name at least one"):
        write_report([])
    assert not list(tmp_path.rglob("*.html"))


def test_the_command_takes_several_directories(tmp_path: Path) -> None:
    import typer

    from prism_nemo.commands.report import report

    make_pipeline(tmp_path)
    app = typer.Typer()
    app.command()(report)
    out = tmp_path / "page.html"
    done = CliRunner().invoke(
        app, [str(tmp_path / "runs/mid"), str(tmp_path / "results"), "--out", str(out)], catch_exceptions=False
    )
    assert done.exit_code == 0
    assert done.stdout.strip() == str(out)
    assert "sums against base: score" in out.read_text(encoding="utf-8")


def test_an_export_is_tied_to_the_checkpoint_it_came_from(tmp_path: Path) -> None:
    """By the hash of the manifest, so also where the run was moved or renamed; by the name only without one."""
    make_pipeline(tmp_path / "first")
    manifest = tmp_path / "first/runs/rl_on_mid/checkpoints/step_00000040/manifest.json"
    export = tmp_path / "first/hf/tuned"
    write(export / "config.json", {})
    (export / "model.safetensors").touch()
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
    write(export / ORIGIN, {"checkpoint": "elsewhere/checkpoints/step_00000040", "manifest_sha256": digest})
    write(tmp_path / "first/results/e/evaluation.json", evaluation(str(export), "tuned", 0.6))
    story = story_of(tmp_path / "first")
    assert lineage(story)["tuned"] == ("hf", ["rl_on_mid"])
    assert [len(model.evaluations) for model in story.models if model.role == "hf"] == [1]
    assert not any("exported from" in what for what, _ in _gaps(story))
    (export / ORIGIN).write_text("[not an object")
    assert lineage(story_of(tmp_path / "first"))["tuned"] == ("hf", [])
