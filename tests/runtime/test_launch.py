"""Results, errors and deaths of the processes that `launch` starts."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import runtime_workers as workers

from prism_nemo.errors import InputError, PrismError, StoppedEarly
from prism_nemo.runtime.launch import launch
from prism_nemo.runtime.signals import STOPPING, PassedOn, take_part


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
        f"        print({call})\n"
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


def _launch_and_signal(number: signal.Signals, function: Callable[..., Any], marker: Path, *args: Any) -> Any:
    """The signal comes to this process, which does what the command does, when the worker is at work."""

    def send() -> None:
        _wait_for(marker, lambda: True)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        return launch(function, str(marker), *args)
    finally:
        sender.join()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_a_signal_ends_processes_that_know_no_signals(number: signal.Signals, tmp_path: Path) -> None:
    """What was started must not outlive it; and nothing was saved, so 75 would be a lie."""
    with pytest.raises(PrismError, match=f"ended at once by {number.name}, which saved nothing; run the") as caught:
        _launch_and_signal(number, workers.sleep_long, tmp_path / "pid")
    assert caught.value.exit_code == 1
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_stage_that_is_asked_to_stop_has_the_time_it_needs(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step takes longer than torch's agent waits before it kills."""
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "0")
    before = [signal.getsignal(n) for n in STOPPING]
    with pytest.raises(StoppedEarly, match=f"saved after {number.name}"):
        _launch_and_signal(number, workers.work_in_steps, tmp_path / "pid", 1.0)
    assert (tmp_path / "saved").read_text() == number.name
    assert [signal.getsignal(n) for n in STOPPING] == before


def test_a_signal_before_the_worker_is_up_is_not_lost(tmp_path: Path) -> None:
    passed_on = PassedOn(tmp_path)
    with passed_on.active():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert passed_on.last == signal.SIGUSR1
    with pytest.raises(PrismError, match=r"ended without a message \(exit code -10\)"):
        launch(take_part, tmp_path)


def test_a_stage_that_was_in_its_last_step_is_done(tmp_path: Path) -> None:
    result = _launch_and_signal(signal.SIGTERM, workers.work_in_steps, tmp_path / "pid", 1.0, True)
    assert result == "done in spite of SIGTERM"


def test_a_stage_whose_terminal_is_closed_saves(tmp_path: Path) -> None:
    """As by a connection that breaks: all get SIGHUP, and to write is an error from then on."""
    call = f"launch(runtime_workers.work_in_steps, {str(tmp_path / 'pid')!r}, 1.0)"
    script = write_script(tmp_path / "stage.py", call)
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, str(script)])
    try:
        _wait_for(tmp_path / "pid", lambda: os.waitpid(pid, os.WNOHANG)[0] == 0)
        os.close(terminal)
        deadline = time.monotonic() + 100
        while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(ended[1]) == 75
    assert (tmp_path / "saved").read_text() == "SIGHUP"


def test_a_signal_to_all_processes_lets_the_stage_save(tmp_path: Path) -> None:
    """As by `timeout`, Slurm, or a terminal that is closed; and under nohup the latter stops nothing."""
    call = f"launch(runtime_workers.work_in_steps, {str(tmp_path / 'pid')!r}, 0.2)"
    command = ["nohup", sys.executable, str(write_script(tmp_path / "stage.py", call))]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    try:
        _wait_for(tmp_path / "pid", lambda: process.poll() is None)
        os.killpg(process.pid, signal.SIGHUP)
        time.sleep(1.0)
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=100)
    finally:
        process.kill()
    assert (process.returncode, output) == (75, "saved after SIGTERM\n")


def test_a_killed_command_takes_its_processes_along(tmp_path: Path) -> None:
    """Neither ranks that work on nor a server that waits for them stay behind; the command could not end them."""
    call = f"launch(runtime_workers.sleep_long, {str(tmp_path / 'pid')!r})"
    process = subprocess.Popen([sys.executable, write_script(tmp_path / "stage.py", call)])
    try:
        worker = psutil.Process(_wait_for(tmp_path / "pid", lambda: process.poll() is None))
        server = worker.parent()
        assert server is not None
        assert server.pid != process.pid
    finally:
        process.kill()
    assert process.wait(30) == -signal.SIGKILL
    assert psutil.wait_procs([worker, server], timeout=30)[1] == []


def _wait_for(marker: Path, going_on: Callable[[], bool]) -> int:
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and going_on():
        if marker.is_file() and marker.read_text():
            return int(marker.read_text())
        time.sleep(0.05)
    raise AssertionError("the worker did not start")
