"""Do sampler and trainer compute the same policy? Asked before the first update, and again before every other one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from prism_nemo.errors import InputError, PrismError
from prism_nemo.generation.parity import layer_gaps
from prism_nemo.rl.rollout import PolicyBatch, Rollout
from prism_nemo.rl.scoring import logprobs_of, token_logprobs
from prism_nemo.training.trainer import Trainer

# fp32 log-probabilities of sampler and trainer differ by rounding, 1e-6 per token; a wrong position, mask or cache
# shows at 1e-2 and above. bf16 kernels differ by up to 1e-2. Above this the stage refuses to start, or stops.
PARITY_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
_OTHER_BACKEND = (
    "The sampler is {backend}: the same run with rollout.backend=native tells whether {backend} computes another "
    "function or was not given the weights"
)


def check_parity(
    trainer: Trainer, rollouts: Sequence[Rollout], batches: Sequence[PolicyBatch], backend: str = "native"
) -> float:
    """Compare the sampler's log-probabilities with the trainer's before the first update; every rank calls this.

    Args:
        trainer: The policy.
        rollouts: This rank's, of which the longest is looked at layer by layer if they part.
        batches: All of them as tensors.
        backend: What sampled them; only the native engine's layers can be looked at.

    Returns:
        Mean absolute difference per response token.

    Raises:
        InputError: If they part: every update would then follow another policy than the one that was sampled.
    """

    def step(stream: Iterator[PolicyBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = next(stream)

        def gap_of(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            gap = ((logprobs_of(output) - batch.sampler_logprobs).abs() * batch.mask).sum()
            tokens = batch.mask.sum()
            return gap, tokens.to(torch.int), {"gap": gap, "tokens": tokens}

        return token_logprobs(model, batch), gap_of

    limit = PARITY_LIMIT[trainer.runtime.dtype]
    shape = (len(batches[0].tokens), batches[0].tokens.shape[1])
    sums = trainer.evaluate(step, iter(batches), len(batches), *shape)
    mean = sums["gap"] / sums["tokens"]
    if not mean <= limit:  # also where it is not a number
        where = _where(trainer, rollouts) if backend == "native" else _OTHER_BACKEND.format(backend=backend)
        raise InputError(
            f"sampler and trainer disagree: mean log-probability gap {mean:.2e} per token on the first batch (limit "
            f"{limit:.0e}); updates would not follow the sampled policy. {where}"
        )
    return mean


def check_gap(sums: dict[str, float], dtype: torch.dtype, step: int) -> None:
    """Stop when sampler and trainer part after the first update, before the weights change again.

    A sampler with weights of its own does so when it was not brought up to date. Called with the sums of an update's
    batch, which are equal on every rank.

    Args:
        sums: With ``logprob_gap`` and ``tokens``. Those that are not finite are left to `StepGuard`.
        dtype: Of the trainer.
        step: Its number, for the message.

    Raises:
        PrismError: If the mean gap is above the limit of the first batch.
    """
    if not sums["tokens"]:
        return
    gap, limit = sums["logprob_gap"] / sums["tokens"], PARITY_LIMIT[dtype]
    if math.isfinite(gap) and gap > limit:
        raise PrismError(
            f"step {step}: sampler and trainer have parted: mean log-probability gap {gap:.2e} per token (limit "
            f"{limit:.0e}), although they agreed on the first batch. This update was not applied, and the last "
            "checkpoint is good. A sampler that kept old weights does this (try rollout.backend=native); so does a "
            "policy whose rounding has grown (compare logprob_gap of the steps before in metrics.jsonl)"
        )


def _where(trainer: Trainer, rollouts: Sequence[Rollout]) -> str:
    """Names the layers at which the two part, on this rank's longest response."""
    longest = max(rollouts, key=lambda r: len(r.response.prompt) + len(r.response.tokens))
    tokens = longest.response.prompt + longest.response.tokens
    layout = trainer.runtime.parallel
    if layout.sequence_parallel:  # ranks share the sequence in equal parts
        tokens = tokens[: len(tokens) // layout.tensor_model_parallel_size * layout.tensor_model_parallel_size]
    gaps = layer_gaps(trainer.raw, tokens)
    # Rounding grows slowly from layer to layer; the first layer that adds tenfold is where it went wrong.
    before = 1e-5 if trainer.runtime.dtype == torch.float32 else 1e-2
    for name, gap in gaps:
        if not gap <= 10 * before:
            listed = ", ".join(f"{n} {g:.1e}" for n, g in gaps)
            return f"They part at {name} (largest difference of the hidden states: {listed})"
        before = max(before, gap)
    return "The hidden states of every layer agree: they part at the output layer or in the sampling"
