"""Checkpoints of a run evaluated in a process of their own while training goes on.

One checkpoint at a time, always the newest that is due; those that were saved meanwhile are passed over. What goes
wrong is a warning, never the end of training. The process ends with the run, also when the run is killed.

    RUN/evaluations/step_00000500.json   what was found; the run's metrics get the same, under the step
    RUN/evaluations/step_00000500.log    what the process said
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prism_nemo.checkpoint.native import find_latest
from prism_nemo.config import InTrainingConfig, ParallelConfig
from prism_nemo.evaluation.in_training.evaluator import steps_evaluated, told
from prism_nemo.evaluation.in_training.suite import Suite
from prism_nemo.parent import end_with_parent
from prism_nemo.run import RunDirectory, write_json

FOLDER = "evaluations"
# What tells a process its place in a group that this one must not join.
_GROUP = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_")
_PAUSE = 0.2
_GRACE = 5.0


class CheckpointEvaluation:
    """Held by the process that writes the run's metrics.

    Args:
        config: When, and on which devices.
        suite: What is asked.
        run: Whose checkpoints.
        step: That the run goes on from.
        say: Told what was found and what failed.
    """

    def __init__(
        self, config: InTrainingConfig, suite: Suite, run: RunDirectory, step: int, say: Callable[[str], None]
    ) -> None:
        self._config, self._suite, self._run, self._say = config, suite, run, say
        self._folder = run.path / FOLDER
        self._folder.mkdir(parents=True, exist_ok=True)
        self._child: subprocess.Popen[bytes] | None = None
        self._step = self._last = 0
        self.rewind(step)

    def rewind(self, step: int) -> None:
        """Forget what was found after a step: the run comes to those steps again, on another way."""
        if self._child is not None and self._step > step:
            self._end()
        self._last = 0
        logged = steps_evaluated(self._run)
        for file in sorted(self._folder.glob("step_*.json")):
            found = int(file.stem.removeprefix("step_"))
            if found > step:
                file.unlink()
                continue
            self._last = max(self._last, found)
            if found not in logged:  # the run was ended between the result and its line
                self._log(found)

    def poll(self, done: bool = False) -> None:
        """Take in what has been found, and begin with the next checkpoint that is due.

        Args:
            done: Training is over: the newest checkpoint is due, whatever the interval.
        """
        if self._child is not None:
            if self._child.poll() is None:
                return
            self._collect(self._child.returncode)
        latest = find_latest(self._run.checkpoints)
        step = 0 if latest is None else int(latest.name.removeprefix("step_"))
        every = self._config.every
        if latest is not None and (step // every > self._last // every or (done and step > self._last)):
            self._begin(latest, step)

    def finish(self, alive: Callable[[str], None]) -> None:
        """Wait for the newest checkpoint's evaluation, for a limited time.

        Args:
            alive: Told that the wait is meant.
        """
        deadline = time.monotonic() + self._config.wait_seconds
        self.poll(done=True)
        while self._child is not None and time.monotonic() < deadline:
            alive("the evaluation of the last checkpoint")
            time.sleep(_PAUSE)
            self.poll(done=True)

    def close(self) -> None:
        """End what is still going on."""
        if self._child is None:
            return
        if self._child.poll() is None:
            self._say(f"the evaluation of step {self._step} was not finished; `prism-nemo eval` can do it")
            self._end()
        else:
            self._collect(self._child.returncode)

    def _file(self, step: int, kind: str) -> Path:
        return self._folder / f"step_{step:08d}.{kind}"

    def _begin(self, checkpoint: Path, step: int) -> None:
        self._last = self._step = step  # also if it cannot be started: it is not tried at every step
        request = {
            "checkpoint": str(checkpoint.absolute()),
            "suite": asdict(self._suite),
            "result": str(self._file(step, "json").absolute()),
            "step": step,
            "parent": os.getpid(),
        }
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_GROUP)}
        environment["CUDA_VISIBLE_DEVICES"] = self._config.process_devices
        try:
            with self._file(step, "log").open("wb") as log:
                self._child = subprocess.Popen(
                    [sys.executable, "-m", "prism_nemo.evaluation.in_training.process", json.dumps(request)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,  # a Ctrl-C is for the run, which ends this process itself
                )
        except OSError as error:
            self._say(f"step {step}: cannot be evaluated: {error}")

    def _collect(self, code: int) -> None:
        self._child = None
        if code == 0 and self._file(self._step, "json").is_file():
            self._log(self._step)
            return
        log = self._file(self._step, "log")
        lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
        said = next((line for line in reversed(lines) if line.strip()), "without a word")
        self._say(f"step {self._step}: its evaluation failed (exit code {code}): {said} ({log})")

    def _log(self, step: int) -> None:
        try:
            values: dict[str, Any] = json.loads(self._file(step, "json").read_text())
        except (OSError, ValueError) as error:
            self._say(f"step {step}: its evaluation cannot be read: {error}")
            return
        self._run.log({"step": step, **values})
        self._say(told(step, values))

    def _end(self) -> None:
        if self._child is None:
            return
        self._child.terminate()
        try:
            self._child.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child = None


def evaluate_request(request: dict[str, Any]) -> dict[str, float]:
    """Evaluate one checkpoint in this process, alone.

    Args:
        request: ``checkpoint`` and ``suite``.

    Returns:
        As `SmallEvaluation.measure`, with ``eval_seconds``.
    """
    from prism_nemo.checkpoint.native import load, read_architecture
    from prism_nemo.evaluation.in_training.evaluator import by_itself
    from prism_nemo.models.build import build_model
    from prism_nemo.runtime import start, stop

    began = time.perf_counter()
    checkpoint = Path(request["checkpoint"])
    model = build_model(read_architecture(checkpoint), start(ParallelConfig(), seed=0))
    load(checkpoint, model)
    model.eval()
    values = by_itself(Suite(**request["suite"]), model).measure()
    stop()
    return {**values, "eval_seconds": time.perf_counter() - began}


def main() -> None:
    """Run as ``python -m``, with the request as the only argument."""
    request = json.loads(sys.argv[1])
    end_with_parent(request["parent"])  # a killed run cannot end it
    os.nice(10)  # training comes first
    write_json(Path(request["result"]), evaluate_request(request))


if __name__ == "__main__":
    main()
