"""From a step's rollouts to one or several updates of the weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from prism_nemo.config import RLConfig
from prism_nemo.rl.collect import sum_over_ranks
from prism_nemo.rl.grpo import policy_loss, response_weights
from prism_nemo.rl.reference import Reference
from prism_nemo.rl.rollout import PolicyBatch, Rollout, collate
from prism_nemo.rl.scoring import logprobs_of, score_batches, token_logprobs
from prism_nemo.runtime import gather
from prism_nemo.training.trainer import Judge, StepResult, Trainer


class Updater:
    """Turns rollouts into updates.

    Args:
        config: Of the stage.
        trainer: The policy.
        reference: For the KL term, or None.
        pad_id: Of the tokenizer.
    """

    def __init__(self, config: RLConfig, trainer: Trainer, reference: Reference | None, pad_id: int) -> None:
        self._config, self._trainer, self._reference, self._pad_id = config, trainer, reference, pad_id
        layout = config.parallel
        self._multiple = layout.tensor_model_parallel_size if layout.sequence_parallel else 1

    def micro_batches(self, rollouts: Sequence[Rollout], weights: Sequence[float] | None = None) -> list[PolicyBatch]:
        """Rollouts as micro-batches, sorted by length so that little is padding."""
        lengths = [len(r.response.prompt) + len(r.response.tokens) for r in rollouts]
        order = sorted(range(len(rollouts)), key=lengths.__getitem__)
        size = self._config.micro_batch_size
        batches = []
        for first in range(0, len(order), size):
            rows = order[first : first + size]
            weight = None if weights is None else [weights[i] for i in rows]
            device = self._trainer.runtime.device
            batches.append(collate([rollouts[i] for i in rows], self._pad_id, device, weight, self._multiple))
        return batches

    def prepare(self, used: Sequence[Rollout], spare: Rollout) -> list[list[PolicyBatch]]:
        """Split a step's rollouts into the mini-batches of its updates; every rank calls this.

        Args:
            used: Groups that take part; may be empty on a rank.
            spare: Any rollout of this rank; it joins with no weight where the rank has none of its own, as all ranks
                reduce together.

        Returns:
            One for each update of an epoch; none where no rank has anything.
        """
        grpo, group = self._config.grpo, self._config.rollout.group_size
        # Cut where all ranks together have so many, so that the updates are the same in any layout.
        numbers = sorted(n for mine in gather([r.number for r in used[::group]]) for n in mine)
        cuts = [len(numbers) * k // grpo.mini_batches for k in range(grpo.mini_batches + 1)]
        result = []
        for first, end in itertools.pairwise(cuts):
            members = set(numbers[first:end])
            part = [r for r in used if r.number in members]
            lengths = [len(r.response.tokens) for r in part]
            weights, divisor = response_weights(lengths, group, grpo.aggregation, self._config.rollout.max_new_tokens)
            everyone = sum_over_ranks({"divisor": divisor, "tokens": float(sum(lengths))})
            if everyone["tokens"] == 0:
                continue
            # The trainer divides by the tokens of the global batch; this turns that into the divisor asked for.
            scale = everyone["tokens"] / everyone["divisor"]
            batches = self.micro_batches(part, [w * scale for w in weights])
            result.append(batches or [self._no_weight(spare)])
        if len(result) * grpo.epochs > 1:
            for mini in result:
                for batch, old in zip(mini, score_batches(self._trainer.model, mini), strict=False):
                    batch.old_logprobs = old
        if self._reference is not None:
            for mini in result:
                for batch, logprobs in zip(mini, self._reference.logprobs(mini), strict=False):
                    batch.reference_logprobs = logprobs
        return result

    def _no_weight(self, rollout: Rollout) -> PolicyBatch:
        batch = collate([rollout], self._pad_id, self._trainer.runtime.device, [0.0], self._multiple)
        batch.mask.zero_()
        return batch

    def step(self, mini: Sequence[PolicyBatch], judge: Judge) -> StepResult:
        """One update."""
        grpo = self._config.grpo

        def forward(stream: Iterator[PolicyBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
            batch = next(stream)

            def loss_of(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
                result = policy_loss(
                    logprobs_of(output),
                    batch.sampler_logprobs,
                    batch.advantages,
                    batch.mask,
                    grpo,
                    batch.old_logprobs,
                    batch.reference_logprobs,
                    batch.weights,
                )
                return result.loss, batch.mask.sum().to(torch.int), result.sums

            return token_logprobs(model, batch), loss_of

        first = mini[0]
        shape = (len(first.tokens), first.tokens.shape[1])
        return self._trainer.step(forward, iter(mini), len(mini), *shape, judge)


def update_values(results: Sequence[StepResult]) -> dict[str, float]:
    """Metrics of a step's updates; of those that were left out only that they were."""
    taken = [r for r in results if r.skipped is None]
    values: dict[str, float] = {"updates": len(taken)}
    if not taken:
        return values
    values["grad_norm"] = sum(r.grad_norm for r in taken) / len(taken)
    tokens = sum(r.sums["tokens"] for r in taken)
    values["loss"] = sum(r.sums["loss"] for r in taken) / tokens
    for name, key in (
        ("logprob_gap", "logprob_gap"),
        ("clipped", "clip_fraction"),
        ("importance_truncated", "importance_truncated"),
        ("kl", "kl"),
    ):
        if name in taken[0].sums:
            values[key] = sum(r.sums[name] for r in taken) / tokens
    return values
