"""Verifiers that a random model satisfies now and then, and what the tests of prompt curation run elsewhere."""

from __future__ import annotations

import json
import os
import signal
import string
from pathlib import Path
from typing import Any

from megatron.core import parallel_state

from prism_nemo.rl import curate
from prism_nemo.rl.pass_rates import PassRates
from prism_nemo.rl.rewards.task import Problem
from prism_nemo.rl.rewards.verifier import Verifier


class Digit(Verifier):
    """Right when the answer begins with a digit: about one in ten of a random model's answers does."""

    name, isolated = "digit", False

    def verify(self, problem: Problem, answer: str) -> float:
        """See `Verifier`."""
        return float(answer[:1].isdigit())


class Letter(Verifier):
    """Right when the answer begins with a letter, about half of the time; no verdict on punctuation."""

    name, isolated = "letter", False

    def verify(self, problem: Problem, answer: str) -> float:
        """See `Verifier`."""
        if answer[:1] in tuple(string.punctuation):
            raise ValueError(answer)
        return float(answer[:1].isalpha())


class Never(Verifier):
    """Nobody is right."""

    name, isolated = "never", False

    def verify(self, problem: Problem, answer: str) -> float:
        """See `Verifier`."""
        return 0.0


def measure_and_tell(config: curate.FilterConfig, folder: str) -> int:
    """Measure, and write down the number of the prompt, its text and every answer to ``folder/RANK.jsonl``."""
    roll_out = curate.roll_out

    def told(engine: Any, problems: Any, judge: Any, tokenizer: Any, rollout: Any, seed: int) -> Any:
        found = roll_out(engine, problems, judge, tokenizer, rollout, seed)
        sampling = [rollout.temperature, rollout.top_p, rollout.group_size, rollout.max_new_tokens, seed]
        rank = parallel_state.get_data_parallel_rank()
        with (Path(folder) / f"{rank}.jsonl").open("a") as file:
            for r in found:
                line = {"number": r.number, "prompt": r.problem.prompt, "text": tokenizer.decode(r.response.tokens)}
                file.write(json.dumps({**line, "sampling": sampling}) + "\n")
        return found

    curate.roll_out = told
    return curate.measure(config)


def measure_and_be_killed(config: curate.FilterConfig, batches: int) -> int:
    """Measure and be killed while the pass rates of a batch are written, in the middle of its second line."""
    append = PassRates.append

    def die(self: PassRates, lines: Any) -> None:
        die.left -= 1  # type: ignore[attr-defined]
        if die.left >= 0:  # type: ignore[attr-defined]
            append(self, lines)
            return
        append(self, lines[:1])
        with self._path.open("a") as file:
            file.write(json.dumps(lines[1])[:20])
        os.kill(os.getpid(), signal.SIGKILL)

    die.left = batches  # type: ignore[attr-defined]
    PassRates.append = die  # type: ignore[method-assign]
    return curate.measure(config)
