"""The residual stream of a model on given texts: averaged over each text, and at some of its tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from prism_nemo.analysis.cka import cka_by_layer
from prism_nemo.analysis.massive import DimensionSizes
from prism_nemo.analysis.token_rows import equal_length_batches
from prism_nemo.checkpoint.native import load, read_architecture
from prism_nemo.config import ParallelConfig
from prism_nemo.data.held_out import held_out_rows
from prism_nemo.errors import InputError, PrismError
from prism_nemo.models.build import build_model
from prism_nemo.models.decoder import LanguageModel
from prism_nemo.models.forward import hidden_states
from prism_nemo.runtime import Runtime, start, stop


@dataclass(frozen=True)
class States:
    """The residual stream of one model on one input; by place in the stream, the embedding first.

    Attributes:
        pooled: [texts, hidden] fp32, the mean over all tokens of a text.
        tokens: [picked tokens, hidden] fp32.
        sizes: How large each dimension gets, over all tokens.
    """

    pooled: list[torch.Tensor]
    tokens: list[torch.Tensor]
    sizes: list[DimensionSizes]


def pick_tokens(rows: Sequence[Sequence[int]], per_text: int, seed: int) -> list[list[int]]:
    """Places of tokens, the same for every model: up to `per_text` of each text, drawn without replacement.

    Memory grows with their number, not with that of all tokens: at 40 layers of width 5,120 a token takes 0.8 MB.
    """
    return [
        sorted(random.Random(f"{seed}/{number}/{len(row)}").sample(range(len(row)), min(per_text, len(row))))
        for number, row in enumerate(rows)
    ]


def texts_of(picks: Sequence[Sequence[int]]) -> torch.Tensor:
    """The text that each row of `States.tokens` belongs to."""
    return torch.tensor([number for number, own in enumerate(picks) for _ in own])


def collect_states(
    model: LanguageModel, rows: Sequence[Sequence[int]], picks: Sequence[Sequence[int]], batch_tokens: int
) -> States:
    """Run a model over texts, in batches without padding (see `equal_length_batches`).

    Args:
        model: Whole on this rank.
        rows: Token ids of each text.
        picks: From `pick_tokens`.
        batch_tokens: Most tokens of a batch, but always one text.

    Returns:
        Rows in the order of the texts.

    Raises:
        PrismError: If a state is not finite.
    """
    device = next(model.parameters()).device
    firsts = [0]
    for own in picks:
        firsts.append(firsts[-1] + len(own))
    pooled: list[torch.Tensor] = []
    tokens: list[torch.Tensor] = []
    sizes: list[DimensionSizes] = []
    for places, batch in equal_length_batches(rows, batch_tokens):
        for layer, state in enumerate(hidden_states(model, batch.to(device))):
            if layer == len(pooled):
                hidden = state.shape[-1]
                pooled.append(torch.empty(len(rows), hidden))
                tokens.append(torch.empty(firsts[-1], hidden))
                sizes.append(DimensionSizes())
            if not bool(torch.isfinite(state).all()):
                raise PrismError(f"layer {layer}: a hidden state holds NaN or Inf; the weights have diverged")
            # In fp64: a sum over tokens in bf16 would lose what is small beside a massive dimension.
            pooled[layer][places] = state.double().mean(dim=1).float().cpu()
            sizes[layer].update(state.flatten(0, 1))
            for row, place in enumerate(places):
                tokens[layer][firsts[place] : firsts[place + 1]] = state[row, list(picks[place])].float().cpu()
    for size in sizes:
        size.to_cpu()
    return States(pooled, tokens, sizes)


def pooled_states(checkpoint: Path, tokens: torch.Tensor, runtime: Runtime, batch_size: int = 32) -> list[torch.Tensor]:
    """Residual stream of one checkpoint, averaged over each row's tokens.

    Args:
        checkpoint: Native checkpoint.
        tokens: [rows, seq_length].
        runtime: Of one process.
        batch_size: Rows per forward pass.

    Returns:
        num_layers + 1 tensors of [rows, hidden], the embedding first.
    """
    model = build_model(read_architecture(checkpoint), runtime)
    load(checkpoint, model)
    parts = [
        [state.float().mean(dim=1).cpu() for state in hidden_states(model, rows.to(runtime.device))]
        for rows in tokens.split(batch_size)
    ]
    return [torch.cat(layer) for layer in zip(*parts, strict=True)]


def compare_activations(pairs: list[tuple[str, str]], data: str, source: str, rows: int, seq_length: int) -> list[dict]:
    """Linear CKA per layer for each pair of checkpoints, on evenly spaced held-out rows.

    Args:
        pairs: (checkpoint, checkpoint).
        data: Folder of built data.
        source: Held-out source in it.
        rows: Examples; must exceed the hidden size for the plain estimate to mean anything.
        seq_length: Tokens per row.

    Returns:
        One ``{"min": m, "by_layer": [...], "debiased_by_layer": [...]}`` per pair, the embedding first.

    Raises:
        InputError: If the two have different depths or vocabularies.
    """
    tokens, _ = held_out_rows(data, source, seq_length, rows)
    runtime = start(ParallelConfig(), seed=0)
    names = sorted({name for pair in pairs for name in pair})
    states = {name: pooled_states(Path(name), tokens, runtime) for name in names}
    stop()
    results = []
    for a, b in pairs:
        if len(states[a]) != len(states[b]):
            raise InputError(f"{a} and {b} have different numbers of layers; CKA is compared layer by layer")
        by_layer = cka_by_layer(states[a], states[b])
        debiased = cka_by_layer(states[a], states[b], debiased=True)
        results.append({"min": min(by_layer), "by_layer": by_layer, "debiased_by_layer": debiased})
    return results
