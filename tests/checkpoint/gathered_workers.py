"""What the tests of prism_nemo.checkpoint.gathered run in processes of their own."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_llama import all_tensors

from prism_nemo.checkpoint.exporting import export_worker
from prism_nemo.checkpoint.gathered import gathered_hf_tensors
from prism_nemo.checkpoint.hf_writer import DEFAULT_SHARD_BYTES
from prism_nemo.checkpoint.importing import import_worker
from prism_nemo.checkpoint.native import load, read_architecture
from prism_nemo.config import ParallelConfig
from prism_nemo.models.build import build_model
from prism_nemo.models.family import read_hf_config
from prism_nemo.runtime import start, stop

# Parameters of a mixer that are kept in fp32 whatever the others are.
FP32 = ("A_log", ".D", "dt_bias")


def convert_both_ways(folders: list[str]) -> None:
    """Import and export each folder's ``hf``, all in one process."""
    for folder in map(Path, folders):
        architecture = read_hf_config(folder / "hf")
        import_worker(str(folder / "hf"), str(folder / "checkpoint"), architecture, False, {}, ParallelConfig())
        export_worker(
            str(folder / "checkpoint"),
            str(folder / "export"),
            architecture,
            None,
            None,
            DEFAULT_SHARD_BYTES,
            ParallelConfig(),
        )


def against_exports(folders: list[tuple[str, str]], parallel: ParallelConfig, dtype: torch.dtype) -> list[Any]:
    """By rank, for each (checkpoint, its export), what differs between the gathered tensors and the exported ones.

    Returns:
        By rank and folder: names that only one of the two has, names whose bits differ, and the most tensors that were
        alive at a time.
    """
    runtime = start(parallel, seed=0, dtype=dtype)
    found = []
    for checkpoint, exported in folders:
        model = build_model(read_architecture(Path(checkpoint)), runtime)
        for name, parameter in model.named_parameters():
            if name.endswith(FP32):
                parameter.data = parameter.data.float()
        load(Path(checkpoint), model)
        expected = all_tensors(Path(exported))
        names, different = [], []
        alive: list[Any] = []
        most = 0
        for name, tensor in gathered_hf_tensors(model):
            names.append(name)
            target = expected.get(name)
            kept = torch.float32 if name.endswith(FP32) else dtype
            if target is not None and not (tensor.dtype == kept and torch.equal(tensor, target.to(kept))):
                different.append(name)
            alive = [ref for ref in alive if ref() is not None] + [weakref.ref(tensor)]
            most = max(most, len(alive))
            del tensor
        found.append((sorted(set(names) ^ set(expected)), different, most, len(names) - len(set(names))))
    everyone: list[Any] = [None] * runtime.world_size
    dist.all_gather_object(everyone, found)
    stop()
    return everyone
