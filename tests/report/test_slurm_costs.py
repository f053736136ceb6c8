"""What a run's Slurm job left behind: its restarts, what lay between the slices, and nodes that were left out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from made_runs import make_job, make_run, midtrain_lines, write

from prism_nemo.report import costs, trusted
from prism_nemo.report.find import find
from prism_nemo.report.page import write_report
from prism_nemo.report.story import Story, tell

HOSTILE = "</title><script>alert(1)</script><img src=x onerror=alert(2)>\u202e\x00" + "x" * 3000


def make_job_run(root: Path) -> Path:
    """A run of three slices whose job was queued again twice."""
    make_run(root / "mid", "midtrain", midtrain_lines(), hours=((2, 0), (3, 10), (5, 20)))
    make_job(root / "mid")
    return root / "mid"


def story_of(folder: Path) -> Story:
    return tell(find([folder]))


def test_a_job_is_shown_with_its_restarts_and_what_lay_between_its_slices(tmp_path: Path) -> None:
    make_job_run(tmp_path)
    table = costs.job_table(story_of(tmp_path))
    assert table is not None
    # Slices begin at 2, 3 and 5 o'clock and keep 100, 100 and 200 seconds of training:
    # 3,500 and 7,100 seconds lie between them.
    assert dict(zip(table.columns, table.rows[0], strict=True)) == {
        "stage": "mid", "newest job": "4711", "nodes": "node[1-4]", "restarts: chain": "2",
        "restarts: Slurm": "2", "between slices": "2 h 56 min", "stalled slices": "1",
        "nodes left out": "node7", "log": "/logs/mid-4711.out",
    }  # fmt: skip


def test_a_run_without_a_job_has_no_row(tmp_path: Path) -> None:
    make_run(tmp_path / "mid", "midtrain", midtrain_lines())
    assert costs.job_table(story_of(tmp_path)) is None
    assert "Slurm jobs" not in write_report(tmp_path, tmp_path / "out.html").read_text(encoding="utf-8")


def test_a_chain_that_was_never_restarted(tmp_path: Path) -> None:
    make_run(tmp_path / "mid", "midtrain", midtrain_lines())
    write(tmp_path / "mid/slurm.json", {"job": "1"})
    table = costs.job_table(story_of(tmp_path))
    assert table is not None
    assert table.rows[0] == ("mid", "1", "not measured", "0", "not measured", "–", "0", "–", "not measured")


def test_restarts_and_waiting_are_on_the_time_line(tmp_path: Path) -> None:
    make_job_run(tmp_path)
    figure = costs.timeline(story_of(tmp_path))
    assert figure is not None
    svg = str(figure.svg)
    assert "restart 1 at step 10, 58 min 20 s after the last step that was kept" in svg
    assert "restart 2 at step 20, 1 h 58 min after the last step that was kept" in svg
    bars = [float(one) for one in re.findall(r'<rect x="([\d.]+)"[^>]*class="bar"', svg)]
    leads = [(float(a), float(b)) for a, b in re.findall(r'<line x1="([\d.]+)" x2="([\d.]+)"[^>]*"reference"', svg)]
    assert len(bars) == 3
    assert [end for _, end in leads] == bars[1:], "what was waited for ends where the slice begins"
    assert (leads[1][1] - leads[1][0]) / (leads[0][1] - leads[0][0]) == pytest.approx(7100 / 3500, rel=0.01)


def test_a_chain_that_got_no_further_is_among_the_events(tmp_path: Path) -> None:
    make_job_run(tmp_path)
    said = trusted.events(story_of(tmp_path))
    assert any("no new checkpoint in the last 1 slice(s)" in line for line in said)
    assert any("nodes left out since their health check failed: node7" in line for line in said)


def test_hostile_files_are_text_and_links_are_not_followed(tmp_path: Path) -> None:
    run = make_job_run(tmp_path)
    write(run / "slurm.json", dict.fromkeys(("job", "nodes", "restarts", "log"), HOSTILE))
    for name in ("restarts", "stalled", "bad_nodes"):
        (run / "chain" / name).write_text(HOSTILE)
    (tmp_path / "secret").write_text("a secret")
    page = write_report(tmp_path, tmp_path / "out.html").read_text(encoding="utf-8")
    assert page.count("&lt;script&gt;alert(1)") > 3
    assert page.count("<script") == 1
    assert "<img" not in page
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", page)
    assert "x" * 500 not in page, "a long text is cut"
    (run / "chain/restarts").unlink()
    (run / "chain/restarts").symlink_to(tmp_path / "secret")
    assert "a secret" not in write_report(tmp_path, tmp_path / "out.html").read_text(encoding="utf-8")
    (run / "slurm.json").write_text("[" * 100_000)
    assert "Slurm jobs" not in write_report(tmp_path, tmp_path / "out.html").read_text(encoding="utf-8")
