"""Mid-training: blended tokens through Megatron's pipeline schedules, with resume, validation and guards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from prism_nemo.checkpoint.native import read_architecture
from prism_nemo.config import MidtrainConfig
from prism_nemo.errors import InputError
from prism_nemo.models.family import Architecture, architecture_from_hf
from prism_nemo.run import RunDirectory, last_value
from prism_nemo.runtime import start, stop
from prism_nemo.training.guards import StopRequest, check_finite
from prism_nemo.training.progress import Progress
from prism_nemo.training.schedule import learning_rate
from prism_nemo.training.stage import begin, check_stage, end_step
from prism_nemo.training.trainer import Trainer

Batch = dict[str, torch.Tensor]


def check(config: MidtrainConfig) -> Architecture:
    """Everything that can be refused before processes start.

    Returns:
        The architecture that will be trained.

    Raises:
        InputError: Naming the key and what would work.
    """
    from prism_nemo.data.blend import held_out_rows
    from prism_nemo.data.manifest import load_manifest

    check_stage(config, "seq_length", "global_batch_size", "eval_interval", "data.validation_rows")
    if (config.init_from is None) == (config.model is None):
        raise InputError("give either init_from (a checkpoint) or model (a configuration to train from scratch)")
    if config.init_from is not None:
        architecture = read_architecture(Path(config.init_from))
    else:
        architecture = architecture_from_hf(dict(config.model or {}), "model")
    layout = config.parallel
    architecture.check_layout(layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size)
    if config.seq_length > architecture.max_position_embeddings:
        raise InputError(
            f"seq_length {config.seq_length} is more than the model's {architecture.max_position_embeddings}"
        )
    if config.global_batch_size % (config.micro_batch_size * layout.data_parallel_size):
        raise InputError(
            f"global_batch_size {config.global_batch_size} is not a multiple of micro_batch_size "
            f"{config.micro_batch_size} x data_parallel_size {layout.data_parallel_size}"
        )
    if layout.sequence_parallel and config.seq_length % layout.tensor_model_parallel_size:
        raise InputError("sequence_parallel needs seq_length to be a multiple of tensor_model_parallel_size")
    manifest = load_manifest(config.data.path)
    if manifest.tokenizer.vocab_size > architecture.vocab_size:
        raise InputError(
            f"{config.data.path}: tokens of a vocabulary of {manifest.tokenizer.vocab_size}, but the model has "
            f"{architecture.vocab_size}; build the data with the model's tokenizer"
        )
    if config.data.validation_source is not None:
        held_out_rows(config.data.path, config.data.validation_source, config.seq_length, validation_rows(config))
    return architecture


def language_model_loss(loss_mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Sum of the masked losses with its token count.

    Args:
        loss_mask: [b, s], 0 or 1.
        losses: [b, s] cross entropies.
    """
    loss_sum = (losses.float() * loss_mask).sum()
    tokens = loss_mask.sum()
    return loss_sum, tokens.to(torch.int), {"loss": loss_sum.detach(), "tokens": tokens}


