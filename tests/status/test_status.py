from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from prism_nemo.config import MidtrainConfig, to_yaml
from prism_nemo.errors import InputError
from prism_nemo.status import problems
from prism_nemo.status.collect import collect, other_jobs
from prism_nemo.status.files import last_lines, newest_checkpoint
from prism_nemo.status.run_status import RunStatus
from prism_nemo.status.slurm import seconds_of
from prism_nemo.status.view import MIN_WIDTH, status_view

SQUEUE = """#!/bin/bash
[ ! -f "$STAND_IN/down" ] || { echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1; }
cat "$STAND_IN/queue"
"""
SCONTROL = """#!/bin/bash
cat "$STAND_IN/job_${!#}" 2>/dev/null || { echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }
"""


@pytest.fixture(autouse=True)
def without_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine has: what is not found says so."""
    monkeypatch.setenv("PATH", "/nowhere")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for squeue and scontrol; the queue is a file."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in (("squeue", SQUEUE), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "queue").write_text("")
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("STAND_IN", str(folder))
    return folder


class Run:
    """A run directory as stages write it."""

    def __init__(self, path: Path, stage: str = "midtrain", steps: int = 100) -> None:
        self.path, self.stage = path, stage
        path.mkdir(parents=True)
        config = MidtrainConfig(run_dir=str(path), train_steps=steps)
        config.data.path = "d"
        (path / "config.yaml").write_text(to_yaml(config))
        self.starts: list[dict[str, Any]] = []
        self.start(0)

    def start(self, step: int, ago: float = 600.0) -> None:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(time.time() - ago))
        self.starts.append({"time": stamp, "step": step, "command": ["prism-nemo"]})
        lineage = {"stage": self.stage, "parents": [], "starts": self.starts, "events": []}
        (self.path / "lineage.json").write_text(json.dumps(lineage))

    def log(self, *steps: int, **values: Any) -> None:
        with (self.path / "metrics.jsonl").open("a") as file:
            for step in steps:
                line = {"step": step, "loss": 3.0 - step / 100, "tokens_per_second": 5000.0, "seconds": 2.0 * step}
                file.write(json.dumps({**line, **values}) + "\n")

    def checkpoint(self, step: int, whole: bool = True) -> None:
        folder = self.path / f"checkpoints/step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(b"0" * 1000)
        if whole:
            (folder / "manifest.json").write_text("{}")

    def job(self, number: str) -> None:
        (self.path / "slurm.json").write_text(json.dumps({"job": number, "log": "here.out"}))

    def status(self) -> RunStatus:
        return collect([self.path])[0]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "runs/mid")


def test_a_stopped_run(run: Run) -> None:
    run.log(10, 20, 30, 40)
    run.checkpoint(40)
    run.start(40)
    status = run.status()
    assert (status.stage, status.state, status.step, status.steps) == ("midtrain", "stopped", 40, 100)
    assert (status.measure, status.tokens_per_second, status.restarts) == ("loss", 5000.0, 1)
    assert status.value == pytest.approx(2.6)
    assert status.seconds_left == pytest.approx(120.0)  # 60 steps of 2 s
    assert status.checkpoint == str(run.path / "checkpoints/step_00000040")
    assert status.problems == []
    assert status.job is None


def test_time_left_follows_the_newest_steps(run: Run) -> None:
    """The first steps of a run are slow (compilation, cold files); they must not count for ever."""
    run.log(1, seconds=500.0)
    run.log(*range(10, 60), seconds=0)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    for line in lines[1:]:
        line["seconds"] = 500.0 + 3.0 * line["step"]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run.status().seconds_left == pytest.approx(41 * 3.0)


def test_a_finished_run(run: Run) -> None:
    run.log(100)
    run.checkpoint(100)
    status = run.status()
    assert (status.state, status.seconds_left) == ("finished", None)


def test_lines_without_a_loss_do_not_hide_it(run: Run) -> None:
    run.log(10, loss=2.5)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 10, "validation_loss": 3.3}) + "\n")
    assert run.status().value == 2.5


def test_rl_shows_its_reward(tmp_path: Path) -> None:
    run = Run(tmp_path / "rl", stage="rl")
    run.log(5, reward=0.25)
    status = run.status()
    assert (status.measure, status.value) == ("reward", 0.25)


def test_a_checkpoint_that_was_never_finished_is_not_named(run: Run) -> None:
    run.checkpoint(40)
    run.checkpoint(60, whole=False)
    run.checkpoint(9)
    assert newest_checkpoint(run.path) == (run.path / "checkpoints/step_00000040", 40)


HOLD = """
import sys, time
from pathlib import Path
from prism_nemo.checkpoint.lock import RunLock, describe_process
import os
lock = RunLock(Path(sys.argv[1]))
lock.record([describe_process(os.getpid())])
print("held", flush=True)
time.sleep(60)
"""


def test_a_run_is_running_as_long_as_its_lock_is_held(run: Run) -> None:
    run.log(10)
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert (run.status().state, run.status().problems) == ("running", [])
        os.utime(run.path / "metrics.jsonl", (time.time() - 3600, time.time() - 3600))
        run.starts.clear()
        run.start(0, ago=7200)
        assert run.status().problems == [
            "no metrics for 60 minutes; it hangs, saves, evaluates, or its time limit is near"
        ]
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    status = run.status()
    assert status.state == "killed"
    assert f"stale lock: process {process.pid} on" in status.problems[0]


def test_looking_does_not_take_the_lock(run: Run) -> None:
    """A run that starts while somebody looks must not be told that another one is running."""
    (run.path / "running.json").write_text("")
    before = (run.path / "running.json").stat()
    looking = "import sys; from pathlib import Path; from prism_nemo.status.files import holder\n"
    looking += "while True: holder(Path(sys.argv[1]))"
    process = subprocess.Popen([sys.executable, "-c", looking, str(run.path)])
    try:
        from prism_nemo.checkpoint.lock import RunLock

        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            RunLock(run.path).release()
    finally:
        process.kill()
        process.wait()
    assert (run.path / "running.json").stat().st_size == before.st_size


def test_clocks_that_differ_are_said(run: Run) -> None:
    run.log(10)
    run.start(10, ago=4000)  # dated before the first start, which was 600 s ago
    assert any("start 2 is dated 3400 s before start 1" in problem for problem in run.status().problems)


def test_metrics_from_the_future_and_starts_after_their_metrics(run: Run) -> None:
    run.log(10)
    os.utime(run.path / "metrics.jsonl", (time.time() + 100, time.time() + 100))
    assert any("in the future of this machine" in problem for problem in run.status().problems)
    os.utime(run.path / "metrics.jsonl", (time.time() - 1000, time.time() - 1000))
    assert any("ahead of the file server's" in problem for problem in run.status().problems)


def test_metrics_of_the_start_before_say_nothing_about_clocks(run: Run) -> None:
    """After a restart, until the first new step is logged, the newest metrics are older than the start."""
    run.log(10)
    os.utime(run.path / "metrics.jsonl", (time.time() - 300, time.time() - 300))
    run.start(10, ago=10)
    assert run.status().problems == []


def test_what_the_chain_wrote_down(run: Run) -> None:
    (run.path / "chain").mkdir()
    (run.path / "chain/stalled").write_text("2\n")
    (run.path / "chain/bad_nodes").write_text("n3,n7\n")
    said = run.status().problems
    assert said[0].startswith("no new checkpoint in the last 2 slice(s)")
    assert said[1].endswith("n3,n7")


def test_a_disk_that_is_too_full_for_the_next_checkpoint(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.checkpoint(10)
    usage = type("Usage", (), {"free": 500})()
    monkeypatch.setattr(problems.shutil, "disk_usage", lambda path: usage)
    assert "the next save will fail" in run.status().problems[0]


def test_jobs_of_slurm(run: Run, slurm: Path) -> None:
    run.job("17")
    (slurm / "queue").write_text(
        "17|mid|RUNNING|1-02:00:10|(null)|n[1-8]|None\n"
        "18|a|b|PENDING|INVALID|afterok:17(unfulfilled)||Dependency\n"
        "19|eval|PENDING|12:00:00|afterok:18(unfulfilled)||Dependency\n"
    )
    status = run.status()
    assert status.job is not None
    assert (status.job.state, status.job.seconds_left, status.job.nodes) == ("RUNNING", 93_610.0, "n[1-8]")
    assert [job.id for job in status.next_jobs] == ["18"]
    assert status.log == "here.out"
    assert [(job.id, job.name, job.after) for job in other_jobs([status])] == [
        ("18", "a|b", ("17",)),
        ("19", "eval", ("18",)),
    ]


def test_a_job_that_waits_and_one_that_ended(run: Run, slurm: Path) -> None:
    run.job("17")
    run.checkpoint(10)
    (slurm / "queue").write_text("17|mid|PENDING|24:00:00|(null)||Priority\n")
    assert run.status().state == "waiting"
    (slurm / "queue").write_text("")
    (slurm / "job_17").write_text(
        "JobId=17 JobName=mid JobState=FAILED Reason=NonZeroExitCode ExitCode=1:0 NodeList=n1\n"
    )
    status = run.status()
    assert status.state == "failed"
    assert status.job is not None
    assert status.job.reason == "NonZeroExitCode"


def test_slurm_that_does_not_answer_or_has_forgotten(run: Run, slurm: Path) -> None:
    run.job("17")
    run.checkpoint(10)
    assert (run.status().job, run.status().state) == (None, "stopped")
    (slurm / "down").touch()
    assert (run.status().job, run.status().state) == (None, "stopped")
    assert other_jobs([]) == []


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1-02:03:04", 93_784.0),
        ("02:03:04", 7384.0),
        ("3:04", 184.0),
        ("UNLIMITED", None),
        ("INVALID", None),
        ("", None),
    ],
)
def test_durations_of_slurm(text: str, seconds: float | None) -> None:
    assert seconds_of(text) == seconds


def test_only_the_end_of_long_metrics_is_read(run: Run) -> None:
    run.log(*range(1, 5001))
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5001, "lo')  # being written
    lines = last_lines(run.path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(4602, 5001))


def test_runs_are_found_in_folders(tmp_path: Path) -> None:
    for name in ("b", "a", "deep/er/c"):
        Run(tmp_path / "runs" / name)
    (tmp_path / "runs/empty").mkdir()
    found = [os.path.relpath(status.run, tmp_path) for status in collect([tmp_path / "runs", tmp_path / "runs/a"])]
    assert found == ["runs/a", "runs/b", "runs/deep/er/c"]
    assert collect([tmp_path / "runs/empty"]) == []
    with pytest.raises(InputError, match="no such folder; name a run directory"):
        collect([tmp_path / "nothing"])


@pytest.mark.parametrize("name", ["lineage.json", "slurm.json", "running.json"])
def test_files_that_are_broken_do_not_end_the_list(run: Run, name: str) -> None:
    run.log(10)
    for content in ("{", "[1]", "null", '{"starts": 3}' if name == "lineage.json" else "3"):
        (run.path / name).write_text(content)
        assert run.status().step == 10


def test_a_broken_configuration_is_said(run: Run) -> None:
    (run.path / "config.yaml").write_text("a: [")
    assert "not readable as YAML" in run.status().problems[0]


def test_the_view_fits_and_names_everything(run: Run, slurm: Path) -> None:
    run.log(10, 20)
    run.checkpoint(20)
    run.job("17")
    (slurm / "queue").write_text("17|mid|RUNNING|2:00:00|(null)|n1|None\n18|rl|PENDING|5:00|afterok:17|| \n")
    Run(run.path.parent / "other").log(10)
    statuses = collect([run.path.parent])
    assert json.loads(json.dumps([status.to_dict() for status in statuses]))[0]["job"]["id"] == "17"
    text = _text(status_view(statuses, other_jobs(statuses)))
    for expected in ("mid", "20/100", "loss 2.800", "5,000", "step 20", "17 RUNNING, limit in 2:00:00", "18", "other"):
        assert expected in text, text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= MIN_WIDTH
    assert "no runs here yet" in _text(status_view([]))


def _text(view: Any) -> str:
    console = Console(width=MIN_WIDTH, record=True, file=io.StringIO())
    console.print(view)
    return console.export_text()


def test_nothing_here_imports_torch() -> None:
    """`status` is asked often, on login nodes."""
    script = "import prism_nemo.status.collect, prism_nemo.status.view, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0
