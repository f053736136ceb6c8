"""Losses do not depend on how the work is laid out, and are those of a plain PyTorch loop.

Tolerances. All runs compute the same sums in fp32 in another order. A loss near 5 has a spacing of 5e-7; at a learning
rate of 1e-2 differences grow from step to step. Seen here after ten steps: at most 3e-7 in the loss and 1.1e-6 in the
gradient norm between layouts (shared/reference/megatron_on_cpu.md, section 4, saw 8e-6 and 6e-5 after twenty). The
limits are about fifteen times that; a gradient that is wrong by one part in ten thousand breaks both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import hf_model as reference_model
from tiny_models import save_tiny
from tiny_training import LAYOUTS, STEPS, column, midtrain_config, write_llama
from training_workers import decay_alone, train_on_rows

from prism_nemo.checkpoint.convert import import_hf
from prism_nemo.config import OptimizerConfig, ParallelConfig
from prism_nemo.data.manifest import load_manifest
from prism_nemo.data.plan import make_plan
from prism_nemo.data.samples import Samples
from prism_nemo.runtime.launch import launch
from prism_nemo.training.midtrain import midtrain

LOSS, GRAD_NORM = 5e-6, 2e-5


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "TP1"])
def test_layouts_agree(layout: str, run_of: Callable[..., Path]) -> None:
    one, other = run_of("TP1"), run_of(layout)
    assert column(one, "loss")[-1] < column(one, "loss")[0] - 0.5  # the comparison is of runs that learn
    assert len(column(other, "loss")) == STEPS
    assert column(other, "loss") == pytest.approx(column(one, "loss"), abs=LOSS)
    assert column(other, "grad_norm") == pytest.approx(column(one, "grad_norm"), abs=GRAD_NORM)
    assert column(other, "validation_loss") == pytest.approx(column(one, "validation_loss"), abs=LOSS)
    assert column(other, "lr") == column(one, "lr")
    assert column(other, "tokens") == column(one, "tokens")
    for name in ("letters", "digits"):
        assert column(other, f"tokens/{name}") == column(one, f"tokens/{name}")
        assert column(other, f"loss/{name}") == pytest.approx(column(one, f"loss/{name}"), abs=2 * LOSS)


@pytest.mark.parametrize("micro_batch_size", [1, 8])
def test_micro_batches_do_not_matter(micro_batch_size: int, run_of: Callable[..., Path]) -> None:
    one, other = run_of("TP1"), run_of("TP1", micro_batch_size)
    assert column(other, "loss") == pytest.approx(column(one, "loss"), abs=LOSS)
    assert column(other, "grad_norm") == pytest.approx(column(one, "grad_norm"), abs=GRAD_NORM)


def _masked_rows(steps: int, vocab_size: int = 255) -> list[dict[str, torch.Tensor]]:
    """Rows of which between none and all tokens count."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for _ in range(steps):
        text = torch.randint(0, vocab_size, (8, 33), generator=generator)
        # The second half, which is the second data-parallel rank's, counts far fewer tokens than the first.
        share = torch.tensor([1.0, 0.9, 1.0, 0.8, 0.1, 0.0, 0.05, 0.3])
        mask = (torch.rand(8, 32, generator=generator) < share[:, None]).float()
        positions = torch.arange(32).expand(8, 32)
        rows.append({"tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": mask, "position_ids": positions})
    return rows


def _reference(
    hf_dir: Path, steps: list[dict[str, torch.Tensor]], rates: list[float], optimizer: OptimizerConfig
) -> dict[str, list[float]]:
    """A plain PyTorch loop over transformers' model."""
    model: Any = reference_model(hf_dir).train()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() == 1]
    adam = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": optimizer.weight_decay}, {"params": gains, "weight_decay": 0.0}],
        lr=optimizer.lr,
        betas=(optimizer.adam_beta1, optimizer.adam_beta2),
        eps=optimizer.adam_eps,
    )
    found: dict[str, list[float]] = {"loss": [], "grad_norm": []}
    for rows, rate in zip(steps, rates, strict=True):
        # Documents that are kept apart are read one by one.
        parts = pairwise(rows["cu_seqlens"].tolist()) if "cu_seqlens" in rows else [(0, rows["tokens"].shape[1])]
        logits = torch.cat([model(input_ids=rows["tokens"][:, a:b], use_cache=False).logits for a, b in parts], 1)
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows["labels"], reduction="none")
        loss = (losses * rows["loss_mask"]).sum() / rows["loss_mask"].sum()
        adam.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer.clip_grad)
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()
        found["loss"].append(loss.item())
        found["grad_norm"].append(norm.item())
    return found


