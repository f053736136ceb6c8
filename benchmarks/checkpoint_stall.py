"""How long a save stops training, as a share of a step: in the background against synchronous, interleaved.

    python benchmarks/checkpoint_stall.py [--json] [--rounds 8] [--processes 2]

The model, the batch and the layout are those of the quickstart (data parallel over two processes, 0.9M parameters with
Adam's moments). Each round takes undisturbed steps, then saves in the background, takes steps while the writer works,
waits for it, and saves once synchronously. The stall is the time that the training loop spends inside the save call;
what it also costs, on a machine with no core to spare, is that steps beside the writer are slower: reported as well.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from prism_nemo.checkpoint.native import TrainState, step_directory
from prism_nemo.checkpoint.saver import Saver
from prism_nemo.config import CheckpointConfig, OptimizerConfig, ParallelConfig
from prism_nemo.models.family import architecture_from_hf
from prism_nemo.quickstart.settings import PocketSettings
from prism_nemo.runtime import start, stop
from prism_nemo.runtime.launch import launch

TARGET = 0.05
QUIET_STEPS = 6


def measure(rounds: int, folder: str, processes: int) -> dict[str, Any]:
    """What rank 0 saw; every rank runs this."""
    from prism_nemo.training.midtrain import forward_step
    from prism_nemo.training.stage import make_trainer
    from prism_nemo.training.trainer import Trainer

    pocket = PocketSettings()
    saver = Saver(CheckpointConfig(keep=1))
    runtime = start(ParallelConfig(data_parallel_size=processes), seed=0)
    architecture = architecture_from_hf({**pocket.model, "vocab_size": pocket.vocab_size}, "benchmark")
    trainer = Trainer(architecture, runtime, OptimizerConfig(lr=1e-3), pocket.seq_length, True)
    trainer.set_learning_rate(1e-3)
    rows, length = pocket.global_batch_size // processes, pocket.seq_length
    tokens = torch.randint(0, pocket.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    places = torch.arange(length).expand(rows, -1)
    batch = {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(rows, length), "position_ids": places}

    def step() -> float:
        began = time.perf_counter()
        trainer.step(forward_step, iter([batch]), 1, rows, length)
        return time.perf_counter() - began

    checkpoints, number = Path(folder), 0

    def save(background: bool) -> float:
        nonlocal number
        number += 1
        began = time.perf_counter()
        saver.save(step_directory(checkpoints, number), trainer, TrainState(step=number), {}, background)
        return time.perf_counter() - began

    quiet, beside, stalls, synchronous = [], [], [], []
    with saver:
        step()
        start_with = {"parallel": runtime.parallel, "dtype": runtime.dtype, "precision": runtime.precision}
        saver.prepare(trainer, make_trainer, start_with, *trainer.arguments)
        save(True)  # builds the writer's model
        saver.wait()
        for _ in range(rounds):
            quiet.append(statistics.median(step() for _ in range(QUIET_STEPS)))
            stalls.append(save(True))
            beside.append(statistics.median(step() for _ in range(3)))
            saver.wait()
            synchronous.append(save(False))
    stop()
    share = statistics.median(stall / usual for stall, usual in zip(stalls, quiet, strict=True))
    return {
        "name": "checkpoint_stall",
        "ours": round(share, 4),
        "unit": "stall per save in the background, in steps",
        "target": TARGET,
        "pass": share < TARGET,
        "synchronous": round(statistics.median(s / q for s, q in zip(synchronous, quiet, strict=True)), 2),
        "step_ms": round(1e3 * statistics.median(quiet), 2),
        "stall_ms": round(1e3 * statistics.median(stalls), 3),
        "synchronous_ms": round(1e3 * statistics.median(synchronous), 1),
        "steps_beside_the_writer": round(statistics.median(b / q for b, q in zip(beside, quiet, strict=True)), 2),
        "parameters": sum(p.numel() for p in trainer.raw.parameters()),
        "processes": processes,
        "stalls_ms": [round(1e3 * stall, 2) for stall in stalls],
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--processes", type=int, default=PocketSettings().processes)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = launch(measure, arguments.rounds, folder, arguments.processes, processes=arguments.processes)
    if arguments.json:
        print(json.dumps(result))
        return
    size = f"{result['parameters'] / 1e6:.2f}M parameters, {result['processes']} process(es)"
    print(f"{size}, a step {result['step_ms']} ms")
    print(f"in the background {result['stall_ms']} ms: {result['ours']:.1%} of a step (target < {TARGET:.0%})")
    print(f"synchronous {result['synchronous_ms']} ms: {result['synchronous']} steps")
    print(f"steps beside the writer take {result['steps_beside_the_writer']} times as long")


if __name__ == "__main__":
    main()
