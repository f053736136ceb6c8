"""Programs that try to get out, to use everything up, or to stay. Each is contained, and the caller waits no longer
than the time limit. Every guard has a test that fails without it."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import time
from pathlib import Path

import pytest
from sandbox_tools import BOTH, BUBBLEWRAP, ROOT, inside, named, waiting_in

import prism_nemo
from prism_nemo.rl.rewards.sandbox import Sandbox, SandboxLimits
from prism_nemo.rl.rewards.sandbox import sandbox as sandbox_module
from prism_nemo.rl.rewards.sandbox.cgroup import ControlGroup
from prism_nemo.rl.rewards.sandbox.command import user_of
from prism_nemo.rl.rewards.sandbox.seccomp import denied_calls

MIB = 2**20
LIMITS = SandboxLimits(
    wall_seconds=2, cpu_seconds=2, memory_bytes=256 * MIB, processes=12, output_bytes=20_000, file_bytes=4 * MIB
)
GRACE = 5.0  # for killing and collecting on a busy machine; what escapes would run for a minute

# The program's process gets this name, by which what stays is found (linux/prctl.h: PR_SET_NAME).
NAME = f"pn-{os.getpid()}"
MARK = f"""
import ctypes, os, sys, time, errno, signal
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(15, b'{NAME}')
"""


@pytest.fixture(scope="module", params=BOTH)
def sandbox(request):
    with Sandbox(LIMITS, request.param) as opened:
        yield opened


@pytest.fixture(scope="module", params=[BUBBLEWRAP])
def walled(request):
    with Sandbox(LIMITS, request.param) as opened:
        yield opened


def attempt(sandbox, program, **options):
    """Run it; whatever it does, the caller is back in time and nothing of it is left."""
    started = time.monotonic()
    told = sandbox.run(MARK + program, **options)
    assert told.seconds < LIMITS.wall_seconds + GRACE
    assert time.monotonic() - started < LIMITS.wall_seconds + 2 * GRACE
    assert named(NAME) == []
    return told


# What can be seen.


def test_only_the_interpreter_is_there(walled):
    assert attempt(walled, "print(sorted(os.listdir('/')), sorted(os.listdir('/dev')))").stdout == (
        "['dev', 'lib', 'lib64', 'tmp', 'usr'] ['null', 'urandom']\n"
    )


def test_nothing_of_the_host_can_be_read(walled, tmp_path_factory):
    secret = tmp_path_factory.mktemp("open") / "secret"
    secret.write_text("secret")
    os.chmod(secret, 0o644)
    repository = str(Path(prism_nemo.__file__).parent)
    paths = [
        "/etc/shadow",
        "/etc/passwd",
        "/etc",
        "/proc",
        "/proc/1/environ",
        "/proc/self/mem",
        "/proc/sysrq-trigger",
        "/sys",
    ]
    paths += [
        "/root",
        "/home",
        "/var",
        "/run",
        "/mnt",
        "/bin/sh",
        "/usr/bin/env",
        repository,
        str(secret),
        str(Path.home()),
    ]
    assert attempt(walled, f"print([p for p in {paths!r} if os.path.exists(p)])").stdout == "[]\n"


@pytest.mark.parametrize("mode", BOTH)
def test_the_environment_of_the_caller_stays_outside(mode, monkeypatch, tmp_path):
    """Also the variables that make the loader or the interpreter run code."""
    startup = tmp_path / "startup.py"
    startup.write_text("print('startup')")
    for name, value in {
        "SECRET_TOKEN": "secret", "LD_PRELOAD": str(startup), "PYTHONSTARTUP": str(startup),
        "PYTHONPATH": str(tmp_path), "PYTHONINSPECT": "1", "LD_LIBRARY_PATH": str(tmp_path),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    with Sandbox(LIMITS, mode, ready=0) as sandbox:
        told = attempt(sandbox, "print(sorted(os.environ))")
    names = set(eval(told.stdout))
    assert names - {"PWD", "OLDPWD"} == {"HOME", "LANG", "PATH", "PYTHONHASHSEED", "TMPDIR"}
    assert told.stderr == ""


@pytest.mark.parametrize("mode", BOTH)
def test_no_open_file_of_the_caller_is_inherited(mode, tmp_path):
    with open(tmp_path / "open", "w") as file, Sandbox(LIMITS, mode, ready=0) as sandbox:
        os.set_inheritable(file.fileno(), True)
        program = """
found = []
for fd in range(3, 1024):
    try:
        os.fstat(fd)
        found.append(fd)
    except OSError:
        pass
print(found)
"""
        assert attempt(sandbox, program).stdout == "[]\n"


def test_links_lead_nowhere(walled):
    program = """