def test_unequal_masks_are_divided_by_the_tokens_of_the_global_batch(hf_model: Path) -> None:
    """Averages per micro-batch or per rank would weigh the few tokens of the second half as much as the many."""
    steps, optimizer = _masked_rows(4), OptimizerConfig(lr=5e-3, adam_eps=1e-4)
    expected = _reference(hf_model, steps, [optimizer.lr] * 4, optimizer)
    for parallel, micro_batch_size in (
        (ParallelConfig(), 1),
        (ParallelConfig(), 8),
        (ParallelConfig(data_parallel_size=2), 1),
        (ParallelConfig(data_parallel_size=2), 4),
        (ParallelConfig(pipeline_model_parallel_size=2), 2),
    ):
        found = launch(
            train_on_rows, str(hf_model), parallel, steps, micro_batch_size, optimizer, processes=parallel.world_size
        )
        assert found["tokens"] == [rows["loss_mask"].sum().item() for rows in steps]
        assert found["loss"] == pytest.approx(expected["loss"], abs=LOSS), (parallel, micro_batch_size)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], abs=GRAD_NORM), (parallel, micro_batch_size)


@pytest.mark.parametrize("layout", ["TP1", "TP2", "TP2 SP", "PP2", "DP2", "PP2 VPP2", "CP2"])
@pytest.mark.parametrize("case", ["mistral-window", "granite-4", "granite-hybrid-one-group", "nemotron-h"])
def test_every_family_trains_as_plain_pytorch_does(case: str, layout: str, tmp_path: Path) -> None:
    """Tied embeddings over pipeline stages, B and C on every rank, states, windows, scalars: after updates, too.

    The clip binds at every step, so a replicated weight that the gradient norm counts twice shows in the losses.
    """
    hf, parallel = save_tiny(case, tmp_path / "hf"), LAYOUTS[layout]
    steps, optimizer = _masked_rows(4, 149), OptimizerConfig(lr=2e-3, adam_eps=1e-4, clip_grad=0.5)
    expected = _reference(hf, steps, [optimizer.lr] * 4, optimizer)
    assert min(expected["grad_norm"]) > 0.5
    found = launch(train_on_rows, str(hf), parallel, steps, 2, optimizer, processes=parallel.world_size)
    assert found["loss"] == pytest.approx(expected["loss"], abs=LOSS)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=GRAD_NORM)


@pytest.mark.parametrize(("tied", "isolate"), [(True, True), (False, True), (True, False)])
def test_equals_plain_pytorch(tied: bool, isolate: bool, data: Path, tmp_path: Path) -> None:
    """transformers' Llama, torch.optim.AdamW, torch's clipping: the same losses and gradient norms.

    With documents kept apart, the reference is given each of them alone.

    Weight decay 1 and a clip that binds at every step, so that a wrong group, rate, clip or denominator shows.
    """
    hf = write_llama(tmp_path / "hf", seed=5, tie_word_embeddings=tied)
    import_hf(hf, tmp_path / "native", ParallelConfig())
    optimizer = OptimizerConfig(lr=1e-2, weight_decay=1.0, adam_eps=1e-4, clip_grad=0.5)
    config = midtrain_config(tmp_path / "run", data, tmp_path / "native", optimizer=optimizer)
    config.data.isolate_documents = isolate
    launch(midtrain, config)
    manifest = load_manifest(data)
    plan = make_plan(manifest, seq_length=32, seed=config.seed, packing=config.data.packing)
    samples = Samples(manifest, plan, tmp_path / "run" / "index", isolate)
    steps = [samples.rows(step * 8, 8) for step in range(STEPS)]
    assert all(("cu_seqlens" in rows) == isolate for rows in steps)
    # Warm-up over three steps, then a cosine to a tenth, written out.
    rates = [1e-2 / 3, 2e-2 / 3, 1e-2]
    rates += [1e-2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / (STEPS - 3)))) for i in range(STEPS - 3)]
    expected = _reference(hf, steps, rates, optimizer)
    assert min(expected["grad_norm"]) > 0.5
    assert column(config.run_dir, "lr") == pytest.approx(rates, rel=1e-12)
    assert column(config.run_dir, "loss") == pytest.approx(expected["loss"], abs=LOSS)
    assert column(config.run_dir, "grad_norm") == pytest.approx(expected["grad_norm"], abs=GRAD_NORM)


@pytest.mark.parametrize("distributed", [True, False])
def test_weight_decay_touches_matrices_only(distributed: bool, hf_model: Path) -> None:
    """With gradients of exactly zero, an update multiplies matrices by 1 - lr x decay and leaves norms alone."""
    lr = 0.25
    changes = launch(decay_alone, str(hf_model), distributed, lr)
    assert {dims for dims, _, _ in changes.values()} == {1, 2}
    for name, (dims, low, high) in changes.items():
        wanted = 1.0 if dims == 1 else 1.0 - lr * 0.1
        assert (low, high) == pytest.approx((wanted, wanted), abs=1e-6), name
