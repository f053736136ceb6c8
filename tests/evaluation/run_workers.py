"""What the tests of running evaluations start in processes of their own."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from prism_nemo.config import ParallelConfig
from prism_nemo.errors import PrismError
from prism_nemo.evaluation.answering.leading import led
from prism_nemo.evaluation.engines.contract import EvaluationModel
from prism_nemo.generation.requests import Request, SamplingParams
from prism_nemo.runtime import gather, start, stop


class Recorder:
    """A model that every rank has to be asked: it fails unless all ranks are asked the same."""

    engine = "recorder"
    max_length = 64
    tokenizer: Any = None

    def __init__(self) -> None:
        self.asked: list[str] = []

    def generate(self, requests: Any) -> list[Any]:
        everyone = gather(repr(requests))
        if len(set(everyone)) != 1:
            raise PrismError("ranks were asked different things")
        self.asked.append("generate")
        return [len(everyone)] * len(requests)

    def score(self, continuations: Any) -> list[Any]:
        self.asked.append("score")
        return gather(len(continuations))


def follow(fail: bool) -> list[Any]:
    """Rank 0 asks three times, the others follow; returns what each rank's model was asked, and what rank 0 found."""
    start(ParallelConfig(data_parallel_size=dist_size()), seed=0)
    model = Recorder()

    def work(leader: EvaluationModel) -> list[Any]:
        request = Request([1, 2], SamplingParams(4))
        found: list[Any] = [leader.generate([request] * 3), leader.score([]), leader.generate([request])]
        if fail:
            raise PrismError("rank 0 could not go on")
        return found

    found = led(model, work)
    everyone = gather((dist.get_rank(), model.asked, found))
    stop()
    return everyone


def dist_size() -> int:
    """Processes that were started."""
    import os

    return int(os.environ["WORLD_SIZE"])


def run_settings(path: str) -> None:
    """Evaluate with pickled settings; a program of its own, to be killed."""
    import pickle
    from pathlib import Path

    from prism_nemo.evaluation.run import evaluate

    evaluate(pickle.loads(Path(path).read_bytes()))


if __name__ == "__main__":
    import sys

    run_settings(sys.argv[1])
