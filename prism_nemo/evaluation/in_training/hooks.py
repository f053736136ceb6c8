"""The evaluation of a stage as its loop sees it: asked after every step, silent where nothing is due."""

from __future__ import annotations

import time
from collections.abc import Callable

from prism_nemo.config import MidtrainConfig, RLConfig
from prism_nemo.evaluation.in_training.evaluator import SmallEvaluation, on_ranks, steps_evaluated, told, undisturbed
from prism_nemo.evaluation.in_training.process import CheckpointEvaluation
from prism_nemo.evaluation.in_training.suite import Suite
from prism_nemo.run import RunDirectory
from prism_nemo.training.trainer import ForwardStep, Trainer


class InTraining:
    """Every rank of a stage has one and calls its methods at the same places.

    Args:
        config: The stage's; its `evaluation` says when and how.
        suite: What is asked, from `resolve_suite`; None for nothing.
        run: Its directory.
        trainer: Whose model.
        forward_step: For text, as in mid-training.
        step: That the run goes on from.
        say: Told what was found.
    """

    def __init__(
        self,
        config: MidtrainConfig | RLConfig,
        suite: Suite | None,
        run: RunDirectory,
        trainer: Trainer,
        forward_step: ForwardStep,
        step: int,
        say: Callable[[str], None],
    ) -> None:
        self._config, self._run, self._trainer, self._say = config.evaluation, run, trainer, say
        self._last = config.train_steps  # evaluated whatever the interval
        self._here: SmallEvaluation | None = None
        self._process: CheckpointEvaluation | None = None
        if suite is not None and self._config.mode == "ranks":
            self._here = on_ranks(suite, trainer, forward_step, config.micro_batch_size)
        elif suite is not None and run.writes:
            self._process = CheckpointEvaluation(self._config, suite, run, step, say)
        if step == 0 and self._config.at_start and self._here is not None:
            self._measure(0)

    def after_step(self, step: int, alive: Callable[[str], None]) -> None:
        """Evaluate if it is time.

        Args:
            step: That was done.
            alive: Told that an evaluation begins.
        """
        if self._here is not None and (step % self._config.every == 0 or step == self._last):
            alive(f"the evaluation after step {step}")
            self._measure(step)
        if self._process is not None:
            self._process.poll()

    def rewind(self, step: int) -> None:
        """The run went back to a step."""
        if self._process is not None:
            self._process.rewind(step)

    def finish(self, alive: Callable[[str], None]) -> None:
        """The stage is done and its last checkpoint is on disk."""
        if self._process is not None:
            self._process.finish(alive)

    def close(self) -> None:
        """However the stage ends."""
        if self._process is not None:
            self._process.close()

    def _measure(self, step: int) -> None:
        if self._here is None:
            return
        began = time.perf_counter()
        with undisturbed(self._trainer.parts):
            # Asking for the model gathers its parameters, where the last update left them scattered.
            model = self._trainer.raw
            if self._here.engine is not None:
                self._here.engine.model = model
            values = self._here.measure()
        # A run that was ended before its first checkpoint begins again.
        if step == 0 and self._run.writes and 0 in steps_evaluated(self._run):
            return
        self._run.log({"step": step, **values, "eval_seconds": time.perf_counter() - began})
        self._say(told(step, values))
