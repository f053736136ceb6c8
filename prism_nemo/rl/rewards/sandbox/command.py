"""The command that starts a sandbox: who it runs as, what it sees, what it may use.

From the outside in: a shell that enters the control group, ``setpriv`` that becomes an unprivileged user (as root only:
process limits are not enforced for root), ``bwrap`` that makes the namespaces (or nothing, in process mode), and the
interpreter with `launcher.py`, which sets resource limits.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from prism_nemo.errors import InputError
from prism_nemo.rl.rewards.sandbox.cgroup import ControlGroup
from prism_nemo.rl.rewards.sandbox.interpreter import Interpreter, find_interpreter
from prism_nemo.rl.rewards.sandbox.limits import MODES, SandboxLimits
from prism_nemo.rl.rewards.sandbox.seccomp import filter_program

# The whole environment of a program. A fixed hash seed: the same program gets the same verdict in a resumed run.
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/tmp", "TMPDIR": "/tmp", "PYTHONHASHSEED": "0"}
_FLAGS = ("-s", "-S", "-B")  # no user folder, no `site` (a third of the start), no bytecode files
_LAUNCHER = Path(__file__).with_name("launcher.py").read_text(encoding="utf-8")
_MORE_TASKS = 256
_USERS = 64  # users that one process has in turn
_PRIVILEGE = ("--clear-groups", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all")


@dataclass(frozen=True)
class Recipe:
    """What is the same for all sandboxes of one kind.

    Attributes:
        mode: ``bubblewrap`` or ``process``.
        limits: Of each execution.
        interpreter: That runs the programs.
        seccomp: The filter.
        bwrap: Path of bubblewrap; empty in process mode.
        setpriv: Path of setpriv; empty if this process is not root.
    """

    mode: str
    limits: SandboxLimits
    interpreter: Interpreter
    seccomp: bytes
    bwrap: str
    setpriv: str

    @property
    def environment(self) -> dict[str, str]:
        """Of the command."""
        return dict(_ENVIRONMENT)

    def command(self, user: int, group: ControlGroup, filter_fd: int | None) -> list[str]:
        """The command line.

        Args:
            user: User id to run as, if this process is root.
            group: To enter.
            filter_fd: From which bubblewrap reads the filter.
        """
        command: list[str] = []
        if group.entrance:
            command += ["/bin/sh", "-c", 'echo $$ >"$0" && exec "$@"', group.entrance]
        if self.setpriv:
            command += as_user(self.setpriv, user)
        if self.mode == "bubblewrap":
            command += [self.bwrap, "--seccomp", str(filter_fd), *self._walls(), "--"]
        arguments = self._resources()
        if self.mode == "process":
            arguments.append(f"filter={self.seccomp.hex()}")
        return [*command, self.interpreter.path, *_FLAGS, "-c", _LAUNCHER, *arguments]

    def _walls(self) -> list[str]:
        walls = ["--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
        walls += ["--unshare-cgroup-try", "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL", "--die-with-parent"]
        for path in (self.interpreter.path, *self.interpreter.folders):
            walls += ["--ro-bind", path, path]
        for path in ("/lib", "/lib64"):
            # The dynamic loader is named by the path in the executable, which may lead over one of these links.
            if os.path.islink(path):
                walls += ["--symlink", os.readlink(path), path]
            elif os.path.isdir(path):
                walls += ["--ro-bind", path, path]
        if os.path.islink("/lib64") and os.path.isdir("/usr/lib64"):
            walls += ["--ro-bind", "/usr/lib64", "/usr/lib64"]
        for folder in self.interpreter.folders:
            packages = os.path.join(folder, "site-packages")
            if os.path.isdir(packages):
                walls += ["--tmpfs", packages, "--remount-ro", packages]
        for device in ("/dev/null", "/dev/urandom"):
            walls += ["--dev-bind", device, device]
        # No /proc at all. The root is a tmpfs too, of no fixed size, hence made read-only last.
        walls += ["--size", str(self.limits.file_bytes), "--tmpfs", "/tmp", "--remount-ro", "/"]
        walls += ["--chdir", "/tmp"]
        return walls

    def _processes_of_others(self) -> int:
        """What the kernel counts beside a sandbox's own processes: nothing, if it has a user (or namespace) of its own.

        Without, all processes of this user count, and there may be more at any time.
        """
        return 0 if self.setpriv or self.bwrap else tasks_of_this_user() + _MORE_TASKS

    def _resources(self) -> list[str]:
        limits = self.limits
        return [
            f"RLIMIT_AS={limits.memory_bytes}",
            f"RLIMIT_CPU={math.ceil(limits.cpu_seconds)}",
            f"RLIMIT_NPROC={limits.processes + self._processes_of_others()}",
            f"RLIMIT_FSIZE={limits.file_bytes}",
            f"RLIMIT_NOFILE={limits.open_files}",
            "RLIMIT_CORE=0",
        ]


def tasks_of_this_user() -> int:
    """Processes and threads of this process's user."""
    user, total = os.geteuid(), 0
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):  # it has ended since
            lines = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
            if int(lines["Uid"].split()[1]) == user:
                total += int(lines.get("Threads", 1))
    return total


def make_recipe(mode: str, limits: SandboxLimits) -> Recipe:
    """Find all that sandboxes of a mode need.

    Raises:
        InputError: For an unknown mode, and if something is missing; names the package.
    """
    if mode not in MODES:
        raise InputError(f"rewards.sandbox: '{mode}' is unknown; choose one of {', '.join(MODES)}")
    if not sys.platform.startswith("linux"):
        raise InputError("rewards.sandbox: programs can be run safely on Linux only")
    root = os.geteuid() == 0
    bwrap = shutil.which("bwrap") if mode == "bubblewrap" else ""
    setpriv = shutil.which("setpriv") if root else ""
    if bwrap is None:
        raise InputError(
            "rewards.sandbox=bubblewrap: bubblewrap is not installed; run `apt-get install bubblewrap`, or choose "
            "rewards.sandbox=process, which is weaker (no wall around files and the network)"
        )
    if setpriv is None:
        raise InputError(
            "rewards.sandbox: programs must not run as root, and setpriv, which would prevent it, is not installed; "
            "run `apt-get install util-linux`"
        )
    interpreter = find_interpreter(tuple(as_user(setpriv, user_of(0))) if root else ())
    in_process = mode == "process"
    # Another user cannot signal this process; the same user can.
    seccomp = filter_program(no_leaving=in_process, no_signals=in_process and not root)
    return Recipe(mode, limits, interpreter, seccomp, bwrap, setpriv)


def as_user(setpriv: str, user: int) -> list[str]:
    """The beginning of a command that runs the rest as `user`, without privileges or a way to get any."""
    return [setpriv, f"--reuid={user}", f"--regid={user}", *_PRIVILEGE]


def user_of(number: int) -> int:
    """User id of a sandbox: its own, so that limits of processes are counted apart and none can signal another.

    In turn, not by place: dead processes count for their user until the machine's first process has collected them.

    Args:
        number: How many sandboxes this process has started.
    """
    own = os.getpid() * _USERS + number % _USERS
    try:
        mapped = sum(int(line.split()[2]) for line in Path("/proc/self/uid_map").read_text().splitlines())
    except (OSError, ValueError):
        mapped = 2**16
    # Inside of many containers there are no more than 65,536 users.
    return 100_000 + own if mapped > 2**31 else 20_000 + own % 40_000
