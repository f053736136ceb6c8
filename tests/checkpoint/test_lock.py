"""Two runs in one directory must not be possible; a killed run must not keep the next one out."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from prism_nemo.checkpoint.lock import LOCK, RunLock, describe_process
from prism_nemo.errors import InputError

HOLD = """
import sys, time
from pathlib import Path
from prism_nemo.checkpoint.lock import RunLock, describe_process
import os
lock = RunLock(Path(sys.argv[1]))
lock.record([describe_process(os.getpid())])
print("held", flush=True)
time.sleep(600)
"""


@contextlib.contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_second_run_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        with pytest.raises(InputError, match=f"process {process.pid} on .* is running in it; stop that run or use ano"):
            RunLock(tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait()
        lock = RunLock(tmp_path)  # stale: its holder is gone, whatever the file says
        assert [p["pid"] for p in lock.left_over] == [process.pid]
        assert lock.end_left_over() == []
        lock.release()


def test_a_run_that_ended_leaves_an_empty_file(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.record([describe_process(os.getpid())])
    assert json.loads((tmp_path / LOCK).read_text())["processes"][0]["pid"] == os.getpid()
    lock.release()
    lock.release()
    assert (tmp_path / LOCK).read_text() == ""
    again = RunLock(tmp_path)
    assert again.left_over == []
    again.release()


def test_a_forked_child_does_not_hold_the_lock(tmp_path: Path) -> None:
    """A sandbox of a reward may outlive its run by a moment."""
    lock = RunLock(tmp_path)
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    try:
        lock.release()
        RunLock(tmp_path).release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def sleeping() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])


def write_record(folder: Path, processes: list[dict[str, object]]) -> None:
    (folder / LOCK).write_text(json.dumps({"processes": processes}))


def test_what_a_killed_run_left_running_is_ended(tmp_path: Path) -> None:
    orphan = sleeping()
    try:
        write_record(tmp_path, [describe_process(orphan.pid)])
        lock = RunLock(tmp_path)
        assert lock.end_left_over() == [orphan.pid]
        assert orphan.wait(timeout=5) == -signal.SIGKILL
        lock.release()
    finally:
        orphan.kill()
        orphan.wait()


@pytest.mark.parametrize("change", [{"created": 1.0}, {"host": "another"}, {"pid": "x"}, {"pid": os.getpid()}])
def test_others_are_left_alone(tmp_path: Path, change: dict[str, object]) -> None:
    """A number that was given to another process since, or a process of another host."""
    other = sleeping()
    try:
        mine = describe_process(os.getpid()) if change.get("pid") == os.getpid() else {}
        write_record(tmp_path, [{**describe_process(other.pid), **mine, **change}])
        lock = RunLock(tmp_path)
        assert lock.end_left_over() == []
        assert psutil.pid_exists(other.pid)
        assert other.poll() is None
        lock.release()
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"processes": [{}]}'])
def test_a_record_that_was_cut_short_is_no_obstacle(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK).write_text(content)
    lock = RunLock(tmp_path)
    assert lock.end_left_over() == []
    lock.release()


def test_without_locks_the_process_in_the_file_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prism_nemo.checkpoint import lock as module

    def none(*_: object) -> None:
        raise OSError(module._NO_LOCKS[0], "No locks available")

    monkeypatch.setattr(module.fcntl, "lockf", none)
    other = sleeping()
    try:
        write_record(tmp_path, [describe_process(other.pid)])
        with pytest.raises(InputError, match=f"process {other.pid} on"):
            RunLock(tmp_path)
    finally:
        other.kill()
        other.wait()
    RunLock(tmp_path).release()
