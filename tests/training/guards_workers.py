"""Faults that the tests of the guards put into a run; started by `prism_nemo.runtime.launch.launch`.

As a script it is such a run, whose messages can be read: CONFIG.yaml FAULT STEP...
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from prism_nemo.config import MidtrainConfig, OptimizerConfig, ParallelConfig


def midtrain_with_fault(config: MidtrainConfig, fault: str, steps: list[int]) -> Any:
    """Mid-training in which something goes wrong at some steps, counted from 1 in this process.

    Args:
        config: As for `midtrain`.
        fault: ``gradient``: one number of one parameter's gradient is not a number, on one rank; ``loss``: the loss is
            not a number; ``spike``: losses are twenty times as high; ``slow``: rank 1 computes for long; ``hang``: rank
            1 never joins; ``die``: rank 1 is killed; ``flip``: one bit of a weight of rank 1 is another;
            ``weight``: the update makes a weight of the last rank infinite.
        steps: When.
    """
    from prism_nemo.training import midtrain as module

    forward, per_step = module.forward_step, config.global_batch_size // config.micro_batch_size
    per_step //= config.parallel.data_parallel_size
    calls = 0

    def broken(batches: Any, model: Any) -> Any:
        nonlocal calls
        calls += model.training
        now = (calls - 1) // per_step + 1
        first = model.training and (calls - 1) % per_step == 0
        rank = dist.get_rank()
        if first and now in steps and rank == 1:
            if fault == "slow":
                burn(0.3)
            elif fault == "hang":
                time.sleep(3600)
            elif fault == "die":
                os.kill(os.getpid(), 9)
            elif fault == "flip":
                _flip(model)
        losses, loss_of = forward(batches, model)
        if model.training and now in steps:
            if fault == "loss":
                losses = losses * float("nan")
            elif fault == "spike":
                losses = losses * 20
            elif fault == "gradient" and first and rank == dist.get_world_size() - 1:
                losses = _PoisonOne.apply(losses)
        return losses, loss_of

    if fault == "weight":
        _break_updates(steps)
    module.forward_step = broken
    return module.midtrain(config)


def _break_updates(steps: list[int]) -> None:
    from prism_nemo.training.trainer import Trainer

    whole, done = Trainer.step, 0

    def step(self: Any, *arguments: Any) -> Any:
        nonlocal done
        result, done = whole(self, *arguments), done + 1
        if done in steps and dist.get_rank() == dist.get_world_size() - 1:
            with torch.no_grad():
                self.raw.decoder.layers[0].mlp.linear_fc2.weight.view(-1)[7] = float("inf")
        return result

    Trainer.step = step  # type: ignore[method-assign]


class _PoisonOne(torch.autograd.Function):
    """Values pass; of the gradient one number becomes NaN: the loss looks as always."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        broken = grads[0].clone()
        broken.view(-1)[0] = float("nan")
        return broken


def burn(seconds: float) -> None:
    """Compute for so much processor time."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        sum(range(1000))


def _flip(model: Any) -> None:
    while hasattr(model, "module"):
        model = model.module
    with torch.no_grad():
        weight = model.decoder.layers[1].mlp.linear_fc2.weight
        weight.view(torch.int32).view(-1)[5] ^= 1 << 20


def refused_step(hf_dir: str) -> tuple[bool, bool, bool]:
    """A step that is refused, and then one that is taken.

    Returns:
        Whether weights and optimizer were untouched by the first, and whether the second changed the weights.
    """
    from training_workers import _trainer

    from prism_nemo.runtime import stop
    from prism_nemo.training.midtrain import forward_step

    trainer = _trainer(hf_dir, ParallelConfig(), OptimizerConfig(lr=1e-2), True)
    trainer.set_learning_rate(1e-2)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, 255, (2, 33), generator=generator)
    positions, mask = torch.arange(32).expand(2, 32), torch.ones(2, 32)
    batch = {"tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": mask, "position_ids": positions}

    def numbers() -> list[torch.Tensor]:
        inner = trainer.optimizer.chained_optimizers[0].optimizer
        moments = [value for state in inner.state.values() for value in state.values() if torch.is_tensor(value)]
        return [value.detach().clone() for value in [*trainer.raw.parameters(), *moments]]

    trainer.step(forward_step, iter([batch]), 1, 2, 32)
    before = numbers()
    result = trainer.step(forward_step, iter([batch]), 1, 2, 32, lambda sums, norm: "no")
    after = numbers()
    untouched = len(before) == len(after) and all(map(torch.equal, before, after))
    trainer.step(forward_step, iter([batch]), 1, 2, 32, lambda sums, norm: None)
    changed = not all(map(torch.equal, after, numbers()))
    stop()
    return untouched, result.skipped == "no", changed


def main(file: str, fault: str, *steps: str) -> None:
    """The script."""
    from guards_workers import midtrain_with_fault as function  # by a name that its processes can import

    from prism_nemo.config import load_yaml, resolve
    from prism_nemo.runtime.launch import launch

    config = resolve(MidtrainConfig, load_yaml(Path(file)))
    launch(function, config, fault, [int(step) for step in steps], processes=config.parallel.world_size)


if __name__ == "__main__":
    main(*sys.argv[1:])
