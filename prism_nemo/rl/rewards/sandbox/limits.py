"""What a sandboxed program may use, and what is known about it afterwards."""

from __future__ import annotations

from dataclasses import dataclass

MODES = ("bubblewrap", "process")
MIB = 2**20


@dataclass(frozen=True)
class SandboxLimits:
    """Limits of one execution. Defaults suit the small programs that answer programming questions.

    Attributes:
        wall_seconds: From the moment the program is handed over; the start of the sandbox does not count.
        cpu_seconds: Of each process (RLIMIT_CPU); whole seconds, rounded up.
        memory_bytes: Address space of each process (RLIMIT_AS) and, where this process may make memory cgroups, memory
            of all processes and files of the sandbox together.
        processes: Processes and threads at a time.
        output_bytes: Kept of stdout and of stderr; a program that writes more is killed.
        file_bytes: Size of the only writable folder (a tmpfs), and of any one file.
        open_files: File descriptors of each process.
        start_seconds: How long the sandbox itself may take to start before that is an error.
    """

    wall_seconds: float = 8.0
    cpu_seconds: float = 8.0
    memory_bytes: int = 512 * MIB
    processes: int = 16
    output_bytes: int = 1 * MIB
    file_bytes: int = 16 * MIB
    open_files: int = 64
    start_seconds: float = 30.0


@dataclass(frozen=True)
class Execution:
    """How a program ended.

    Attributes:
        exit_code: Of the program; None if it was killed from outside. 128 + N after signal N.
        stdout: What was kept of it, decoded as UTF-8 with replacement characters.
        stderr: The same.
        seconds: Wall time from handing the program over to its end.
        killed_by: ``time``, ``cpu``, ``memory``, ``output`` or ``signal``; None if it ended by itself.
    """

    exit_code: int | None
    stdout: str
    stderr: str
    seconds: float
    killed_by: str | None
