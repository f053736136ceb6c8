"""What Slurm says about jobs: `squeue` and `scontrol` only, so accounting may be off, and Slurm may be absent."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass

_FIELDS = "%i|%j|%T|%L|%E|%N|%r"
_TIMEOUT = 20.0


@dataclass(frozen=True)
class Job:
    """One job that waits or runs, or ended not long ago.

    Attributes:
        id: Number, with the index of an array's task.
        name: Of the job.
        state: Slurm's word, such as RUNNING or PENDING.
        seconds_left: Until its time limit; None where it has none or does not run.
        after: Numbers of the jobs that it waits for.
        nodes: That it runs on.
        reason: Why it waits or how it ended.
    """

    id: str
    name: str
    state: str
    seconds_left: float | None = None
    after: tuple[str, ...] = ()
    nodes: str = ""
    reason: str = ""


def queue() -> list[Job] | None:
    """The user's jobs; None where Slurm is absent or does not answer."""
    text = _ask("squeue", "--me", "--noheader", f"--format={_FIELDS}")
    if text is None:
        return None
    return [_parse(line) for line in text.splitlines() if line.count("|") >= 6]


def look_up(number: str) -> Job | None:
    """A job that `squeue` may no longer list; Slurm forgets it some minutes after its end (MinJobAge)."""
    text = _ask("scontrol", "--oneliner", "show", "job", number)
    if text is None:
        return None
    found = dict(re.findall(r"(\w+)=(\S*)", text))
    if "JobState" not in found:
        return None
    reason = found.get("Reason", "None")
    ended = f"exit code {found.get('ExitCode', '?')}" if reason in ("None", "") else reason
    return Job(number, found.get("JobName", ""), found["JobState"], nodes=found.get("NodeList", ""), reason=ended)


def seconds_of(text: str) -> float | None:
    """Seconds of Slurm's ``[days-]hours:minutes:seconds``, ``minutes:seconds``; None for words such as UNLIMITED."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text.strip())
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def _parse(line: str) -> Job:
    # A name may hold the separator; the other fields cannot.
    number, rest = line.split("|", 1)
    name, state, left, dependency, nodes, reason = rest.rsplit("|", 5)
    after = tuple(re.findall(r"after\w*:(\d+)", dependency))
    return Job(number, name, state, seconds_of(left), after, nodes, "" if reason == "None" else reason)


def _ask(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