for number, target in enumerate(["/etc/passwd", "../../../../etc/passwd", "/proc/1/root/etc/passwd", "/"]):
    os.symlink(target, str(number))
    try:
        print(open(str(number) + ("/etc/passwd" if target == "/" else "")).read())
    except OSError as error:
        print(errno.errorcode[error.errno])
"""
    assert attempt(walled, program).stdout == "ENOENT\n" * 4


# What can be changed.


def test_nothing_can_be_written_but_in_its_folder(walled):
    program = """
paths = ["/x", "/usr/x", "/usr/lib/x", "/dev/x", "/lib64/x", sys.executable, os.__file__]
paths += [os.path.dirname(os.__file__) + "/x"]
for path in paths:
    try:
        open(path, "r+" if os.path.exists(path) else "w").close()
        print("wrote", path)
    except OSError as error:
        assert error.errno in (errno.EROFS, errno.EACCES, errno.ENOENT), error
open("/tmp/x", "w").close()
"""
    assert (attempt(walled, program).stdout, attempt(walled, program).stderr) == ("", "")


def test_the_interpreter_lies_on_mounts_that_nobody_can_write_to(walled):
    """Its files may belong to the caller's own user."""
    program = (
        "print([p for p in (sys.executable, os.__file__, '/', '/dev') if not os.statvfs(p).f_flag & os.ST_RDONLY])"
    )
    assert attempt(walled, program).stdout == "[]\n"


@pytest.mark.skipif(not ROOT, reason="only root's files are out of reach without a wall around files")
@pytest.mark.parametrize("mode", ["process"])
def test_as_root_the_files_of_root_are_out_of_reach_without_bubblewrap_too(mode, tmp_path):
    with Sandbox(LIMITS, mode) as sandbox:
        program = f"""
caller = "/proc/{os.getpid()}"
for path, how in (("/etc/shadow", "r"), ("/etc/x", "w"), (caller + "/environ", "r"), (caller + "/mem", "r+")):
    try:
        open(path, how)
        print("opened", path)
    except PermissionError:
        pass
try:
    os.setuid(0)
    print("root")
except PermissionError:
    pass
"""
        assert (attempt(sandbox, program).stdout, attempt(sandbox, program).stderr) == ("", "")


@pytest.mark.parametrize("name", ["mem", "environ", "fd/0"])
def test_the_process_beside_it_cannot_be_read(sandbox, name):
    """The examiner of a program is its parent, of the same user; in process mode there is a /proc to look into."""
    program = f"""
if os.fork() == 0:
    try:
        open("/proc/%d/{name}" % os.getppid(), "rb")
        print("opened")
    except OSError as error:
        print(errno.errorcode[error.errno])
else:
    os.wait()
"""
    assert attempt(sandbox, program).stdout in ("EACCES\n", "ENOENT\n")


def test_the_disk_cannot_be_filled(walled):
    program = """
written = 0
try:
    for number in range(100):
        with open(str(number), "wb", buffering=0) as file:
            written += file.write(bytes(500_000))
except OSError as error:
    print(errno.errorcode[error.errno], written)
"""
    reason, written = attempt(walled, program).stdout.split()
    assert reason == "ENOSPC"
    assert int(written) <= LIMITS.file_bytes


def test_a_file_cannot_grow_beyond_its_limit(sandbox):
    program = f"""
file = open("x", "wb", buffering=0)
try:
    for _ in range(50):
        file.write(bytes(1_000_000))
except OSError:
    pass
print(os.path.getsize("x") <= {LIMITS.file_bytes}, os.path.getsize("x") > 1_000_000)
"""
    assert attempt(sandbox, program).stdout == "True True\n"


