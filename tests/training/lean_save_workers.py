"""A save beside what Megatron would do by default; started by `prism_nemo.runtime.launch.launch`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from training_workers import _trainer

from prism_nemo.config import OptimizerConfig, ParallelConfig
from prism_nemo.runtime import stop

LEAN = "distrib_optim_fully_reshardable_mem_efficient"


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())


def save_twice(hf_dir: str, out: str, parallel: ParallelConfig, rows: dict[str, torch.Tensor]) -> None:
    """One update, saved as it is and with Megatron's default gathering, in `out`/own and `out`/all.

    Each rank writes what it saw of the first save to `out`/RANK.json: how the optimizer's state was asked for, whether
    the rank got it, and warnings.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from prism_nemo.checkpoint import native
    from prism_nemo.training.midtrain import forward_step

    trainer = _trainer(hf_dir, parallel, OptimizerConfig(lr=2e-3, adam_eps=1e-4), True)
    trainer.set_learning_rate(2e-3)
    trainer.step(forward_step, iter([rows]), 1, len(rows["tokens"]), rows["tokens"].shape[1])
    gather, metadata, asked, messages = (
        DistributedOptimizer.get_parameter_state_dp_zero, native.sharding_metadata, [], _Messages(),
    )  # fmt: skip

    def recorded(self: Any, **how: Any) -> Any:
        state = gather(self, **how)
        asked.append({"gloo": how["use_gloo_comm"], "everywhere": how["return_on_all_ranks"], "got": state is not None})
        return state

    logging.getLogger("megatron").addHandler(messages)
    for name, changes in (("own", {}), ("all", {LEAN: False})):
        with pytest.MonkeyPatch.context() as patch:
            if name == "own":
                patch.setattr(DistributedOptimizer, "get_parameter_state_dp_zero", recorded)
            patch.setattr(native, "sharding_metadata", lambda changes=changes: {**metadata(), **changes})
            native.save(
                Path(out) / name, trainer.raw, trainer.architecture, trainer.optimizer, native.TrainState(step=1)
            )
    seen = {"asked": asked, "warnings": messages.found}
    (Path(out) / f"{dist.get_rank()}.json").write_text(json.dumps(seen))
    stop()
