"""Training throughput of this trainer and of transformers, interleaved in one process; and of two processes.

    python benchmarks/train_throughput.py [--json] [--rounds 8] [--cases dense-256 dense-1024 hybrid-256 dp2]

Both sides train the same shape on the same tokens from the same weights, with AdamW and gradient clipping; a step is
everything from zeroing gradients to the updated weights. The peer gets torch's fused AdamW and
scaled_dot_product_attention, the same kernels that ours uses; of the hybrid's scan it runs its own torch code. Each is
measured in fp32 and in mixed precision: ours with bf16 weights and fp32 master weights, as it trains on
GPUs; the peer under torch.autocast, as its users do it. Steps alternate, and a figure is the median of the per-round
ratios, so that a busy machine slows all alike. One thread per process.

- `dense-256`, `dense-1024`: about 10M parameters, 2,048 tokens a step.
- `hybrid-256`: Nemotron-H-shaped, Mamba-2, attention and MLP layers.
- `dp2`: tokens/s of two data-parallel processes over those of one, the same work per process.
"""

from __future__ import annotations

import argparse
import dataclasses
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
from prism_nemo.planning.flops import training_flops
from prism_nemo.runtime import Runtime, start, stop

DENSE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}
HYBRID: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "hybrid_override_pattern": "M-M-M*-M-",
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "mamba_num_heads": 16,
    "mamba_head_dim": 32,
    "n_groups": 4,
    "ssm_state_size": 64,
    "conv_kernel": 4,
    "chunk_size": 64,
    "tie_word_embeddings": False,
}
# Name -> shape, tokens of a row, and what the faster of ours has to reach against transformers in fp32.
CASES = {"dense-256": (DENSE, 256, 1.15), "dense-1024": (DENSE, 1024, 1.15), "hybrid-256": (HYBRID, 256, 1.5)}
TOKENS = 2048
LR, WEIGHT_DECAY, BETAS, EPS, CLIP = 1e-3, 0.1, (0.9, 0.95), 1e-8, 1.0

Step = Callable[[torch.Tensor, torch.Tensor], float]


