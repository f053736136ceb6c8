"""Runs inside of the sandbox, before the program: sets limits, says that it is ready, reads the program and becomes it.

A byte says that it is ready, and another one that it takes a program: a sandbox that was killed in between (it may have
waited for hours) is not taken for a program that printed nothing.

Its text is handed to the sandbox's interpreter with ``-c``; it imports little, as its start is paid for every
execution. Arguments: ``NAME=VALUE`` for each resource limit; ``filter=HEX`` for a system call filter that nobody
installed yet. Stdin: the number of files, then name and content of each, then the program (each as eight bytes of
length and the bytes); what follows is the program's own stdin.
"""

import builtins
import os
import resource
import sys
import types


def read(size):
    """Exactly `size` bytes of stdin, unbuffered, so that what follows is left for the program."""
    data = b""
    while len(data) < size:
        part = os.read(0, size - len(data))
        if not part:
            os._exit(125)  # whoever wanted a program run has gone
        data += part
    return data


def number():
    """An integer of eight bytes."""
    return int.from_bytes(read(8), "little")


def restrict(program):
    """Do what bubblewrap does elsewhere: end with the caller, gain no privileges, install a system call filter."""
    import ctypes
    import signal

    class Filter(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))

    libc = ctypes.CDLL(None, use_errno=True)
    instructions = Filter(len(program) // 8, program)
    # linux/prctl.h, linux/seccomp.h
    parent_death_signal, set_dumpable, no_new_privileges, set_seccomp, filter_mode = 1, 4, 38, 22, 2
    libc.prctl(parent_death_signal, signal.SIGKILL, 0, 0, 0)
    # A child could read and write this process through /proc: the candidate the examiner, with the tests in it.
    libc.prctl(set_dumpable, 0, 0, 0, 0)
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.prctl(set_seccomp, filter_mode, ctypes.byref(instructions)):
        sys.exit(f"the system call filter could not be installed: {os.strerror(ctypes.get_errno())}")


def prepare():
    """Everything up to the program; returns its code."""
    os.closerange(3, 1024)
    for argument in sys.argv[1:]:
        name, _, value = argument.partition("=")
        if name == "filter":
            restrict(bytes.fromhex(value))
        else:
            # One more second before the hard limit of CPU time, which kills without a name.
            hard = int(value) + (name == "RLIMIT_CPU")
            resource.setrlimit(getattr(resource, name), (int(value), hard))
    for name in ("exit", "quit"):  # `site`, which is not imported, would define them
        setattr(builtins, name, sys.exit)
    sys.argv = ["program.py"]
    os.write(1, b"\x06")
    files = number()
    os.write(1, b"\x06")  # taken: what happens from here on is the program's doing
    for _ in range(files):
        name = read(number()).decode()
        with open(name, "wb") as file:
            file.write(read(number()))
    return compile(read(number()), "program.py", "exec")


code = prepare()
module = sys.modules["__main__"] = types.ModuleType("__main__")
exec(code, module.__dict__)
