"""Training throughput of this trainer and of transformers' LlamaForCausalLM, interleaved in one process.

    python benchmarks/train_throughput.py [--json] [--rounds 12] [--threads 1]

Both train the same shape (about 10M parameters, sequence 256, micro-batch 8) on the same tokens in fp32, from the same
weights, with AdamW and gradient clipping; a step is everything from zeroing gradients to the updated weights. The peer
gets torch's fused AdamW and scaled_dot_product_attention, the same kernels that ours uses. Steps alternate, and the
figure is the median of the per-round ratios, so that a busy machine slows both alike.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from prism_nemo.config import OptimizerConfig, ParallelConfig
from prism_nemo.models.family import architecture_from_hf
from prism_nemo.runtime import start, stop

SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}
LR, WEIGHT_DECAY, BETAS, EPS, CLIP = 1e-3, 0.1, (0.9, 0.95), 1e-8, 1.0
ROWS, SEQUENCE = 8, 256


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The same tokens for both."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, SHAPE["vocab_size"], (count, ROWS, SEQUENCE + 1), generator=generator)
    return [(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in rows]


def ours() -> tuple[Callable[[torch.Tensor, torch.Tensor], float], torch.nn.Module]:
    """One update with this project's trainer; returns it and the model."""
    from prism_nemo.training.midtrain import forward_step
    from prism_nemo.training.trainer import Trainer

    settings = OptimizerConfig(LR, WEIGHT_DECAY, *BETAS, EPS, CLIP)
    runtime = start(ParallelConfig(), seed=0)
    trainer = Trainer(architecture_from_hf(SHAPE, "benchmark"), runtime, settings, SEQUENCE, True)
    trainer.set_learning_rate(LR)
    mask = torch.ones(ROWS, SEQUENCE)
    positions = torch.arange(SEQUENCE).expand(ROWS, -1)

    def step(tokens: torch.Tensor, labels: torch.Tensor) -> float:
        batch = {"tokens": tokens, "labels": labels, "loss_mask": mask, "position_ids": positions}
        result = trainer.step(forward_step, iter([batch]), 1, ROWS, SEQUENCE)
        return result.sums["loss"] / result.sums["tokens"]

    return step, trainer.raw


def peer(model: torch.nn.Module) -> Callable[[torch.Tensor, torch.Tensor], float]:
    """One update with transformers' model, starting from our weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from prism_nemo.checkpoint.convert import hf_tensors

    values = {k: v for k, v in SHAPE.items() if k not in ("architectures", "model_type", "rope_theta")}
    llama = LlamaForCausalLM._from_config(LlamaConfig(**values), attn_implementation="sdpa")
    llama.load_state_dict(dict(hf_tensors(model, model.architecture)), strict=True)  # type: ignore[arg-type]
    llama.train()
    norms = [p for p in llama.parameters() if p.dim() == 1]
    matrices = [p for p in llama.parameters() if p.dim() > 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, fused=True)

    def step(tokens: torch.Tensor, labels: torch.Tensor) -> float:
        optimizer.zero_grad()
        # shift_labels: the labels are already one position on, so both sides score the same 256 tokens.
        loss = llama(input_ids=tokens, labels=labels, shift_labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), CLIP)
        optimizer.step()
        return float(loss.detach())

    return step


def measure(rounds: int) -> dict[str, Any]:
    """Alternate steps; medians over rounds."""
    our_step, model = ours()
    their_step = peer(model)
    data = batches(rounds + 2)
    times: list[tuple[float, float]] = []
    gap = 0.0
    for i, (tokens, labels) in enumerate(data):
        pair = {}
        order = [("ours", our_step), ("peer", their_step)]
        for name, step in order if i % 2 else reversed(order):
            began = time.perf_counter()
            loss = step(tokens, labels)
            pair[name] = (time.perf_counter() - began, loss)
        gap = max(gap, abs(pair["ours"][1] - pair["peer"][1]))
        if i >= 2:
            times.append((pair["ours"][0], pair["peer"][0]))
    stop()
    work = ROWS * SEQUENCE
    ratio = statistics.median(theirs / mine for mine, theirs in times)
    return {
        "name": "train_throughput",
        "ours": round(work / statistics.median(t[0] for t in times), 1),
        "peer": round(work / statistics.median(t[1] for t in times), 1),
        "unit": "tokens/s",
        "ratio": round(ratio, 3),
        "target": 1.0,
        "pass": ratio >= 1.0,
        "parameters": sum(p.numel() for p in model.parameters()),
        "threads": torch.get_num_threads(),
        "largest_loss_difference": gap,
        "ratios": [round(theirs / mine, 3) for mine, theirs in times],
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = measure(arguments.rounds)
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"{result['parameters'] / 1e6:.1f}M parameters, {result['threads']} thread(s), fp32")
    print(f"ours {result['ours']} tok/s, transformers {result['peer']} tok/s, ratio {result['ratio']} (target 1.0)")
    print(f"largest difference of the losses over all steps: {result['largest_loss_difference']:.1e}")


if __name__ == "__main__":
    main()
