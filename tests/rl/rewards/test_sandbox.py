"""The sandbox as a caller sees it: results, limits, the pool, and errors before work starts."""

from __future__ import annotations

import dataclasses
import os
import select
import signal
import threading
import time

import pytest
from sandbox_tools import BOTH, BUBBLEWRAP, ROOT, waiting_in

from prism_nemo.errors import InputError, PrismError
from prism_nemo.rl.rewards.sandbox import Sandbox, SandboxLimits, command
from prism_nemo.rl.rewards.sandbox.cgroup import make_group, sweep
from prism_nemo.runtime import doctor

LIMITS = SandboxLimits(wall_seconds=10)


@pytest.fixture(scope="module", params=BOTH)
def sandbox(request):
    with Sandbox(LIMITS, request.param) as opened:
        yield opened


def test_a_program_reads_its_input_and_files_and_writes_to_its_folder(sandbox):
    program = (
        "import os\nprint(input()[::-1], open('data.txt').read())\nopen('out', 'w').write('x')\nprint(os.listdir())"
    )
    told = sandbox.run(program, "hello\n", {"data.txt": "täxt"})
    lines = told.stdout.split("\n")
    assert lines[0] == "olleh täxt"
    assert sorted(eval(lines[1])) == ["data.txt", "out"]
    assert (told.exit_code, told.killed_by, told.stderr) == (0, None, "")


@pytest.mark.parametrize(
    ("program", "exit_code", "killed_by"),
    [
        ("exit(3)", 3, None),
        ("quit()", 0, None),
        ("import os; os._exit(9)", 9, None),
        ("1 / 0", 1, None),
        ("def broken(:", 1, None),
        ("import sys; sys.exit('told')", 1, None),
        ("x = bytearray(10**10)", 1, "memory"),
        ("import ctypes; ctypes.string_at(0)", 139, "signal"),
    ],
)
def test_how_a_program_ended(sandbox, program, exit_code, killed_by):
    told = sandbox.run(program)
    assert (told.exit_code, told.killed_by) == (exit_code, killed_by)


def test_ordinary_programs_run(sandbox):
    """What a filter that is too strict would break, and a right answer with it."""
    program = """
import asyncio, collections, dataclasses, heapq, itertools, pickle, random, re, sys, threading
from concurrent.futures import ThreadPoolExecutor
async def main():
    await asyncio.sleep(0.001)
    return 5
print(asyncio.run(main()))
@dataclasses.dataclass
class Point:
    x: int
print(pickle.loads(pickle.dumps(Point(2))))
with ThreadPoolExecutor(2) as pool:
    print(sum(pool.map(abs, [-1, -2])))
print(__name__, sys.argv)
threading.stack_size(64 * 2**20)
thread = threading.Thread(target=lambda: print("thread"))
thread.start()
thread.join()
"""
    told = sandbox.run(program)
    assert told.stderr == ""
    assert told.stdout.split("\n") == ["5", "Point(x=2)", "3", "__main__ ['program.py']", "thread", ""]


def test_each_execution_is_new(sandbox):
    first = sandbox.run("open('left', 'w').write('x'); import builtins; builtins.left = 1; print('done')")
    second = sandbox.run("import os, builtins; print(os.listdir(), hasattr(builtins, 'left'), os.getppid())")
    assert first.stdout == "done\n"
    assert second.stdout.startswith("[] False")


def test_the_same_program_gives_the_same_output(sandbox):
    """Order in sets depends on the hash seed; a resumed run must score as the first did."""
    program = "print({'a', 'b', 'c', 'd', 'e', 'f', 'g'})"
    assert len({sandbox.run(program).stdout for _ in range(4)}) == 1


def test_input_that_is_not_read_does_not_block(sandbox):
    assert sandbox.run("print('done')", "x" * 3_000_000).stdout == "done\n"


def test_large_input_and_output_pass_through_whole(sandbox):
    told = sandbox.run("import sys; sys.stdout.write(sys.stdin.read())", "0123456789" * 50_000)
    assert told.stdout == "0123456789" * 50_000


def test_text_that_is_not_unicode_is_run_nonetheless(sandbox):
    """A model's tokens may decode to lone surrogates, and a program may print any bytes."""
    assert sandbox.run("print('a\ud800b')").stdout == "a?b\n"
    assert sandbox.run("import sys; sys.stdout.buffer.write(b'a\\xff')").stdout == "a\ufffd"


def test_threads_may_share_a_sandbox(sandbox):
    outputs: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda i=i: outputs.__setitem__(i, sandbox.run(f"print({i})").stdout)) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outputs == {i: f"{i}\n" for i in range(4)}


@pytest.mark.parametrize("ready", [True, False])
@pytest.mark.parametrize("mode", BOTH)
def test_a_sandbox_lost_while_it_waited_is_replaced(mode, ready):
    """Also one that had said that it is ready: its program would seem to have printed nothing, and score 0."""
    with Sandbox(LIMITS, mode) as sandbox:
        sandbox.run("pass")
        (waiting,) = waiting_in(sandbox)
        if ready:
            select.select([waiting._process.stdout], [], [], 30)
        os.killpg(waiting._process.pid, signal.SIGKILL)
        assert sandbox.run("print(1)").stdout == "1\n"


@pytest.mark.parametrize("mode", BOTH)
def test_a_program_survives_the_end_of_the_thread_that_ran_the_one_before(mode):
    """The kernel kills a sandbox with the thread that started it; a program in it would end without output or error."""
    with Sandbox(LIMITS, mode) as sandbox:
        ended = threading.Event()

        def first():
            sandbox.run("pass")
            ended.wait(20)

        thread = threading.Thread(target=first)
        thread.start()
        while not waiting_in(sandbox):
            time.sleep(0.01)
        timer = threading.Timer(0.3, ended.set)
        timer.start()
        told = sandbox.run("import time; time.sleep(1); print(1)")
        thread.join()
        assert (told.stdout, told.exit_code) == ("1\n", 0)
        sandbox.run("pass")
        assert len(waiting_in(sandbox)) == 1  # what the other thread had started is gone


