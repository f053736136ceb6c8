from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from prism_nemo.data.build import load_manifest
from prism_nemo.data.held_out import HeldOut, held_out_rows
from prism_nemo.errors import InputError


def stored_documents(built: Path) -> list[np.ndarray]:
    stored = IndexedDataset(load_manifest(built).prefix("held"))
    return [stored[i].astype(np.int64) for i in range(len(stored))]


def test_rows_are_spread_over_the_source(built: Path) -> None:
    stream = np.concatenate(stored_documents(built))
    tokens, labels = held_out_rows(built, "held", 16, 10)
    assert tokens.shape == labels.shape == (10, 16)
    assert tokens.dtype == labels.dtype == torch.int64
    assert tokens[0].tolist() == stream[:16].tolist()
    assert labels[0].tolist() == stream[1:17].tolist()
    assert labels[-1].tolist() == stream[-16:].tolist()
    assert torch.equal(tokens, held_out_rows(built, "held", 16, 10)[0])
    most = (len(stream) - 1) // 16
    full, _ = held_out_rows(built, "held", 16, most)
    assert len(full) == most
    with pytest.raises(InputError, match=f"at most {most} rows"):
        held_out_rows(built, "held", 16, most + 1)
    with pytest.raises(InputError, match="at least 1"):
        held_out_rows(built, "held", 16, 0)


@pytest.mark.parametrize("seq_length", [7, 16, 100])
def test_batches_are_the_same_rows_with_documents_kept_apart(built: Path, seq_length: int) -> None:
    manifest = load_manifest(built)
    eos, rows = manifest.tokenizer.eos_id, (manifest.source("held").tokens - 1) // seq_length
    tokens, labels = held_out_rows(built, "held", seq_length, rows)
    batch = HeldOut(built, "held", seq_length, rows).batch(1, rows - 1)
    assert torch.equal(batch["tokens"].view(rows - 1, -1), tokens[1:])
    counted = batch["loss_mask"].view(rows - 1, -1) == 1
    assert torch.equal(batch["labels"].view(rows - 1, -1)[counted], labels[1:][counted])
    assert torch.equal(counted, tokens[1:] != eos)  # only what follows the end of a document is not predicted
    assert seq_length > 7 or (tokens[1:, -1] == eos).any()  # also where a row ends with its document
    begins = (batch["position_ids"] == 0).flatten().nonzero().flatten().tolist()
    assert begins == batch["cu_seqlens"].tolist()[:-1]
    after_an_end = [i + 1 for i in (tokens[1:].flatten() == eos).nonzero().flatten().tolist()]
    first_of_row = {row * seq_length for row in range(rows)}
    assert set(begins) == (first_of_row | set(after_an_end)) - {(rows - 1) * seq_length}
    running = HeldOut(built, "held", seq_length, rows, isolate=False).batch(1, rows - 1)
    assert torch.equal(running["labels"][:, :-1], labels[1:, :-1])
