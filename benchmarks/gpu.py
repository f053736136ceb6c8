"""Training throughput on one GPU: a slice of Llama-3.1-8B, as many of its layers as fit, in bf16 or FP8.

    python benchmarks/gpu.py [--json] [--model llama-3.1-8b] [--layers N] [--seq-length 8192] [--micro-batch 1]
                             [--accumulate 4] [--steps 20] [--fp8 RECIPE] [--recompute none|selective|full]

A layer's cost does not depend on how many there are, so the slice has the MFU that the model's layers have; the output
layer weighs more than in the whole model, and the line says what share of the FLOPs it does. The step is the trainer's
own: forward, backward, clipping, AdamW with fp32 master weights. MFU counts the model's own FLOPs (causal
attention, no recomputation) against the card's dense BF16 peak; in FP8 the share of the FP8 peak is given beside it.

- `gpu mfu`: target 0.50 in bf16 on one H100.
- `gpu memory`: the peak that torch measured over the one that `prism-nemo plan` predicts.
- `gpu time`: the measured step over the predicted one.

Nothing is measured without a GPU: the command ends with exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from typing import Any

import torch

from prism_nemo.config import OptimizerConfig, ParallelConfig, PrecisionConfig, RecomputeConfig
from prism_nemo.errors import InputError, PrismError
from prism_nemo.models.catalog import find
from prism_nemo.models.family import Architecture, parameter_count
from prism_nemo.models.recompute import recompute_fields
from prism_nemo.planning.activations import Kernels
from prism_nemo.planning.flops import forward_flops, model_flops_utilisation
from prism_nemo.planning.hardware import GPU, GPUS, Assumptions
from prism_nemo.planning.memory import Workload, estimate_memory
from prism_nemo.planning.step_time import estimate_time
from prism_nemo.runtime import Runtime, start, stop

MFU_TARGET = 0.5
_LR = 1e-4


def card_of(name: str, memory_bytes: int) -> GPU:
    """The table's card for a device name as CUDA tells it, with the memory that this one has.

    Raises:
        InputError: For a card whose peak is not in the table.
    """
    for key, gpu in GPUS.items():
        if key in name.lower():
            return dataclasses.replace(gpu, memory_bytes=float(memory_bytes))
    raise InputError(f"'{name}' is not in prism_nemo/planning/hardware.py ({', '.join(GPUS)}); its peak is not known")


def slice_of(a: Architecture, layers: int) -> Architecture:
    """The same model with fewer layers: the first ones, so that a hybrid keeps its order of them.

    Raises:
        InputError: If it has not so many.
    """
    if not 1 <= layers <= a.num_layers:
        raise InputError(f"--layers {layers}: the model has 1 to {a.num_layers}")
    pattern = a.layer_pattern[:layers] if a.layer_pattern else a.layer_pattern
    return dataclasses.replace(a, num_layers=layers, layer_pattern=pattern)


def layers_that_fit(a: Architecture, gpu: GPU, work: Workload, kernels: Kernels, assumed: Assumptions) -> int:
    """Most layers whose predicted peak is within the card's memory.

    Raises:
        InputError: If not even one fits.
    """
    for layers in range(a.num_layers, 0, -1):
        part = slice_of(a, layers)
        if estimate_memory(part, ParallelConfig(), work, kernels, assumed, 0).total <= gpu.memory_bytes:
            return layers
    raise InputError(f"not even one layer fits {gpu.memory_bytes / 1e9:.0f} GB; lower --seq-length or --micro-batch")


def steps_of(
    a: Architecture, runtime: Runtime, work: Workload, steps: int, recompute: RecomputeConfig
) -> tuple[list[float], int, float]:
    """Seconds of each step after three to warm up, peak bytes that torch held (0 on CPU), and the last loss."""
    from prism_nemo.training.midtrain import forward_step
    from prism_nemo.training.trainer import Trainer

    trainer = Trainer(
        a, runtime, OptimizerConfig(lr=_LR), work.seq_length, work.distributed_optimizer, **recompute_fields(recompute)
    )
    trainer.set_learning_rate(_LR)
    rows, length = work.micro_batch_size, work.seq_length
    generator = torch.Generator().manual_seed(0)
    count = work.global_batch_size // rows
    cuda = runtime.device.type == "cuda"
    seconds, loss = [], float("nan")
    for step in range(steps + 3):
        tokens = torch.randint(0, a.vocab_size, (count, rows, length + 1), generator=generator).to(runtime.device)
        batches = [
            {
                "tokens": part[:, :-1].contiguous(),
                "labels": part[:, 1:].contiguous(),
                "loss_mask": torch.ones(rows, length, device=runtime.device),
                "position_ids": torch.arange(length, device=runtime.device).expand(rows, -1),
            }
            for part in tokens
        ]
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        result = trainer.step(forward_step, iter(batches), count, rows, length)
        if cuda:
            torch.cuda.synchronize()
        if step >= 3:
            seconds.append(time.perf_counter() - began)
        loss = result.sums["loss"] / result.sums["tokens"]
    return seconds, torch.cuda.max_memory_reserved() if cuda else 0, loss


def figures(
    a: Architecture,
    gpu: GPU,
    work: Workload,
    kernels: Kernels,
    assumed: Assumptions,
    seconds: list[float],
    peak_bytes: int,
) -> list[dict[str, Any]]:
    """The benchmark's lines from what was measured."""
    step = statistics.median(seconds)
    rate = work.global_batch_size * work.seq_length / step
    mfu = model_flops_utilisation(a, work.seq_length, rate, 1, gpu.bf16_flops)
    forward = forward_flops(a, [work.seq_length])
    predicted = estimate_memory(a, ParallelConfig(), work, kernels, assumed, 0).total
    planned = estimate_time(a, ParallelConfig(), work, gpu, assumed, kernels).step
    more: dict[str, Any] = {
        "card": gpu.name,
        "layers": a.num_layers,
        "parameters": parameter_count(a),
        "seq_length": work.seq_length,
        "tokens_per_second": round(rate, 1),
        "tflops": round(mfu * gpu.bf16_flops / 1e12, 1),
        "share_of_flops_in_logits": round(forward.logits / forward.total, 3),
        "step_seconds": {"median": round(step, 4), "least": round(min(seconds), 4), "most": round(max(seconds), 4)},
    }
    fp8 = kernels.fp8_recipe
    if fp8 is not None and gpu.fp8_flops is not None:
        more["fp8_recipe"] = fp8
        more["share_of_fp8_peak"] = round(mfu * gpu.bf16_flops / gpu.fp8_flops, 3)
    target = MFU_TARGET if fp8 is None else None
    lines = [_line("gpu mfu", mfu, 1.0, "share of the BF16 peak", target, **more)]
    lines.append(_line("gpu memory: measured / planned", peak_bytes / 1e9, predicted / 1e9, "GB", None))
    lines.append(_line("gpu time: measured / planned", step, planned, "s", None))
    return lines


