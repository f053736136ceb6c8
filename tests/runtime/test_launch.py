"""Results, errors and deaths of the processes that `launch` starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import runtime_workers as workers

from prism_nemo.errors import InputError, PrismError, StoppedEarly
from prism_nemo.runtime.launch import launch


def test_returns_what_rank_0_returned() -> None:
    assert launch(workers.rank_and_argument, {"a": [1, 2]}, processes=2) == (0, 2, {"a": [1, 2]})


def test_one_process_runs_apart_too() -> None:
    rank, world_size, _ = launch(workers.rank_and_argument, None)
    assert (rank, world_size) == (0, 1)
    assert "RANK" not in os.environ


def test_nothing_is_left_among_the_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch(workers.rank_and_argument, None)  # whatever stays for the life of this process is there now
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    launch(workers.rank_and_argument, None, processes=2)
    assert list(tmp_path.iterdir()) == []


def test_processes_join_one_group() -> None:
    assert launch(workers.sum_of_ranks, processes=2) == 3.0


@pytest.mark.parametrize(
    "error", [InputError("key 'lr' is wrong"), PrismError("the work failed"), StoppedEarly("saved, run again")]
)
def test_our_errors_come_back_whole(error: PrismError) -> None:
    with pytest.raises(type(error)) as caught:
        launch(workers.raise_error, error)
    assert type(caught.value) is type(error)
    assert str(caught.value) == str(error)
    assert caught.value.exit_code == error.exit_code


def test_other_errors_come_back_with_their_traceback() -> None:
    with pytest.raises(PrismError) as caught:
        launch(workers.raise_error, ValueError("no such thing"))
    assert type(caught.value) is PrismError
    assert "ValueError: no such thing" in str(caught.value)
    assert "runtime_workers.py" in str(caught.value)


LOST = "connection closed by peer"


@pytest.mark.parametrize("consequence", [PrismError(LOST), ValueError(LOST)], ids=["ours", "plain"])
@pytest.mark.parametrize("cause", [PrismError("no space left"), InputError("no space left"), OSError("no space left")])
def test_earliest_error_explains_the_failure(tmp_path: Path, cause: Exception, consequence: Exception) -> None:
    """A full disk on rank 1 makes rank 0 fail with 'connection closed by peer', which explains nothing."""
    with pytest.raises(PrismError, match="no space left") as caught:
        launch(workers.earliest_cause, str(tmp_path), cause, consequence, processes=2)
    assert type(caught.value) is (type(cause) if isinstance(cause, PrismError) else PrismError)
    assert LOST not in str(caught.value)


@pytest.mark.parametrize("rank", [0, 1])
def test_error_on_one_rank_ends_the_ranks_that_wait_for_it(rank: int) -> None:
    began = time.monotonic()
    with pytest.raises(PrismError, match="ZeroDivisionError"):
        launch(workers.divide_by_zero_on, rank, processes=2)
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(("rank", "how"), [(0, "exit"), (1, "kill")])
def test_rank_that_dies_without_a_word_is_an_error_not_a_hang(rank: int, how: str) -> None:
    began = time.monotonic()
    with pytest.raises(PrismError) as caught:
        launch(workers.die_on, rank, how, processes=2)
    assert type(caught.value) is PrismError
    assert f"rank {rank} ended without a message" in str(caught.value)
    assert time.monotonic() - began < 60


def test_death_of_the_only_process_is_named() -> None:
    with pytest.raises(PrismError, match="ended without a message"):
        launch(os._exit, 3)


def write_script(path: Path, call: str) -> Path:
    """A program that does what the command does with `call`."""
    path.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import runtime_workers\n"
        "from prism_nemo.errors import InputError, PrismError\n"
        "from prism_nemo.runtime.launch import launch\n"
        "if __name__ == '__main__':\n"
        "    try:\n"
        f"        {call}\n"
        "    except PrismError as error:\n"
        "        print(error)\n"
        "        sys.exit(error.exit_code)\n"
    )
    return path


def test_user_errors_put_no_traceback_on_the_terminal(tmp_path: Path) -> None:
    """Apart from pytest, which takes the log messages of torch's agent for itself."""
    script = write_script(tmp_path / "stage.py", "launch(runtime_workers.raise_error, InputError('lr is wrong'))")
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (2, "lr is wrong\n")
    assert "Traceback" not in result.stderr


def test_signal_to_the_command_stops_its_processes(tmp_path: Path) -> None:
    """Slurm's warning reaches the command; what it started must not outlive it."""
    call = f"launch(runtime_workers.sleep_long, {str(tmp_path / 'pid')!r})"
    script = write_script(tmp_path / "stage.py", call)
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    try:
        pid = _wait_for(tmp_path / "pid", process)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75
    assert "stopped by SIGTERM; run the same command again" in output
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_killed_command_takes_its_processes_along(tmp_path: Path) -> None:
    """Neither ranks that work on nor a server that waits for them stay behind; the command could not end them."""
    call = f"launch(runtime_workers.sleep_long, {str(tmp_path / 'pid')!r})"
    process = subprocess.Popen([sys.executable, write_script(tmp_path / "stage.py", call)])
    try:
        worker = psutil.Process(_wait_for(tmp_path / "pid", process))
        server = worker.parent()
        assert server is not None
        assert server.pid != process.pid
    finally:
        process.kill()
    assert process.wait(30) == -signal.SIGKILL
    assert psutil.wait_procs([worker, server], timeout=30)[1] == []


def _wait_for(marker: Path, process: subprocess.Popen[str]) -> int:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if marker.is_file() and marker.read_text():
            return int(marker.read_text())
        time.sleep(0.05)
    raise AssertionError("the worker did not start")
