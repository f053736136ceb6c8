"""CKA between two checkpoints on the same held-out text."""

from __future__ import annotations

from pathlib import Path

import torch

from prism_nemo.analysis.cka import cka_by_layer
from prism_nemo.checkpoint.native import load, read_architecture
from prism_nemo.config import ParallelConfig
from prism_nemo.data.held_out import held_out_rows
from prism_nemo.errors import InputError
from prism_nemo.models.build import build_model
from prism_nemo.models.forward import hidden_states
from prism_nemo.runtime import Runtime, start, stop


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
        One ``{"min": m, "by_layer": [...]}`` per pair, the embedding first.

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
        results.append({"min": min(by_layer), "by_layer": by_layer})
    return results
