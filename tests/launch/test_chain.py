"""slurm/chain.sh with a stand-in for scontrol: what each way for a slice to end leads to."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

CHAIN = Path(__file__).parents[2] / "slurm/chain.sh"
# Writes down what it was asked, and does as it is told in `refuse`.
SCONTROL = """#!/bin/bash
echo "$*" >> "$STAND_IN/asked"
[ "$1" != "$(cat "$STAND_IN/refuse" 2>/dev/null)" ] || { echo "Requested operation is presently disabled" >&2; exit 1; }
"""


class Cluster:
    """A run directory and a PATH with the stand-in; each call of `slice` is one start of the job."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "run dir"  # a blank: every path must be quoted
        (folder / "bin").mkdir()
        (folder / "bin/scontrol").write_text(SCONTROL)
        (folder / "bin/scontrol").chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "STAND_IN": str(folder),
            "SLURM_JOB_ID": "7",
        }

    def command(self, code: int, step: int | None = None, whole: bool = True) -> list[str]:
        """A stage that leaves a checkpoint, if it is given a step, and ends with a code."""
        script = f"exit {code}"
        if step is not None:
            path = f"'{self.run}'/checkpoints/step_{step:08d}"
            script = f"mkdir -p {path}; {f'touch {path}/manifest.json; ' if whole else ''}{script}"
        return ["bash", "-c", script]

    def slice(self, code: int, step: int | None = None, whole: bool = True, **more: str) -> tuple[int, str]:
        done = subprocess.run(
            ["bash", str(CHAIN), str(self.run), *self.command(code, step, whole)],
            env={**self.environment, **more},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stderr

    def asked(self) -> list[str]:
        path = self.folder / "asked"
        lines = path.read_text().splitlines() if path.is_file() else []
        path.unlink(missing_ok=True)
        return lines


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def test_done_is_done(cluster: Cluster) -> None:
    assert cluster.slice(0, 10)[0] == 0
    assert cluster.asked() == []


def test_stopped_with_a_new_checkpoint_is_queued_again(cluster: Cluster) -> None:
    for restart, step in enumerate((10, 20, 30), 1):
        code, said = cluster.slice(75, step)
        assert code == 75
        assert cluster.asked() == ["requeue 7"]
        assert f"queued again as job 7 (restart {restart})" in said
    assert cluster.slice(0, 40)[0] == 0


def test_stopped_where_it_started_is_not(cluster: Cluster) -> None:
    """The next slice would be given the same time and do the same: a chain for ever."""
    cluster.slice(75, 10)
    cluster.asked()
    code, said = cluster.slice(75)
    assert (code, cluster.asked()) == (1, [])
    assert "stopped at step 10, where it started" in said
    assert "save more often (checkpoint.save_interval)" in said


def test_a_checkpoint_that_was_never_finished_is_no_progress(cluster: Cluster) -> None:
    cluster.slice(75, 10)
    cluster.asked()
    code, _ = cluster.slice(75, 20, whole=False)
    assert (code, cluster.asked()) == (1, [])


def test_steps_are_compared_as_numbers(cluster: Cluster) -> None:
    """00000008 and 00000009 are no octal numbers, and 10 is more than 9."""
    for step in (8, 9, 10):
        assert cluster.slice(75, step)[0] == 75
        assert cluster.asked() == ["requeue 7"]


def test_an_older_checkpoint_that_appears_is_no_progress(cluster: Cluster) -> None:
    cluster.slice(75, 20)
    cluster.asked()
    assert cluster.slice(75, 10)[0] == 1


def test_wrong_input_is_never_queued_again(cluster: Cluster) -> None:
    code, said = cluster.slice(2, 10)
    assert (code, cluster.asked()) == (2, [])
    assert "the input is wrong" in said


@pytest.mark.parametrize("failure", [1, 137, 143, 9])
def test_a_failure_gets_one_more_attempt_without_progress(cluster: Cluster, failure: int) -> None:
    cluster.slice(75, 10)
    cluster.asked()
    code, said = cluster.slice(failure)
    assert (code, cluster.asked()) == (75, ["requeue 7"])
    assert "once more, in case it was the node" in said
    code, said = cluster.slice(failure)
    assert (code, cluster.asked()) == (1, [])
    assert "no new checkpoint since step 10 for the second time in a row" in said


def test_failures_with_progress_between_them_do_not_add_up(cluster: Cluster) -> None:
    for step in (10, 20, 30):
        assert cluster.slice(1, step)[0] == 75
        assert cluster.slice(1)[0] == 75


def test_a_slice_ended_from_outside_is_counted_by_the_next(cluster: Cluster) -> None:
    """A node that dies takes the script with it: Slurm queues the job again, and nobody asks for progress."""
    said = ""
    for attempt in range(4):
        begun = cluster.run / f"begun-{attempt}"
        process = subprocess.Popen(
            ["bash", str(CHAIN), str(cluster.run), "bash", "-c", f"touch {begun}; sleep 60"],
            env=cluster.environment,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        deadline = time.monotonic() + 20
        while not begun.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        said = process.communicate()[1]
        if process.returncode == 1:
            break
    assert process.returncode == 1
    assert "left no new checkpoint (3 in a row)" in said
    assert cluster.asked() == []


def test_restarts_have_a_limit(cluster: Cluster) -> None:
    assert cluster.slice(75, 1, PRISM_NEMO_MAX_RESTARTS="2")[0] == 75
    assert cluster.slice(75, 2, PRISM_NEMO_MAX_RESTARTS="2")[0] == 75
    cluster.asked()
    code, said = cluster.slice(75, 3, PRISM_NEMO_MAX_RESTARTS="2")
    assert (code, cluster.asked()) == (1, [])
    assert "2 times (PRISM_NEMO_MAX_RESTARTS)" in said


def test_a_job_that_may_not_be_queued_again_says_what_to_do(cluster: Cluster) -> None:
    (cluster.folder / "refuse").write_text("requeue")
    code, said = cluster.slice(75, 10)
    assert code == 75
    assert "could not be queued again" in said
    del cluster.environment["SLURM_JOB_ID"]
    assert "no Slurm" in cluster.slice(75, 20)[1]


def test_bad_nodes_are_left_out_of_the_next_attempt(cluster: Cluster) -> None:
    (cluster.run / "chain").mkdir(parents=True)
    (cluster.run / "chain/bad_nodes").write_text("node3,node5\n")
    assert cluster.slice(1)[0] == 75
    assert cluster.asked() == ["requeue 7", "update JobId=7 ExcNodeList=node3,node5"]
    (cluster.folder / "refuse").write_text("update")
    (cluster.run / "chain/stalled").write_text("0\n")
    assert "if it is chosen again: scontrol update JobId=7 ExcNodeList=node3,node5" in cluster.slice(1)[1]
