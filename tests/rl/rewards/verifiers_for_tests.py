"""Verifiers that misbehave, for the tests of the judge; worker processes import this module."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np

from prism_nemo.rl.rewards.task import Problem
from prism_nemo.rl.rewards.verifier import Verifier


class Obedient(Verifier):
    """Does what the answer says, in a worker."""

    name, isolated = "obedient", True

    def verify(self, problem: Problem, answer: str) -> float:
        """See `Verifier`."""
        word, _, rest = answer.partition(" ")
        if word == "hang":
            while True:  # never returns to the interpreter's signal handlers for long enough to be asked kindly
                sum(range(1000))
        if word == "hang-in-c":
            signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP})
            time.sleep(1000)
        if word == "exit":
            os._exit(int(rest))
        if word == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if word == "eat":
            return float(len(bytearray(int(rest) * 2**30)) > 0)
        if word == "raise":
            raise ValueError(rest)
        if word == "mute":
            raise Mute
        if word == "leave":
            sys.exit(0)
        if word == "float32":
            return np.float32(rest)  # type: ignore[return-value]
        if word == "stop":  # the worker answers, and then reads no more
            subprocess.Popen(["sh", "-c", f"sleep 0.2; kill -STOP {os.getpid()}"], start_new_session=True)
            return 1.0
        if word == "die":  # after it has answered
            subprocess.Popen(["sh", "-c", f"sleep 0.2; kill -KILL {os.getpid()}"], start_new_session=True)
            return 1.0
        if word == "say":
            print(rest)
            sys.stdout.flush()
            os.write(1, b"x" * 10000)
            return 1.0
        if word == "child":
            with open(rest, "w") as file:
                file.write(str(subprocess.Popen(["sleep", "600"]).pid))
            while True:
                time.sleep(1)
        if word == "pid":
            with open(rest, "a") as file:
                file.write(f"{os.getpid()}\n")
            return 1.0
        return float(answer) if answer not in ("none",) else None  # type: ignore[return-value]


class InProcess(Obedient):
    """The same in the trainer's own process."""

    name, isolated = "in-process", False


class Unloadable(Verifier):
    """Cannot be set up in a worker."""

    name, isolated = "unloadable", True

    def prepare(self) -> None:
        """Ends the worker."""
        os._exit(3)

    def verify(self, problem: Problem, answer: str) -> float:
        """See `Verifier`."""
        return 1.0


class Unpicklable(Verifier):
    """Holds something that no other process can be given."""

    name, isolated = "unpicklable", True

    def __init__(self) -> None:
        self.rule = lambda answer: 1.0

    def verify(self, problem: Problem, answer: str) -> float:
        """See `Verifier`."""
        return self.rule(answer)


class NeverReady(Verifier):
    """Its set-up does not end."""

    name, isolated = "never-ready", True

    def prepare(self) -> None:
        """Sleeps."""
        time.sleep(1000)

    def verify(self, problem: Problem, answer: str) -> float:
        """See `Verifier`."""
        return 1.0


class Mute(Exception):
    """Fails to say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("no words")
