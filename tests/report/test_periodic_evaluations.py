"""Small evaluations while a stage trains: their curves hold the recorded values and intervals, wherever they lie."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from made_runs import make_run, midtrain_lines, write

from prism_nemo.report import periodic
from prism_nemo.report.find import find
from prism_nemo.report.page import write_report
from prism_nemo.report.story import Story, tell

HOSTILE = "</title><script>alert(1)</script><img src=x onerror=alert(2)>\u202e\x00"


def evaluated(step: int, value: float, name: str = "sums") -> dict[str, Any]:
    """A line of metrics as an evaluation writes it."""
    about = {
        "accuracy": value,
        "accuracy_low": value - 0.1,
        "accuracy_high": value + 0.1,
        "form": 0.875,
        "length": 17.5,
    }
    return {"step": step, **{f"eval/{key}/{name}": one for key, one in about.items()}, f"eval/loss/{name}": 3 - value}


def story_of(folder: Path) -> Story:
    return tell(find([folder]))


def table(story: Story, title: str) -> list[tuple[str, ...]]:
    figure = next(one for one in periodic.figures(story) if one.title == title)
    assert figure.table is not None
    return [tuple(row) for row in figure.table.rows]


def test_curves_hold_what_was_recorded(tmp_path: Path) -> None:
    make_run(tmp_path / "mid", "midtrain", [*midtrain_lines(), evaluated(0, 0.2), evaluated(20, 0.4)])
    story = story_of(tmp_path)
    assert table(story, "sums while training") == [
        ("mid at step 0", "20.0%", "10.0 to 30.0%", "87.5%", "17.5"),
        ("mid at step 20", "40.0%", "30.0 to 50.0%", "87.5%", "17.5"),
    ]
    assert table(story, "Loss on sums while training") == [("mid at step 0", "2.800"), ("mid at step 20", "2.600")]


def test_the_band_is_the_interval_and_the_line_is_not_smoothed(tmp_path: Path) -> None:
    """Of 20 evaluations a smoothed line would not run through the highest one."""
    lines = [evaluated(step, 0.9 if step == 10 else 0.5) for step in range(20)]
    make_run(tmp_path / "mid", "midtrain", [*midtrain_lines(), *lines])
    svg = str(periodic.figures(story_of(tmp_path))[0].svg)
    line = re.search(r'<path d="M([^"]*)" class="line">', svg[svg.index('class="plot"') :])
    band = re.search(r'<path d="M([^"]*)Z" class="band">', svg)
    assert line is not None
    assert band is not None
    heights = [float(point.split()[1]) for point in line[1].split("L")]
    edges = [float(point.split()[1]) for point in band[1].split("L")]
    scale = (max(heights) - min(heights)) / 0.4  # pixels of a share of 1
    assert heights.index(min(heights)) == 10
    assert math.isclose(max(heights) - min(edges[:10]), scale * 0.1, abs_tol=0.2)
    assert math.isclose(max(edges) - max(heights), scale * 0.1, abs_tol=0.2)


def test_a_result_that_was_not_taken_over_is_read_from_its_file(tmp_path: Path) -> None:
    """A process evaluated the last checkpoint and the run was ended before it wrote the line."""
    make_run(tmp_path / "mid", "midtrain", [*midtrain_lines(), evaluated(20, 0.4)])
    for step, value in ((20, 0.99), (40, 0.6)):
        content = {key: one for key, one in evaluated(step, value).items() if key != "step"}
        write(tmp_path / f"mid/evaluations/step_{step:08d}.json", content)
    (tmp_path / "mid/evaluations/step_00000060.json").write_text("{torn")
    write(tmp_path / "mid/evaluations/step_x.json", evaluated(80, 0.7))
    rows = table(story_of(tmp_path), "sums while training")
    assert [row[:2] for row in rows] == [("mid at step 20", "40.0%"), ("mid at step 40", "60.0%")]


def test_runs_share_a_chart_and_a_value_that_is_not_finite_is_a_gap(tmp_path: Path) -> None:
    for name, value in (("a", 0.3), ("b", 0.5)):
        lines = [evaluated(step, math.nan if (name, step) == ("a", 10) else value) for step in (0, 10, 20)]
        make_run(tmp_path / name, "midtrain", [*midtrain_lines(), *lines])
    figures = periodic.figures(story_of(tmp_path))
    assert [figure.title for figure in figures] == ["sums while training", "Loss on sums while training"]
    svg = str(figures[0].svg)
    assert set(re.findall(r'data-name="(.*?)"', svg)) == {"a", "b"}
    assert "nan" not in svg.replace("not measured", "")
    assert [row[1] for row in table(story_of(tmp_path), "sums while training")].count("not measured") == 1


def test_an_interval_that_is_missing_is_not_made_up(tmp_path: Path) -> None:
    line = {"step": 20, "eval/accuracy/sums": 0.4}
    make_run(tmp_path / "mid", "midtrain", [*midtrain_lines(), line])
    row = table(story_of(tmp_path), "sums while training")[0]
    assert row[1:] == ("40.0%", "not measured", "not measured", "not measured")


def test_the_part_is_left_out_where_nothing_was_asked(tmp_path: Path) -> None:
    make_run(tmp_path / "mid", "midtrain", midtrain_lines())
    assert "Evaluations on the way" not in write_report(tmp_path, tmp_path / "out.html").read_text(encoding="utf-8")


def test_hostile_names_are_text(tmp_path: Path) -> None:
    make_run(tmp_path / "mid", "midtrain", [*midtrain_lines(), evaluated(0, 0.2, HOSTILE), evaluated(9, 0.2, HOSTILE)])
    content = {key: one for key, one in evaluated(0, 0.3, HOSTILE * 2).items() if key != "step"}
    (tmp_path / "mid/evaluations").mkdir()
    (tmp_path / "mid/evaluations/step_00000044.json").write_text(json.dumps(content))
    page = write_report(tmp_path, tmp_path / "out.html").read_text(encoding="utf-8")
    assert "Evaluations on the way" in page
    assert page.count("&lt;script&gt;alert(1)") > 3
    assert page.count("<script") == 1
    assert "<img" not in page
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", page)