def _line(name: str, ours: float, peer: float, unit: str, target: float | None, **more: Any) -> dict[str, Any]:
    ratio = ours / peer
    verdict = None if target is None else ratio >= target
    return {
        "name": name, "ours": round(ours, 4), "peer": round(peer, 4), "unit": unit, "ratio": round(ratio, 4),
        "target": target, "pass": verdict, **more,
    }  # fmt: skip


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure on this machine's GPU.

    Raises:
        InputError: Without a GPU, or for a card or sizes that cannot work.
    """
    if not torch.cuda.is_available():
        raise InputError("no CUDA device: this benchmark measures a GPU and says nothing without one")
    whole = find(options.model).architecture
    if options.seq_length > whole.max_position_embeddings:
        raise InputError(f"--seq-length {options.seq_length}: the model reads {whole.max_position_embeddings} tokens")
    gpu = card_of(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory)
    precision = PrecisionConfig(fp8="on" if options.fp8 else "off", fp8_recipe=options.fp8 or "delayed")
    kernels, assumed = Kernels.on_gpu(whole, options.fp8), Assumptions()
    batch = options.micro_batch * options.accumulate
    work = Workload(options.seq_length, options.micro_batch, batch, options.recompute)
    layers = options.layers or layers_that_fit(whole, gpu, work, kernels, assumed)
    part = slice_of(whole, layers)
    runtime = start(ParallelConfig(), seed=0, precision=precision)
    if not (runtime.transformer_engine or part.mamba):
        raise InputError("Transformer Engine is missing, so the measured kernels would not be those of a run on GPUs")
    recompute = RecomputeConfig(granularity=options.recompute)
    seconds, peak, _ = steps_of(part, runtime, work, options.steps, recompute)
    stop()
    return figures(part, gpu, work, kernels, assumed, seconds, peak)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--model", default="llama-3.1-8b", help="of `prism-nemo models`")
    parser.add_argument("--layers", type=int, help="default: as many as fit")
    parser.add_argument("--seq-length", type=int, default=8192)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--accumulate", type=int, default=4, help="micro-batches of a step")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--fp8", choices=["delayed", "tensorwise", "blockwise", "mxfp8"])
    parser.add_argument("--recompute", choices=["none", "selective", "full"], default="none")
    options = parser.parse_args()
    try:
        for line in run(options):
            if options.json:
                print(json.dumps(line), flush=True)
            else:
                goal = "" if line["target"] is None else f" (target {line['target']})"
                print(
                    f"{line['name']}: {line['ours']} / {line['peer']} {line['unit']}, {line['ratio']}{goal}", flush=True
                )
    except PrismError as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