def test_the_guards_of_the_kernel_are_on(walled):
    """Seen from outside: namespaces of its own, no privileges, nothing more to be gained, a filter, another user."""
    walled.run("pass")
    (waiting,) = waiting_in(walled)
    waiting._await_ready()  # it has passed all of its walls
    pid = inside(waiting._process.pid)
    status = dict(line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    capabilities = [status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb", "CapBnd")]
    same = [n for n in ("user", "pid", "net", "ipc", "uts", "mnt") if _namespace(pid, n) == _namespace("self", n)]
    user = int(status["Uid"].split()[0])
    os.killpg(waiting._process.pid, 9)
    assert capabilities == ["0" * 16] * 5
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert same == []
    assert user != 0
    assert not ROOT or user in {user_of(number) for number in range(64)}


def _namespace(pid, name):
    return os.readlink(f"/proc/{pid}/ns/{name}")


# What can be used up.


def test_fork_bomb(sandbox):
    """As root, the limit holds only because the user was changed first."""
    program = """
started = 0
try:
    for _ in range(100):
        if os.fork() == 0:
            time.sleep(60)
        started += 1
except OSError as error:
    print(started, errno.errorcode[error.errno], flush=True)
"""
    started, reason = attempt(sandbox, program).stdout.split()
    assert reason == "EAGAIN"
    assert 4 <= int(started) < LIMITS.processes
    attempt(sandbox, "while True:\n    try:\n        os.fork()\n    except OSError:\n        pass")


def test_threads_count_as_processes(sandbox):
    program = """
import threading
try:
    for number in range(100):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
except RuntimeError:
    print(number, flush=True)
os._exit(0)
"""
    assert int(attempt(sandbox, program).stdout) < LIMITS.processes


def test_memory_of_one_process(sandbox):
    told = attempt(sandbox, f"x = bytearray({2 * LIMITS.memory_bytes})")
    assert (told.exit_code, told.killed_by) == (1, "memory")


def test_memory_of_many_processes(walled):
    if walled._groups and walled._groups[0].folder is None:
        pytest.skip("no memory control group can be made here: the limit is that of each process")
    program = f"""
for _ in range(6):
    if os.fork() == 0:
        x = bytearray(b"x") * {LIMITS.memory_bytes // 2}
        time.sleep(60)
        os._exit(0)
for _ in range(6):
    print(os.wait()[1], flush=True)
"""
    told = attempt(walled, program)
    assert told.killed_by in ("memory", "time")
    assert told.stdout.split().count("9") >= 2 or told.killed_by == "memory"  # 6 halves do not fit; some were killed


@pytest.mark.parametrize("mode", [BUBBLEWRAP])
def test_files_count_as_memory_of_the_sandbox(mode):
    """Anonymous files are memory that no limit of a process sees."""
    limits = SandboxLimits(memory_bytes=256 * MIB, file_bytes=16 * MIB, open_files=64)
    program = "for number in range(40):\n    os.write(os.memfd_create('x'), b'x' * 15_000_000)\nprint('all')"
    with Sandbox(limits, mode, ready=0) as sandbox:
        told = sandbox.run(MARK + program)
        if sandbox._groups[0].folder is None:
            pytest.skip("no memory control group can be made here")
    assert (told.killed_by, told.stdout) == ("memory", "")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_endless_output(sandbox, stream):
    told = attempt(sandbox, f"while True:\n    sys.{stream}.write('x' * 1000)")
    assert told.killed_by == "output"
    assert len(getattr(told, stream)) <= LIMITS.output_bytes


def test_long_sleep(sandbox):
    told = attempt(sandbox, "time.sleep(60)")
    assert (told.exit_code, told.killed_by) == (None, "time")
    assert told.seconds >= LIMITS.wall_seconds


def test_sleep_that_ignores_signals(sandbox):
    program = """
for number in range(1, 32):
    if number not in (9, 19):
        signal.signal(number, signal.SIG_IGN)
time.sleep(60)
"""
    assert attempt(sandbox, program).killed_by == "time"


@pytest.mark.parametrize("mode", BOTH)
def test_computing_without_end(mode):
    with Sandbox(SandboxLimits(wall_seconds=30, cpu_seconds=1), mode, ready=0) as sandbox:
        assert sandbox.run("while True: pass").killed_by == "cpu"
        # Deaf to the soft limit, it meets the hard one.
        told = sandbox.run("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass")
        assert told.killed_by == "cpu"


def test_closed_pipes_do_not_end_the_watch(sandbox):
    assert attempt(sandbox, "for fd in range(3):\n    os.close(fd)\ntime.sleep(60)").killed_by == "time"


def test_deep_recursion(sandbox):
    program = "sys.setrecursionlimit(10**9)\nclass C:\n    __repr__ = lambda s: repr(s)\nrepr(C())"
    assert attempt(sandbox, program).exit_code not in (0, None)


# Who can be reached.


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK", "AF_PACKET"])
def test_no_sockets(sandbox, family):
    program = f"""
import socket
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
    try:
        socket.socket(socket.{family}, kind)
        print("opened")
    except OSError as error:
        print(errno.errorcode[error.errno])
"""
    assert attempt(sandbox, program).stdout == "EPERM\n" * 3


def test_a_server_of_this_machine_is_not_reached(sandbox):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        attempt(sandbox, f"import socket\nsocket.create_connection({server.getsockname()!r}, timeout=1)")
        with pytest.raises(TimeoutError):
            server.accept()


def test_calls_that_are_denied(sandbox):
    """With arguments for which most of them would answer otherwise, if they were let through."""
    column = 0 if platform.machine() == "x86_64" else 1
    calls = {name: numbers[column] for name, numbers in denied_calls().items() if numbers[column] is not None}
    program = f"""
for name, number in {calls!r}.items():
    result = libc.syscall(number, 0, 0, 0, 0, 0, 0)
    if (result, ctypes.get_errno()) != (-1, errno.EPERM):
        print(name, result, errno.errorcode.get(ctypes.get_errno()))
"""
    assert attempt(sandbox, program).stdout == ""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers below are those of x86_64")
def test_no_new_namespaces_and_no_other_abi(sandbox):
    program = """
for flags in (0x10000000, 0x00020000, 0x20000000, 0x40000000, 0x02000000, 0x04000000, 0x08000000):
    result = libc.syscall(56, flags | 17, 0, 0, 0, 0)
    if result == 0:
        os._exit(0)
    print(result, errno.errorcode[ctypes.get_errno()])
print(libc.syscall(435, 0, 0), errno.errorcode[ctypes.get_errno()])
print(libc.syscall(0x40000000 + 39), errno.errorcode[ctypes.get_errno()])
"""
    assert attempt(sandbox, program).stdout == "-1 EPERM\n" * 7 + "-1 ENOSYS\n-1 EPERM\n"


def test_devices_and_other_users_cannot_be_had(sandbox):
    program = """
for action in (lambda: os.mknod("disk", 0o60600, os.makedev(8, 0)), lambda: os.setuid(0), lambda: os.setgroups([0])):
    try:
        action()
        print("done")
    except OSError as error:
        assert error.errno in (errno.EPERM, errno.EINVAL), error
"""
    told = attempt(sandbox, program)
    assert (told.stdout, told.stderr) == ("", "")


@pytest.mark.parametrize("mode", BOTH)
@pytest.mark.parametrize("target", ["-1", "os.getppid()", "1", "0", "caller"])
def test_no_signal_reaches_the_caller_or_another_sandbox(mode, target):
    # The id itself would name the test differently in every process of a parallel run.
    target = str(os.getpid()) if target == "caller" else target
    with Sandbox(LIMITS, mode) as sandbox:
        sandbox.run("pass")
        assert len(waiting_in(sandbox)) == 1
        witness = subprocess.Popen(["sleep", "60"])
        try:
            # The waiting one takes the program; the next is started while it runs, and must outlive it.
            program = f"import os, signal, time\ntime.sleep(0.3)\nos.kill({target}, signal.SIGKILL)"
            sandbox.run(program)
            assert witness.poll() is None
            assert all(other._process.poll() is None for other in waiting_in(sandbox))
        finally:
            witness.kill()
            witness.wait()


# Who can stay.


@pytest.mark.parametrize("leave", ["os.setsid()", "os.setpgid(0, 0)", "pass"])
def test_no_child_outlives_its_program(sandbox, leave):
    """A daemon: two forks, a session of its own, all pipes closed."""
    program = f"""
def leave():
    try:
        {leave}
    except OSError:
        pass
if os.fork() == 0:
    leave()
    if os.fork() == 0:
        leave()
        for fd in range(3):
            os.close(fd)
        time.sleep(60)
    os._exit(0)
os.wait()
print("left")
"""
    told = attempt(sandbox, program)
    assert (told.stdout, told.killed_by) == ("left\n", None)


def test_no_child_outlives_its_program_without_control_groups(monkeypatch):
    """Then it is the process group that is killed, and process mode must not let a program leave it."""
    monkeypatch.setattr(sandbox_module, "make_group", lambda number, memory_bytes: ControlGroup(None))
    program = """
if os.fork() == 0:
    try:
        os.setsid()
    except OSError:
        pass
    if os.fork() == 0:
        time.sleep(60)
    os._exit(0)
os.wait()
"""
    with Sandbox(LIMITS, "process", ready=0) as sandbox:
        assert attempt(sandbox, program).exit_code == 0


def test_a_child_that_holds_the_output_does_not_delay_the_result(sandbox):
    told = attempt(sandbox, "if os.fork() == 0:\n    time.sleep(60)\nprint('left', flush=True)")
    assert (told.stdout, told.exit_code, told.killed_by) == ("left\n", 0, None)
    assert told.seconds < LIMITS.wall_seconds


@pytest.mark.parametrize("mode", BOTH)
def test_sandboxes_end_with_a_caller_that_was_killed(mode, tmp_path):
    """A worker process that is killed cannot clean up; what it started ends by itself."""
    script = tmp_path / "worker.py"
    program = MARK + "time.sleep(60)"
    script.write_text(
        "import sys, threading, time\n"
        "from prism_nemo.rl.rewards.sandbox import Sandbox, SandboxLimits\n"
        f"sandbox = Sandbox(SandboxLimits(wall_seconds=60), {mode!r})\n"
        "print('ready', flush=True)\n"
        f"sandbox.run({program!r})\n"
    )
    worker = subprocess.Popen(
        [os.sys.executable, str(script)], stdout=subprocess.PIPE, cwd=Path(prism_nemo.__file__).parents[1]
    )
    assert worker.stdout.readline() == b"ready\n"
    deadline = time.monotonic() + 20
    while not named(NAME, 0) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert named(NAME, 0)
    worker.kill()
    worker.wait()
    worker.stdout.close()
    assert named(NAME, 5) == []