@pytest.mark.parametrize("mode", BOTH)
def test_one_process_may_have_several(mode):
    """Closing one once removed the control groups of the other."""
    with Sandbox(LIMITS, mode) as first:
        assert first.run("print(1)").stdout == "1\n"
        with Sandbox(LIMITS, mode) as second:
            assert second.run("print(2)").stdout == "2\n"
            assert len({process.user for process in waiting_in(first) + waiting_in(second)}) == 2
        assert first.run("print(3)").stdout == "3\n"
        assert first.run("print(4)").stdout == "4\n"


@pytest.mark.parametrize("mode", BOTH)
def test_closing_leaves_no_process_and_no_folder(mode, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Sandbox(LIMITS, mode, ready=2) as sandbox:
        sandbox.run("pass")
        processes = [process._process for process in waiting_in(sandbox)]
        groups = [group.folder for group in sandbox._groups if group.folder]
        assert len(processes) == 2
        assert all(process.poll() is None for process in processes)
    assert all(process.poll() is not None for process in processes)
    assert not any(folder.exists() for folder in groups)
    assert not list(tmp_path.iterdir())


def test_process_mode_says_what_it_does_not_protect_from(caplog):
    with Sandbox(LIMITS, "process"):
        pass
    assert "weaker than bubblewrap" in caplog.text
    assert "read every file" in caplog.text


def test_missing_bubblewrap_is_refused_with_the_package_to_install(monkeypatch):
    monkeypatch.setattr(command.shutil, "which", lambda name: None if name == "bwrap" else f"/usr/bin/{name}")
    with pytest.raises(InputError, match=r"apt-get install bubblewrap.*rewards.sandbox=process"):
        Sandbox()


def test_missing_setpriv_is_refused_as_root(monkeypatch):
    monkeypatch.setattr(command.shutil, "which", lambda name: None)
    monkeypatch.setattr(command.os, "geteuid", lambda: 0)
    with pytest.raises(InputError, match=r"must not run as root.*util-linux"):
        Sandbox(mode="process")


def test_without_a_user_of_its_own_the_limit_of_processes_is_beyond_those_that_run():
    """The kernel counts all of the user's: with a plain limit no program could start a process or thread."""
    recipe = command.make_recipe("process", LIMITS)
    for setpriv, least in (("/usr/bin/setpriv", 0), ("", command.tasks_of_this_user())):
        (limit,) = [a for a in dataclasses.replace(recipe, setpriv=setpriv)._resources() if "NPROC" in a]
        beyond = int(limit.partition("=")[2]) - LIMITS.processes
        assert (beyond == 0) if setpriv else (beyond > least > 0)


def test_an_unknown_mode_is_refused():
    with pytest.raises(InputError, match="'docker' is unknown; choose one of bubblewrap, process"):
        Sandbox(mode="docker")


@pytest.mark.parametrize("mode", BOTH)
def test_a_sandbox_in_which_nothing_works_is_refused_before_work(mode):
    with (
        Sandbox(SandboxLimits(processes=1, wall_seconds=10), mode) as sandbox,
        pytest.raises(InputError, match="harmless"),
    ):
        sandbox.check()


@pytest.mark.parametrize("mode", [BUBBLEWRAP])
def test_a_sandbox_that_cannot_start_is_an_error_and_not_a_verdict(mode, tmp_path):
    with Sandbox(LIMITS, mode) as sandbox:
        object.__setattr__(sandbox._recipe.interpreter, "path", str(tmp_path / "nowhere"))
        try:
            with pytest.raises(PrismError, match=r"could not be started: bwrap.*nowhere"):
                sandbox.run("print(1)")
        finally:
            command.find_interpreter.cache_clear()


def test_file_names_stay_in_the_folder():
    with Sandbox(LIMITS, "process", ready=0) as sandbox, pytest.raises(InputError, match="no plain file name"):
        sandbox.run("pass", files={"../outside": "x"})


def test_folders_of_processes_that_were_killed_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    process = os.fork()
    if process == 0:
        os._exit(0)
    os.waitpid(process, 0)
    for owner in (process, os.getpid()):
        (tmp_path / f"prism-nemo-sandbox-{owner}-x").mkdir()
    with Sandbox(LIMITS, "process", ready=0):
        assert [f.name for f in tmp_path.iterdir()] == [f"prism-nemo-sandbox-{os.getpid()}-x"]


@pytest.mark.skipif(not ROOT, reason="control groups are made as root")
def test_groups_of_processes_that_were_killed_are_removed():
    group = make_group(7, 2**28)
    if group.folder is None:
        pytest.skip("no memory control group can be made here")
    process = os.fork()
    if process == 0:
        os._exit(0)
    os.waitpid(process, 0)
    left = group.folder.with_name(f"prism-nemo-{process}-0")
    left.mkdir()
    sweep()
    assert not left.exists()
    assert group.folder.exists()  # its process lives
    group.remove()


@pytest.mark.parametrize("mode", BOTH)
def test_doctor_names_the_sandbox_that_would_be_used(mode, monkeypatch):
    if mode == "process":
        monkeypatch.setattr(command.shutil, "which", lambda name: None if name == "bwrap" else f"/usr/bin/{name}")
    row = doctor._sandbox()
    assert row.kernel.startswith(mode)
    assert ("apt-get install bubblewrap" in row.because) == (mode == "process")
