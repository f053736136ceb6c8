"""Three updates of a model on the CPU: the largest resident memory of the process beside what is predicted.

With MALLOC_MMAP_THRESHOLD_ in the environment, every large tensor is mapped by itself and given back when it is freed:
what is measured then is tensors, and not what the C library's heap keeps between them.
"""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import replace
from pathlib import Path

import torch

from prism_nemo.config import OptimizerConfig, ParallelConfig
from prism_nemo.models.family import read_hf_config
from prism_nemo.planning.activations import Kernels
from prism_nemo.planning.hardware import assumptions
from prism_nemo.planning.memory import Workload, estimate_memory
from prism_nemo.runtime import cpu, start, stop
from prism_nemo.training.trainer import Trainer


def main(folder: str, rows: int, length: int) -> None:
    cpu._keep_freed_memory = lambda: None  # it would undo the threshold
    architecture = read_hf_config(Path(folder))
    runtime = start(ParallelConfig(), seed=1)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    trainer = Trainer(architecture, runtime, OptimizerConfig(), length, True)
    tokens = torch.randint(0, architecture.vocab_size, (rows, length))

    def forward_step(batches: object, model: torch.nn.Module) -> object:
        losses = model(tokens, torch.arange(length).expand_as(tokens), None, labels=tokens)

        def loss(output: torch.Tensor) -> object:
            return output.sum(), torch.tensor(tokens.numel(), dtype=torch.int), {"loss": output.detach().sum()}

        return losses, loss

    trainer.set_learning_rate(1e-3)
    for _ in range(3):
        trainer.step(forward_step, iter([]), 1, rows, length)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    stop()
    nothing_kept = replace(assumptions(()), reserved_bytes=0, fragmentation=0.0)
    work = Workload(length, rows, rows)
    predicted = estimate_memory(architecture, ParallelConfig(), work, Kernels.named("cpu"), nothing_kept, 0)
    print(json.dumps({"measured": peak - before, "predicted": predicted.total}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
