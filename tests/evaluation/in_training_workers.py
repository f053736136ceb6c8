"""What the tests of held-out losses and of evaluation in training run in processes of their own."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prism_nemo.checkpoint.native import load, read_architecture
from prism_nemo.config import MidtrainConfig, ParallelConfig, RLConfig
from prism_nemo.data.tokenizer import load_tokenizer
from prism_nemo.evaluation.engines.megatron import MegatronModel
from prism_nemo.evaluation.held_out_loss import measure_held_out
from prism_nemo.evaluation.in_training.evaluator import undisturbed
from prism_nemo.models.build import build_model
from prism_nemo.runtime import start, stop
from prism_nemo.training.midtrain import midtrain


def loss_by_engine(checkpoint: str, data: str, tokenizer: str, rows: int, seq_length: int) -> float:
    """Loss of the source "held" as an evaluation measures it."""
    model = build_model(read_architecture(Path(checkpoint)), start(ParallelConfig(), seed=0))
    load(Path(checkpoint), model)
    engine = MegatronModel(model, load_tokenizer(tokenizer))
    found = measure_held_out(engine, data, ["held"], rows, seq_length)["held_out_held"].score.estimate
    stop()
    return found


def what_is_put_back() -> dict[str, Any]:
    """Draws numbers within `undisturbed` and compares what comes after it with what came before."""
    start(ParallelConfig(), seed=5)
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(2, 2))
    model[1].eval()  # a part that is not in training mode stays so

    def draws() -> list[float]:
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        found = [random.random(), float(np.random.random()), float(torch.rand(()))]
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        return found

    before = draws()
    with undisturbed([model]):
        inside = [module.training for module in model.modules()]
        random.random(), np.random.random(), torch.rand(3)
        model.train()
    after, modes = draws(), [module.training for module in model.modules()]
    try:
        with undisturbed([model]):
            torch.rand(3)
            raise KeyError
    except KeyError:
        failed = draws()
    stop()
    return {"before": before, "after": after, "failed": failed, "inside": inside, "modes": modes}


def midtrain_with_a_process_that_fails(config: MidtrainConfig) -> dict[str, Any]:
    """Mid-training whose evaluating process does not find its tokenizer."""
    from prism_nemo.evaluation.in_training import process as in_training_process

    whole = in_training_process.CheckpointEvaluation._begin
    said: list[str] = []

    def begin(self: Any, checkpoint: Path, step: int) -> None:
        self._say = said.append
        self._suite = type(self._suite)(**{**vars(self._suite), "tokenizer": "/nowhere/tokenizer"})
        whole(self, checkpoint, step)

    in_training_process.CheckpointEvaluation._begin = begin  # type: ignore[method-assign]
    return {**midtrain(config), "said": said}


def rl_train(config: RLConfig) -> dict[str, Any]:
    """An RL stage."""
    from prism_nemo.rl.train import train

    return train(config)
