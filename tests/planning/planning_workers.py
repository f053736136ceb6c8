"""What the tests of planning run in processes of their own, started by `prism_nemo.runtime.launch.launch`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from prism_nemo.config import OptimizerConfig, ParallelConfig
from prism_nemo.models.family import Architecture, read_hf_config
from prism_nemo.planning import rehearsal
from prism_nemo.runtime import start, stop


def counted_flops(folders: dict[str, str], length: int) -> dict[str, tuple[int, int]]:
    """By case, what FlopCounterMode counts in a forward and in a backward pass of one row on real tensors."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from prism_nemo.models.build import build_model

    runtime = start(ParallelConfig(), seed=1)
    found = {}
    for case, folder in folders.items():
        model = build_model(read_hf_config(Path(folder)), runtime, length)
        tokens = torch.arange(length)[None] % 149
        # The CPU's flash kernel is no operator that the counter knows; the plain one is made of matrix products.
        with sdpa_kernel(SDPBackend.MATH):
            with FlopCounterMode(display=False) as forward:
                loss = model(tokens, torch.arange(length)[None], None, labels=tokens).sum()
            with FlopCounterMode(display=False) as backward:
                loss.backward()
        found[case] = (forward.get_total_flops(), backward.get_total_flops())
    stop()
    return found


def _kept_by(forward: Callable[[], Any]) -> tuple[Any, dict[int, torch.UntypedStorage]]:
    """What a call returns, and the storages that autograd keeps of it."""
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        return forward(), storages


def held_in_training(folders: dict[str, str], layout: ParallelConfig, length: int, rows: int) -> dict[str, list[Any]]:
    """By case, what each rank's tensors hold after one real update, and what a micro-batch keeps on each rank."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from prism_nemo.training.trainer import Trainer

    found: dict[str, list[Any]] = {}
    runtime = start(layout, seed=1)
    for case, folder in folders.items():
        trainer = Trainer(read_hf_config(Path(folder)), runtime, OptimizerConfig(), length, True)
        kept: list[int] = []
        tokens = torch.arange(rows * length).view(rows, length) % 149

        def forward_step(
            batches: Any, model: Any, tokens: Any = tokens, trainer: Any = trainer, kept: Any = kept
        ) -> Any:
            losses, storages = _kept_by(
                lambda: model(tokens, torch.arange(length).expand_as(tokens), None, labels=tokens)
            )
            for parameter in trainer.raw.parameters():
                storages.pop(parameter.untyped_storage()._cdata, None)
            kept.append(sum(storage.nbytes() for storage in storages.values()))

            def loss(output: torch.Tensor) -> Any:
                return output.sum(), torch.tensor(tokens.numel(), dtype=torch.int), {"loss": output.detach().sum()}

            return losses, loss

        trainer.set_learning_rate(1e-3)
        trainer.step(forward_step, iter([]), 1, rows, length)
        # One storage may hold several tensors, and a tensor may lie in the parameters' buffer: bytes of storages.
        buffers = trainer.model.buffers
        parameters = sum(buffer.param_data.untyped_storage().nbytes() for buffer in buffers)
        gradients = sum(buffer.grad_data.untyped_storage().nbytes() for buffer in buffers)
        model_storages = {buffer.param_data.untyped_storage().data_ptr() for buffer in buffers}
        state = {}
        for optimizer in getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer]):
            for group in optimizer.optimizer.param_groups:
                for p in group["params"]:
                    tensors = [p, *(t for k, t in optimizer.optimizer.state[p].items() if k != "step")]
                    state |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        optimizer_bytes = sum(size for pointer, size in state.items() if pointer not in model_storages)
        mine = {
            "stage": parallel_state.get_pipeline_model_parallel_rank(),
            "parameters": parameters,
            "gradients": gradients,
            "optimizer": optimizer_bytes,
            "kept": kept[0],
        }
        every: list[Any] = [None] * runtime.world_size
        dist.all_gather_object(every, mine)
        found[case] = every
    stop()
    return found


def rehearse_many(runs: list[tuple[Architecture, ParallelConfig, int, int, str, bool, str]]) -> list[Any]:
    """Several rehearsals in one process, one after the other."""
    return [rehearsal._rehearse(*run) for run in runs]
