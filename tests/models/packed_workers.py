"""Packed micro-batches through Megatron's schedule, beside each document alone in transformers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from parity_workers import _trainer, gradient_errors
from tiny_models import hf_model

from prism_nemo.config import ParallelConfig
from prism_nemo.models.family import read_hf_config
from prism_nemo.runtime import start, stop

Batch = dict[str, torch.Tensor]

# Documents of four micro-batches of 256 tokens, so that a pipeline of four stages has several at work at once.
LENGTHS = [
    [7, 16, 1, 23, 9, 72, 128],  # two rows of 128, one filled by one document
    [50, 1, 1, 100, 30, 3, 40, 31],  # no document begins where the second row would
    [16] * 8 + [8] * 16,  # nothing to pad
    [0, 40, 0, 88, 0, 0, 60, 40, 28],  # documents without tokens
]
TOKENS = 256


def packed_batches(vocab_size: int) -> list[Batch]:
    """Random tokens, labels and masks: the labels need not be the next tokens."""
    generator = torch.Generator().manual_seed(11)
    batches = []
    for lengths in LENGTHS:
        tokens, labels = torch.randint(0, vocab_size, (2, 1, TOKENS), generator=generator)
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        batches.append({
            "tokens": tokens,
            "labels": labels,
            "loss_mask": (torch.rand(1, TOKENS, generator=generator) < 0.8).float(),
            "position_ids": positions,
            "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        })  # fmt: skip
    return batches


def documents_alone(hf_dir: Path, path: Path) -> Path:
    """Save transformers' sum of losses over all documents, each in a pass of its own, and the mean's gradients."""
    model = hf_model(hf_dir).train()
    batches = packed_batches(model.config.vocab_size)
    count = sum(batch["loss_mask"].sum() for batch in batches)
    total = 0.0
    for batch in batches:
        bounds = batch["cu_seqlens"].tolist()
        for i in range(len(bounds) - 1):
            part = slice(bounds[i], bounds[i + 1])
            if bounds[i] == bounds[i + 1]:
                continue
            logits = model(input_ids=batch["tokens"][:, part], use_cache=False).logits[0]
            losses = torch.nn.functional.cross_entropy(logits, batch["labels"][0, part], reduction="none")
            loss = (losses * batch["loss_mask"][0, part]).sum()
            (loss / count).backward()
            total += loss.item()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.save({"loss": total, "gradients": gradients}, path)
    return path


def train_packed(
    folders: dict[str, tuple[str, str]], parallel: ParallelConfig, faulty_stages: tuple[int | None, ...] = (None,)
) -> list[dict[str, tuple[float, float]]]:
    """Forward and backward of all micro-batches, as a training step does.

    Args:
        folders: Of each case, the reference's folder and what `documents_alone` saved.
        parallel: Layout.
        faulty_stages: One pass for each: a pipeline stage that forgets where documents begin, or None.

    Returns:
        For each pass and case, the relative error of the sum of losses, and the largest error of a gradient (see
        `gradient_errors`).
    """
    from prism_nemo.training.midtrain import forward_step

    runtime = start(parallel, seed=1)  # once: several processes cannot make their groups a second time
    errors: list[dict[str, tuple[float, float]]] = [{} for _ in faulty_stages]
    for case, (hf_dir, expected_path) in folders.items():
        read = read_hf_config(Path(hf_dir))
        trainer = _trainer(read, hf_dir, parallel, TOKENS, runtime)
        expected = torch.load(expected_path)
        for stage, found in zip(faulty_stages, errors, strict=True):
            stream = _stream(packed_batches(read.vocab_size), faulty=stage == _stage())
            # Not taking the step leaves the gradients where they are, unclipped.
            judge = lambda sums, norm: "only compared"  # noqa: E731
            sums = trainer.step(forward_step, stream, len(LENGTHS), 1, TOKENS, judge).sums
            worst = max(gradient_errors(trainer, read, parallel, expected["gradients"]).values())
            found[case] = (abs(sums["loss"] / expected["loss"] - 1), worst)
    stop()
    return errors


def _stage() -> int:
    from megatron.core import parallel_state

    return int(parallel_state.get_pipeline_model_parallel_rank())


def _stream(batches: list[Batch], faulty: bool) -> Iterator[Batch]:
    """Micro-batches whose documents come in one buffer, filled anew for each, as a loader may do."""
    buffer = torch.empty(max(len(batch["cu_seqlens"]) for batch in batches), dtype=torch.int32)
    for batch in batches:
        ends = batch.pop("cu_seqlens")
        own = buffer[: len(ends)]
        own.copy_(ends)
        yield batch if faulty else {**batch, "cu_seqlens": own}


def leaks(folders: dict[str, tuple[str, str]]) -> dict[tuple[str, str], float]:
    """Largest change of other documents' losses when one document's tokens change, for Megatron's own class too."""
    from megatron.core.packed_seq_params import PackedSeqParams

    from prism_nemo.models.layers.documents import pack_documents

    runtime, parallel = start(ParallelConfig(), seed=1), ParallelConfig()
    worst: dict[tuple[str, str], float] = {}
    for case, (hf_dir, _) in folders.items():
        trainer = _trainer(read_hf_config(Path(hf_dir)), hf_dir, parallel, TOKENS, runtime)
        for batch in packed_batches(trainer.architecture.vocab_size)[:2]:
            ends = batch["cu_seqlens"]
            plain = PackedSeqParams("thd", ends, ends, max_seqlen_q=TOKENS, max_seqlen_kv=TOKENS)
            for packed in (pack_documents(ends), plain):
                key = case, type(packed).__name__
                worst[key] = max(worst.get(key, 0.0), _leak(trainer.raw.eval(), batch, packed))
    stop()
    return worst


@torch.no_grad()
def _leak(model: Any, batch: Batch, packed: Any) -> float:
    """See `leaks`."""

    def losses(tokens: torch.Tensor) -> torch.Tensor:
        return model(tokens, batch["position_ids"], None, labels=batch["labels"], packed_seq_params=packed)[0]

    whole, worst, bounds = losses(batch["tokens"]), 0.0, batch["cu_seqlens"].tolist()
    for first, last in pairwise(bounds):
        other = batch["tokens"].clone()
        other[:, first:last] = (other[:, first:last] + 1) % model.architecture.vocab_size
        moved = (losses(other) - whole).abs()
        assert moved[first:last].max() > 1e-3
        moved[first:last] = 0
        worst = max(worst, moved.max().item())
    return worst
