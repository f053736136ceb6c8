"""The Python interpreter for untrusted programs: one that an unprivileged user can run, and the files that it needs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache

from prism_nemo.errors import InputError

# Asks an interpreter where its standard library is, and the kernel which shared libraries are mapped.
_QUESTION = """
import json, math, sys, sysconfig
maps = [line.split()[-1] for line in open("/proc/self/maps") if ".so" in line]
paths = sysconfig.get_paths()
print(json.dumps([sys.executable, [paths["stdlib"], paths["platstdlib"]], maps, sys.version_info[:2]]))
"""


@dataclass(frozen=True)
class Interpreter:
    """An interpreter.

    Attributes:
        path: The executable, with links resolved.
        folders: Its standard library, and the folders of the shared libraries that it loads.
    """

    path: str
    folders: tuple[str, ...]


@lru_cache
def find_interpreter(as_user: tuple[str, ...]) -> Interpreter:
    """The first interpreter that can be run: the one that runs this, the system's, the first in the path.

    Args:
        as_user: The beginning of a command that runs the rest as the unprivileged user; empty for this user.

    Raises:
        InputError: If none can be.
    """
    own, found = os.path.realpath(sys.executable), shutil.which("python3")
    candidates = [own, "/usr/bin/python3", "/usr/local/bin/python3", *([found] if found else [])]
    problems = []
    for candidate in dict.fromkeys(os.path.realpath(path) for path in candidates):
        # Over `env`: the first exec after the change of user still has root's right to search any folder.
        command = [*as_user, "/usr/bin/env", candidate, "-I", "-S", "-c", _QUESTION]
        try:
            told = subprocess.run(command, capture_output=True, text=True, timeout=30, env={}, cwd="/", check=True)
            path, library, maps, version = json.loads(told.stdout)
        except subprocess.CalledProcessError as error:
            problems.append(f"{candidate}: {error.stderr.strip()[-120:]}")
            continue
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            problems.append(f"{candidate}: {error}")
            continue
        if tuple(version) < (3, 9):
            problems.append(f"{candidate}: Python {version[0]}.{version[1]} is too old")
            continue
        folders = {*library, *(os.path.dirname(os.path.realpath(name)) for name in maps)}
        outer = {f for f in folders if not any(f != other and f.startswith(other + "/") for other in folders)}
        return Interpreter(os.path.realpath(path), tuple(sorted(outer)))
    raise InputError(
        "rewards.sandbox: no Python interpreter that an unprivileged user can run (apt-get install python3): "
        + "; ".join(problems)
    )
