"""Attention to packed documents in groups, beside one call per document and one masked call; and a whole step.

    python benchmarks/packed_attention.py [--json] [--rounds 15] [--threads 1]

The first figures are forward and backward of the core attention with its rotary embedding, fp32, all three on the same
tensors and checked against each other: 16 rows of 256 tokens in documents of 8 to 60 (a pocket-size micro-batch), and
one row of 4096 in a few documents of 50 to 2000. What is prepared once per micro-batch for all layers is prepared
outside the clock there. The last figure is a training step of the quickstart's model with everything inside the clock,
documents isolated (ours) and not (peer), on the same tokens. Sides alternate; figures are medians of per-round ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from prism_nemo.config import OptimizerConfig, ParallelConfig
from prism_nemo.models.family import Rope, architecture_from_hf
from prism_nemo.models.layers.attention import SDPACoreAttention
from prism_nemo.models.layers.documents import pack_documents
from prism_nemo.models.layers.rope import inverse_frequencies
from prism_nemo.quickstart.settings import PocketSettings
from prism_nemo.runtime import start, stop

Side = Callable[[], Any]


def cut(rows: int, length: int, shortest: int, longest: int, seed: int) -> list[int]:
    """Random documents that fill `rows` rows of `length` tokens; returns where they begin, and the end."""
    generator = torch.Generator().manual_seed(seed)
    bounds = [0]
    for row in range(1, rows + 1):
        while bounds[-1] < row * length:
            drawn = int(torch.randint(shortest, longest + 1, (), generator=generator))
            bounds.append(min(row * length, bounds[-1] + drawn))
    return bounds


def race(sides: dict[str, Side], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side, by round; the order turns round by round, and two rounds warm up."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds + 2):
        for name in list(sides) if i % 2 else reversed(sides):
            began = time.perf_counter()
            sides[name]()
            if i >= 2:
                times[name].append(time.perf_counter() - began)
    return times


def figure(name: str, times: dict[str, list[float]], peer: str, target: float, **more: Any) -> dict[str, Any]:
    """One line: `ratio` is the peer's time over ours."""
    ratio = statistics.median(b / a for a, b in zip(times["ours"], times[peer], strict=True))
    ours, theirs = (round(1e3 * statistics.median(times[side]), 2) for side in ("ours", peer))
    figures = {"ours": ours, "peer": theirs, "unit": "ms", "ratio": round(ratio, 3)}
    return {"name": name, **figures, "target": target, "pass": ratio >= target, **more}


def attention(name: str, bounds: list[int], heads: int, groups: int, dim: int, rounds: int) -> list[dict[str, Any]]:
    """Groups against the loop and against the mask."""
    config = TransformerConfig(num_layers=1, hidden_size=heads * dim, num_attention_heads=heads, attention_dropout=0.0)
    layer = SDPACoreAttention(
        config, 1, AttnMaskType.causal, "self", inv_freq=inverse_frequencies(Rope(10000.0), dim)
    ).train()
    packed, tokens = pack_documents(bounds), bounds[-1]
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, many, dim) for many in (heads, groups, groups)]
    qkv = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    weight = torch.randn(tokens, heads * dim, generator=generator)
    document = packed.seq_idx[0]
    mask = (document[:, None] == document[None]) & torch.ones(tokens, tokens, dtype=torch.bool).tril()

    def grouped() -> torch.Tensor:
        return layer(*qkv, None, packed_seq_params=packed)

    def loop() -> torch.Tensor:
        parts = (layer(*(x[first:last, None] for x in qkv), None)[:, 0] for first, last in pairwise(bounds))
        return torch.cat(list(parts))

    def masked() -> torch.Tensor:
        grouping = packed.grouping(heads, groups, dim)
        cos, sin = (x.index_select(0, grouping.positions)[:, None] for x in layer._cos_sin(tokens, qkv[0]))
        turned = []
        for x in qkv[:2]:
            a, b = x.chunk(2, dim=-1)
            turned.append(torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1))
        q, k, v = (x.transpose(0, 1)[None] for x in (*turned, qkv[2]))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=heads != groups)
        return out[0].transpose(0, 1).flatten(1)

    def both(forward: Callable[[], torch.Tensor]) -> Side:
        return lambda: torch.autograd.grad((forward() * weight).sum(), qkv)

    sides = {"ours": both(grouped), "loop": both(loop), "mask": both(masked)}
    gap = max((forward() - grouped()).abs().max().item() for forward in (loop, masked))
    times = race(sides, rounds)
    shapes_of = packed.grouping(heads, groups, dim).shapes
    more = {
        "tokens": tokens,
        "documents": len(bounds) - 1,
        "calls": len(shapes_of),
        "padding": round(sum(n * length for n, length in shapes_of) / tokens - 1, 3),
        "largest_difference": gap,
        "threads": torch.get_num_threads(),
    }
    return [
        figure(f"packed_attention_{name}_{peer}", times, peer, target, **more)
        for peer, target in (("loop", 1.0), ("mask", 1.0))
    ]


def pocket_step(rows: int, length: int, rounds: int) -> dict[str, Any]:
    """A training step of the quickstart's model, isolated (ours) and not (peer)."""
    from prism_nemo.training.midtrain import forward_step
    from prism_nemo.training.trainer import Trainer

    runtime = start(ParallelConfig(), seed=0)
    architecture = architecture_from_hf({**PocketSettings().model, "vocab_size": 1024}, "benchmark")
    trainer = Trainer(architecture, runtime, OptimizerConfig(), length, True)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, architecture.vocab_size, (rows, length), generator=generator)
    positions = torch.arange(length).expand(rows, -1)
    plain = {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(rows, length), "position_ids": positions}
    flat = {name: tensor.reshape(1, -1) for name, tensor in plain.items()}
    packings = [torch.tensor(cut(rows, length, 8, 60, seed), dtype=torch.int32) for seed in range(rounds + 2)]
    ends = iter(packings)

    def isolated() -> Any:
        return trainer.step(forward_step, iter([{**flat, "cu_seqlens": next(ends)}]), 1, 1, rows * length)

    def whole() -> Any:
        return trainer.step(forward_step, iter([plain]), 1, rows, length)

    times = race({"ours": isolated, "plain": whole}, rounds)
    stop()
    # An isolated step may take 1.15 times as long.
    documents = round(statistics.mean(len(packing) - 1 for packing in packings), 1)
    more = {"documents": documents, "threads": torch.get_num_threads()}
    return figure(f"isolated_step_{rows}x{length}", times, "plain", round(1 / 1.15, 3), **more)


def measure(rounds: int) -> list[dict[str, Any]]:
    """All figures."""
    return [
        *attention("pocket", cut(16, 256, 8, 60, 1), 4, 4, 32, rounds),
        *attention("long", cut(1, 4096, 50, 2000, 1), 8, 4, 64, rounds),
        pocket_step(16, 256, rounds),
        pocket_step(4, 128, rounds),
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for line in measure(arguments.rounds):
        if arguments.json:
            print(json.dumps(line))
        else:
            print(
                f"{line['name']}: ours {line['ours']} ms, peer {line['peer']} ms, "
                f"ratio {line['ratio']} (target {line['target']})"
            )


if __name__ == "__main__":
    main()
