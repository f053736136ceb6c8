"""The program of a reward worker: jobs come in on a pipe, verdicts go out on another. See `pool.py`."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import sys
from typing import IO

from prism_nemo.parent import end_with_parent
from prism_nemo.rl.rewards.judge import verdict_of
from prism_nemo.rl.rewards.pool import HEADER


def _prepare(parent: int, memory_gb: float) -> tuple[IO[bytes], IO[bytes]]:
    """Limits, and pipes that a verifier which prints or reads cannot disturb."""
    # A trainer that was killed cannot tell its workers, and one that computes for ever does not look at its pipe.
    end_with_parent(parent)
    size = int(memory_gb * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    jobs, verdicts = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-c is the trainer's to handle
    return jobs, verdicts


def _say(verdicts: IO[bytes], message: object) -> None:
    data = pickle.dumps(message)
    verdicts.write(HEADER.pack(len(data)) + data)
    verdicts.flush()


def main() -> None:
    """Work until the pipe of jobs is closed."""
    jobs, verdicts = _prepare(int(sys.argv[1]), float(sys.argv[2]))
    verifiers = {}
    while True:
        header = jobs.read(HEADER.size)
        if len(header) < HEADER.size:
            return
        number, verifier, problem, answer = pickle.loads(jobs.read(HEADER.unpack(header)[0]))
        if verifier is not None:
            verifiers[number] = verifier
            prepare = getattr(verifier, "prepare", None)
            if prepare is not None:
                prepare()
            _say(verdicts, "ready")
        _say(verdicts, verdict_of(verifiers[number], problem, answer))


if __name__ == "__main__":
    main()
