"""Log-probabilities that a model gives to responses, through tensor- and pipeline-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from prism_nemo.config import ParallelConfig
from prism_nemo.models.forward import positions
from prism_nemo.rl.rollout import PolicyBatch


def length_fields(parallel: ParallelConfig) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig with which pipeline stages tell each other every micro-batch's length."""
    if parallel.pipeline_model_parallel_size == 1:
        return {}
    # Megatron asks this of the dispatcher of experts, also where there are none (transformer_config.py:1828).
    return {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"}


def token_logprobs(model: torch.nn.Module, batch: PolicyBatch) -> torch.Tensor:
    """One stage's output: [B, S] log-probabilities of the labels on the last pipeline stage, activations before it."""
    return model(batch.tokens, positions(batch.tokens), None, labels=batch.labels)


def logprobs_of(output: torch.Tensor) -> torch.Tensor:
    """[B, S] fp32 log-probabilities from the model's output, which is a loss."""
    return -output.float()


@torch.no_grad()
def score_batches(model: torch.nn.Module, batches: Sequence[PolicyBatch]) -> list[torch.Tensor]:
    """Forward passes without gradients; every rank of the model-parallel group calls this with the same batches.

    Args:
        model: This rank's stage.
        batches: Any lengths.

    Returns:
        [B, S] fp32 log-probabilities of each batch's labels on the last pipeline stage; an empty list on the others.
    """
    if not batches:
        return []

    def step(stream: Iterator[PolicyBatch], stage: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        output = token_logprobs(stage, next(stream))
        return output, lambda out, non_loss_data=False: logprobs_of(out)

    outputs = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=len(batches),
        seq_length=batches[0].tokens.shape[1],
        micro_batch_size=len(batches[0].tokens),
        forward_only=True,
        collect_non_loss_data=True,
    )
    return list(outputs)