def batches(count: int, sequence: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The same tokens for all."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, DENSE["vocab_size"], (count, TOKENS // sequence, sequence + 1), generator=generator)
    return [(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in rows]


def hf_values(shape: dict[str, Any]) -> dict[str, Any]:
    """The shape as a model's config.json has it."""
    from transformers import AutoConfig

    return dict(AutoConfig.for_model(**shape).to_dict()) | {"architectures": shape["architectures"]}


def ours(shape: dict[str, Any], sequence: int, runtime: Runtime) -> tuple[Step, torch.nn.Module]:
    """One update with this project's trainer; returns it and the model."""
    from prism_nemo.training.midtrain import forward_step
    from prism_nemo.training.trainer import Trainer

    settings = OptimizerConfig(LR, WEIGHT_DECAY, *BETAS, EPS, CLIP)
    torch.manual_seed(0)
    trainer = Trainer(architecture_from_hf(hf_values(shape), "benchmark"), runtime, settings, sequence, True)
    trainer.set_learning_rate(LR)
    rows = TOKENS // sequence
    mask = torch.ones(rows, sequence)
    positions = torch.arange(sequence).expand(rows, -1)

    def step(tokens: torch.Tensor, labels: torch.Tensor) -> float:
        batch = {"tokens": tokens, "labels": labels, "loss_mask": mask, "position_ids": positions}
        result = trainer.step(forward_step, iter([batch]), 1, rows, sequence)
        return result.sums["loss"] / result.sums["tokens"]

    return step, trainer.raw


def peer(model: torch.nn.Module, shape: dict[str, Any], autocast: bool) -> Step:
    """One update with transformers' model, starting from our weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from prism_nemo.checkpoint.convert import hf_tensors

    config = AutoConfig.for_model(**shape)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    # transformers renames Nemotron-H's tensors when it reads files; here they are handed over directly.
    weights = {
        name.replace("backbone.", "model."): tensor.float()
        for name, tensor in hf_tensors(model, model.architecture)  # type: ignore[arg-type]
    }
    theirs.load_state_dict(weights, strict=True)
    theirs.train()
    norms = [p for p in theirs.parameters() if p.dim() == 1]
    matrices = [p for p in theirs.parameters() if p.dim() > 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, fused=True)

    def step(tokens: torch.Tensor, labels: torch.Tensor) -> float:
        optimizer.zero_grad()
        # shift_labels: the labels are already one position on, so both sides score the same tokens.
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = theirs(input_ids=tokens, labels=labels, shift_labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), CLIP)
        optimizer.step()
        return float(loss.detach())

    return step


def peak(dtype: torch.dtype) -> float:
    """FLOP/s of a large product of matrices on this machine, best of several."""
    a = torch.randn(2048, 2048).to(dtype)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        torch.mm(a, a)
        seconds.append(time.perf_counter() - began)
    return float(2 * 2048**3 / min(seconds))


def measure(case: str, rounds: int) -> list[dict[str, Any]]:
    """Alternate the steps of all four; medians over rounds."""
    shape, sequence, target = CASES[case]
    runtime = start(ParallelConfig(), seed=0)
    contestants: dict[str, Step] = {}
    contestants["ours fp32"], model = ours(shape, sequence, runtime)
    contestants["peer fp32"] = peer(model, shape, False)
    contestants["peer bf16"] = peer(model, shape, True)
    contestants["ours bf16"], _ = ours(shape, sequence, dataclasses.replace(runtime, dtype=torch.bfloat16))
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    losses: dict[str, float] = {}
    for i, (tokens, labels) in enumerate(batches(rounds + 2, sequence)):
        for name in list(contestants) if i % 2 else reversed(list(contestants)):
            began = time.perf_counter()
            losses[name] = contestants[name](tokens, labels)
            if i >= 2:
                seconds[name].append(time.perf_counter() - began)
    rates = {name: TOKENS / statistics.median(spent) for name, spent in seconds.items()}
    flops = training_flops(model.architecture, [sequence] * (TOKENS // sequence))  # type: ignore[arg-type]
    share = {
        f"{side} {kind}": round(rates[f"{side} {kind}"] / TOKENS * flops / peak(dtype), 3)
        for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        for side in ("ours", "peer")
    }
    stop()
    found = []
    for mine, theirs, goal in (
        ("ours fp32", "peer fp32", None),
        ("ours bf16", "peer bf16", None),
        ("ours bf16", "peer fp32", target),
    ):
        ratio = statistics.median(b / a for a, b in zip(seconds[mine], seconds[theirs], strict=True))
        found.append(
            {
                "name": f"train_throughput {case}: {mine} / {theirs}",
                "ours": round(rates[mine], 1),
                "peer": round(rates[theirs], 1),
                "unit": "tokens/s",
                "ratio": round(ratio, 3),
                "target": goal,
                "pass": None if goal is None else ratio >= goal,
                "share_of_peak": {"ours": share[mine], "peer": share[theirs]},
                "last_losses": {"ours": round(losses[mine], 4), "peer": round(losses[theirs], 4)},
                "parameters": sum(p.numel() for p in model.parameters()),
                "ratios": [round(b / a, 3) for a, b in zip(seconds[mine], seconds[theirs], strict=True)],
            }
        )
    return found


def steps_per_second(parallel: ParallelConfig, steps: int) -> float:
    """Updates of the dense shape per second, after two to warm up; every process has 2,048 tokens a step."""
    runtime = start(parallel, seed=0)
    step, _ = ours(DENSE, 256, runtime)
    data = batches(steps + 2, 256)
    for tokens, labels in data[:2]:
        step(tokens, labels)
    began = time.perf_counter()
    for tokens, labels in data[2:]:
        step(tokens, labels)
    seconds = time.perf_counter() - began
    stop()
    return steps / seconds


def scaling(rounds: int) -> dict[str, Any]:
    """Two processes against one, in turn."""
    from train_throughput import steps_per_second as work  # by a name that its processes can import

    from prism_nemo.runtime.launch import launch

    layouts = {"one": ParallelConfig(), "two": ParallelConfig(data_parallel_size=2, overlap_grad_reduce=True)}
    rates: dict[str, list[float]] = {name: [] for name in layouts}
    for i in range(max(3, rounds // 2)):
        for name in list(layouts) if i % 2 else reversed(list(layouts)):
            parallel = layouts[name]
            found = launch(work, parallel, 12, processes=parallel.world_size)
            rates[name].append(found * parallel.data_parallel_size * TOKENS)
    ratio = statistics.median(two / one for one, two in zip(rates["one"], rates["two"], strict=True))
    return {
        "name": "train_throughput dp2: two processes / one",
        "ours": round(statistics.median(rates["two"]), 1),
        "peer": round(statistics.median(rates["one"]), 1),
        "unit": "tokens/s",
        "ratio": round(ratio, 3),
        "target": 1.7,
        "pass": ratio >= 1.7,
        "rounds": {name: [round(rate) for rate in found] for name, found in rates.items()},
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--cases", nargs="+", choices=[*CASES, "dp2"], default=[*CASES, "dp2"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for case in arguments.cases:
        for result in [scaling(arguments.rounds)] if case == "dp2" else measure(case, arguments.rounds):
            if arguments.json:
                print(json.dumps(result), flush=True)
            else:
                goal = "" if result["target"] is None else f" (target {result['target']})"
                print(
                    f"{result['name']}: {result['ours']} / {result['peer']} tok/s, {result['ratio']}{goal}", flush=True
                )


if __name__ == "__main__":
    main()