def forward_step(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
    """Megatron's forward step for language modelling."""
    batch = next(batches)
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return losses, partial(language_model_loss, batch["loss_mask"])


def _to(device: torch.device, batches: Iterator[Batch]) -> Iterator[Batch]:
    for batch in batches:
        yield {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def validation_rows(config: MidtrainConfig) -> int:
    """Rows of a validation: what was asked for, in whole micro-batches on every data-parallel rank."""
    size = config.micro_batch_size * config.parallel.data_parallel_size
    return max(size, config.data.validation_rows // size * size)


def validate(trainer: Trainer, config: MidtrainConfig, source: str) -> float:
    """Mean loss on evenly spaced held-out rows of one source, shared over data-parallel ranks."""
    from prism_nemo.data.blend import held_out_rows

    rows = validation_rows(config)
    tokens, labels = held_out_rows(config.data.path, source, config.seq_length, rows)
    share = rows // config.parallel.data_parallel_size
    first = share * parallel_state.get_data_parallel_rank()

    def batches() -> Iterator[Batch]:
        for i in range(first, first + share, config.micro_batch_size):
            part = slice(i, i + config.micro_batch_size)
            yield {
                "tokens": tokens[part],
                "labels": labels[part],
                "loss_mask": torch.ones_like(tokens[part], dtype=torch.float32),
                "position_ids": torch.arange(config.seq_length).expand_as(tokens[part]),
            }

    sums = trainer.evaluate(
        forward_step,
        _to(trainer.runtime.device, batches()),
        share // config.micro_batch_size,
        config.micro_batch_size,
        config.seq_length,
    )
    return sums["loss"] / sums["tokens"]


def midtrain(config: MidtrainConfig, stage: str = "midtrain") -> dict[str, Any]:
    """Run or continue the stage; every rank calls this.

    Args:
        config: As resolved; `check` must have passed.
        stage: Name in the progress line.

    Returns:
        Summary: last step, last loss, tokens, seconds, checkpoint.

    Raises:
        StoppedEarly: On a signal or the time limit, after saving.
        PrismError: If the loss or gradient stops being finite, or a save fails.
    """
    from prism_nemo.data.batches import BatchIterator
    from prism_nemo.data.blend import build_blend

    runtime = start(config.parallel, config.seed)
    architecture = check(config)
    run = RunDirectory(config.run_dir, writes=runtime.is_main)
    overrides = {}
    if config.init_from is None:
        overrides = {
            "init_method_std": config.init_method_std,
            "embedding_init_method_std": config.embedding_init_method_std,
        }
    trainer = Trainer(
        architecture, runtime, config.optimizer, config.seq_length, config.use_distributed_optimizer, **overrides
    )
    state, saved = begin("midtrain", config, run, trainer)
    blend = build_blend(
        config.data.path,
        seq_length=config.seq_length,
        num_samples=config.train_steps * config.global_batch_size,
        seed=config.seed,
        cache_dir=run.path / "index",
    )
    batches = BatchIterator(
        blend,
        micro_batch_size=config.micro_batch_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=config.parallel.data_parallel_size,
        global_batch_size=config.global_batch_size,
        consumed_samples=state.consumed_samples,
    )
    progress = Progress(stage, config.train_steps, state.step, runtime.is_main)
    loss = last_value(run.metrics_path, "loss")

    stream = _to(runtime.device, batches)
    with StopRequest(config.max_seconds, runtime.device) as request:
        while state.step < config.train_steps:
            began = time.perf_counter()
            lr = learning_rate(config.schedule, config.optimizer.lr, state.step, config.train_steps)
            trainer.set_learning_rate(lr)
            result = trainer.step(
                forward_step, stream, batches.micro_batches_per_step, config.micro_batch_size, config.seq_length
            )
            loss = result.sums["loss"] / result.sums["tokens"]
            check_finite(state.step + 1, loss=loss, grad_norm=result.grad_norm)
            seconds = time.perf_counter() - began
            tokens = int(result.sums["tokens"])
            state.step += 1
            state.consumed_samples += config.global_batch_size
            state.consumed_tokens += tokens
            state.seconds += seconds
            if state.step % config.log_interval == 0 or state.step in (1, config.train_steps):
                run.log(
                    {
                        "step": state.step,
                        "loss": loss,
                        "grad_norm": result.grad_norm,
                        "lr": lr,
                        "tokens": state.consumed_tokens,
                        "tokens_per_second": tokens / seconds,
                        "seconds": state.seconds,
                    }
                )
            progress.update(state.step, f"loss {loss:.3f}  {state.consumed_tokens / state.seconds:,.0f} tok/s")
            source = config.data.validation_source
            if source is not None and (state.step % config.eval_interval == 0 or state.step == config.train_steps):
                run.log({"step": state.step, "validation_loss": validate(trainer, config, source)})
            saved = end_step(stage, config, run, trainer, state, request) or saved
    stop()
    return {
        "step": state.step,
        "loss": loss,
        "tokens": state.consumed_tokens,
        "seconds": state.seconds,
        "checkpoint": str(saved),
    }
