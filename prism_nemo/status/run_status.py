"""What is known of one run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from prism_nemo.status.slurm import Job


@dataclass(frozen=True)
class RunStatus:
    """One run.

    Attributes:
        run: Its directory.
        stage: midtrain or rl; empty where it never started.
        state: running, waiting (its job is queued), finished, stopped (with a checkpoint, on request), killed, failed
            (its job's chain gave up), or unknown.
        step: Newest that was logged.
        steps: Of the whole stage.
        measure: "loss" or "reward".
        value: Newest value of it.
        tokens_per_second: Of the newest logged step.
        seconds_left: Steps left, at the pace of the last ones; None where there is no pace.
        checkpoint: Newest one that was finished.
        checkpoint_step: Its step.
        updated: When it last logged, ISO 8601, in local time.
        restarts: Starts after the first.
        job: Its Slurm job, where there is one.
        next_jobs: Jobs that wait for it.
        log: File of its job.
        problems: What is wrong, each with what to do.
    """

    run: str
    stage: str = ""
    state: str = "unknown"
    step: int = 0
    steps: int | None = None
    measure: str = "loss"
    value: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    checkpoint: str | None = None
    checkpoint_step: int | None = None
    updated: str | None = None
    restarts: int = 0
    job: Job | None = None
    next_jobs: list[Job] = field(default_factory=list)
    log: str | None = None
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """In values that JSON has."""
        return asdict(self)
