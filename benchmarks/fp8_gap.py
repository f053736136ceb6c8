"""What FP8 costs in loss: the same model on the same data in bf16 (peer) and with each emulated recipe (ours).

    python benchmarks/fp8_gap.py [--json] [--model pocket] [--steps 200] [--threads 1]

Needs no GPU: precision.fp8=emulate rounds the operands of the linear layers as Transformer Engine does. The data is a
fixed random chain of order two, which a model learns step by step, so there is a loss to lose. Figures are mean losses
of the last quarter of the steps; `gap` is ours less peer, in nats per token. Runs start from the same weights and see
the same tokens. One more run differs from the peer in its initial weights alone: what chance does to the same figure.
Formats are Transformer Engine's defaults: hybrid per tensor, e4m3 for the recipes with blocks.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from prism_nemo.config import OptimizerConfig, ParallelConfig, PrecisionConfig
from prism_nemo.models.family import architecture_from_hf
from prism_nemo.quickstart.settings import PocketSettings
from prism_nemo.runtime import start, stop

VOCABULARY = 256
ROWS, LENGTH = 8, 64
TARGET = 0.99  # bf16's loss over FP8's
FORMATS = {"delayed": "hybrid", "tensorwise": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}
# Hidden size 128: at least four blocks of 32 along every summed dimension, one of 128.
TINY = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}


def batches(steps: int, seed: int = 0) -> Iterator[dict[str, torch.Tensor]]:
    """Rows of a chain in which the last two tokens leave eight choices for the next."""
    g = torch.Generator().manual_seed(seed)
    successors = torch.randint(0, VOCABULARY, (VOCABULARY, 8), generator=g)
    for _ in range(steps):
        tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH + 1), generator=g)
        choices = torch.randint(0, 4, (ROWS, LENGTH + 1), generator=g)
        for i in range(2, LENGTH + 1):
            tokens[:, i] = successors[tokens[:, i - 1], 2 * choices[:, i] + tokens[:, i - 2] % 2]
        yield {
            "tokens": tokens[:, :-1],
            "labels": tokens[:, 1:],
            "loss_mask": torch.ones(ROWS, LENGTH),
            "position_ids": torch.arange(LENGTH).expand(ROWS, -1),
        }


def train(model: str, precision: PrecisionConfig, steps: int, seed: int = 0) -> dict[str, float]:
    """One run; mean loss of its last quarter, and the median seconds of a step."""
    from prism_nemo.training.midtrain import forward_step
    from prism_nemo.training.trainer import Trainer

    runtime = start(ParallelConfig(), seed=seed, precision=precision)
    values = {**PocketSettings().model, "vocab_size": VOCABULARY, **(TINY if model == "tiny" else {})}
    settings = OptimizerConfig(lr=2e-3, weight_decay=0.0)
    trainer = Trainer(architecture_from_hf(values, "benchmark"), runtime, settings, LENGTH, True)
    losses, seconds = [], []
    for step, batch in enumerate(batches(steps)):
        began = time.perf_counter()
        trainer.set_learning_rate(settings.lr * min(1.0, (step + 1) / 10))
        result = trainer.step(forward_step, iter([batch]), 1, ROWS, LENGTH)
        losses.append(result.sums["loss"] / result.sums["tokens"])
        seconds.append(time.perf_counter() - began)
    stop()
    last = losses[-max(1, steps // 4) :]
    return {"first": losses[0], "loss": sum(last) / len(last), "seconds": sorted(seconds)[len(seconds) // 2]}


def measure(model: str, steps: int) -> Iterator[dict[str, Any]]:
    """One figure a recipe, and chance."""
    peer = train(model, PrecisionConfig(dtype="bf16"), steps)
    runs = {"chance_other_weights": (PrecisionConfig(dtype="bf16"), 1)}
    for recipe, form in FORMATS.items():
        runs[recipe] = (PrecisionConfig(dtype="bf16", fp8="emulate", fp8_recipe=recipe, fp8_format=form), 0)
    for name, (precision, seed) in runs.items():
        ours = train(model, precision, steps, seed)
        ratio = peer["loss"] / ours["loss"]
        yield {
            "name": f"fp8_gap_{model}_{name}",
            "ours": round(ours["loss"], 5),
            "peer": round(peer["loss"], 5),
            "unit": "nats",
            "ratio": round(ratio, 5),
            "target": TARGET,
            "pass": ratio >= TARGET,
            "gap": round(ours["loss"] - peer["loss"], 5),
            "first_loss": round(ours["first"], 5),
            "steps": steps,
            "step_time_over_bf16": round(ours["seconds"] / peer["seconds"], 2),
            "threads": torch.get_num_threads(),
        }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--model", choices=["tiny", "pocket"], default="pocket")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for line in measure(arguments.model, arguments.steps):
        if arguments.json:
            print(json.dumps(line), flush=True)
        else:
            print(
                f"{line['name']}: loss {line['ours']}, bf16 {line['peer']}, gap {line['gap']:+.5f}, ratio "
                f"{line['ratio']} (target {line['target']})",
                flush=True,
            )


if __name__ == "__main__":
    main()
