"""GRPO and its kin: group-relative advantages, the clipped objective, and what a token's loss is divided by.

Shapes: B responses of at most T tokens; a group is the responses to one prompt and stands together.

| name | settings |
|---|---|
| GRPO of the study (arXiv 2603.17074) | the defaults |
| GRPO as first published (arXiv 2402.03300) | ``aggregation=sequence`` |
| DAPO (arXiv 2503.14476) | ``aggregation=token dynamic_sampling=true overlong_buffer=N kl_beta=0`` |
| Dr. GRPO (arXiv 2503.20783) | ``aggregation=constant normalize_advantage=false kl_beta=0`` |
| GSPO (arXiv 2507.18071) | ``ratio=sequence aggregation=sequence clip_low=3e-4 clip_high=4e-4 kl_beta=0`` |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prism_nemo.config import GRPOConfig

_STD_FLOOR = 1e-4
# A ratio of exp(20) is a policy that has left; exp of more overflows and turns the gradient into NaN.
_LOG_RATIO_LIMIT = 20.0

AGGREGATIONS = ("group", "token", "sequence", "constant")
RATIOS = ("token", "sequence")
KL_ESTIMATORS = ("k1", "k2", "k3")


def group_advantages(rewards: torch.Tensor, group_size: int, normalize: bool) -> torch.Tensor:
    """Advantage of each response within its group.

    ``A = r - mean(r)``, divided by ``std(r) + 1e-4`` when `normalize` (GRPO, arXiv 2402.03300 eq. 3; without the
    division: Dr. GRPO, arXiv 2503.20783).

    Args:
        rewards: [B], groups together.
        group_size: Responses per prompt.
        normalize: Divide by the (population) standard deviation.

    Returns:
        [B]; all zero for a group whose rewards are equal: it teaches nothing.
    """
    grouped = rewards.view(-1, group_size)
    advantages = grouped - grouped.mean(dim=1, keepdim=True)
    if normalize:
        advantages = advantages / (grouped.std(dim=1, keepdim=True, unbiased=False) + _STD_FLOOR)
    # The mean of equal numbers may differ from them by rounding (three times 0.1); these must be exactly zero.
    return (advantages * live_groups(rewards, group_size)[:, None]).flatten()


def live_groups(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    """[groups] of bool: whether a group's rewards differ."""
    grouped = rewards.view(-1, group_size)
    return grouped.amax(dim=1) > grouped.amin(dim=1)


def response_weights(
    lengths: Sequence[int], group_size: int, aggregation: str, max_new_tokens: int
) -> tuple[list[float], float]:
    """What every token of a response weighs in the sum that is the loss, and what that sum is divided by.

    With G responses of |o_i| tokens to each of N prompts, the loss of a batch is

    - ``group`` (the study, arXiv 2603.17074 app. 15): ``1/N sum_n (1 / sum_i |o_i|) sum_i sum_t l_it``
    - ``token`` (DAPO, arXiv 2503.14476 eq. 8, over the batch as implementations have it):
      ``(1 / sum_n sum_i |o_i|) sum_n sum_i sum_t l_it``
    - ``sequence`` (GRPO, arXiv 2402.03300 eq. 3): ``1/(N G) sum_n sum_i (1 / |o_i|) sum_t l_it``; short responses weigh
      more per token
    - ``constant`` (Dr. GRPO, arXiv 2503.20783): ``1/(N G L) sum_n sum_i sum_t l_it`` with L the most tokens a response
      may have; no response's weight depends on its length

    Args:
        lengths: Tokens of each response, groups together.
        group_size: G.
        aggregation: One of the names above.
        max_new_tokens: L.

    Returns:
        Weight of each response's tokens; and this rank's part of the divisor, to be summed over ranks.

    Raises:
        ValueError: For an unknown name.
    """
    count = len(lengths)
    if aggregation == "token":
        return [1.0] * count, float(sum(lengths))
    if aggregation == "sequence":
        return [1.0 / n for n in lengths], float(count)
    if aggregation == "constant":
        return [1.0] * count, float(count * max_new_tokens)
    if aggregation != "group":
        raise ValueError(f"aggregation '{aggregation}' is unknown; choose one of {', '.join(AGGREGATIONS)}")
    weights: list[float] = []
    for first in range(0, count, group_size):
        weights += [1.0 / sum(lengths[first : first + group_size])] * group_size
    return weights, float(count // group_size)


@dataclass
class PolicyLoss:
    """Sums over the response tokens of a micro-batch; the caller divides by the tokens of the global batch.

    Attributes:
        loss: Scalar, with gradient.
        sums: Metrics, each a sum over tokens.
    """

    loss: torch.Tensor
    sums: dict[str, torch.Tensor]


def policy_loss(
    logprobs: torch.Tensor,
    sampler_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    config: GRPOConfig,
    old_logprobs: torch.Tensor | None = None,
    reference_logprobs: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> PolicyLoss:
    """Clipped policy loss with truncated importance sampling and a KL term.

    ``L = sum_i v_i sum_t [ -w_it min(rho_it A_i, clip(rho_it, 1 - low, 1 + high) A_i) + beta KL_it ]`` where

    - ``rho_it = pi / pi_old`` of the token; or of the sequence, ``rho_i = exp(mean_t log(pi / pi_old))`` (GSPO, arXiv
      2507.18071 eq. 7), whose gradient reaches all of its tokens;
    - ``w_it = min(pi_old / pi_sampler, C)`` corrects for a sampler whose numerics differ from the trainer's (truncated
      importance sampling; C = 2 in the study);
    - ``v_i`` is the response's weight, see `response_weights`.

    Args:
        logprobs: [B, T] of the policy being trained, with gradient.
        sampler_logprobs: [B, T] as recorded while sampling.
        advantages: [B].
        mask: [B, T], 1 on response tokens.
        config: Coefficients.
        old_logprobs: [B, T] of the policy before this batch's first update; None when strictly on-policy, where it is
            the policy itself.
        reference_logprobs: [B, T] of the reference policy; needed when ``kl_beta`` is positive.
        weights: [B], 1 for all if None.

    Raises:
        ValueError: If ``kl_beta`` is positive and there is no reference.
    """
    old = logprobs.detach() if old_logprobs is None else old_logprobs
    log_ratio = ((logprobs - old) * mask).clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)
    if config.ratio == "sequence":
        log_ratio = (log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(logprobs)
    ratio = log_ratio.exp()
    scale = advantages[:, None]
    clipped = ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    objective = torch.minimum(ratio * scale, clipped * scale)
    correction = ((old - sampler_logprobs) * mask).clamp(max=_LOG_RATIO_LIMIT).exp()
    sums = {
        "tokens": mask.sum(),
        "logprob_gap": ((old - sampler_logprobs).abs() * mask).sum(),
        "clipped": ((ratio.detach() != clipped.detach()) * mask).sum(),
    }
    if config.importance_cap > 0:
        objective = correction.clamp(max=config.importance_cap) * objective
        sums["importance_truncated"] = ((correction > config.importance_cap) * mask).sum()
    token_weights = mask if weights is None else mask * weights[:, None]
    loss = -(objective * token_weights).sum()
    if config.kl_beta > 0:
        if reference_logprobs is None:
            raise ValueError("kl_beta > 0 needs reference_logprobs")
        kl = kl_estimate(logprobs, reference_logprobs, config.kl_estimator)
        loss = loss + config.kl_beta * (kl * token_weights).sum()
        # Reported as k3 whatever the loss uses: an estimate that is never negative can be compared between runs.
        sums["kl"] = (kl_estimate(logprobs.detach(), reference_logprobs, "k3") * mask).sum()
    sums["loss"] = loss.detach()
    return PolicyLoss(loss, sums)


def kl_estimate(logprobs: torch.Tensor, reference_logprobs: torch.Tensor, estimator: str) -> torch.Tensor:
    """KL(pi || pi_ref) of each token from the one that was sampled (http://joschu.net/blog/kl-approx.html).

    With ``d = log pi_ref - log pi``: k1 = ``-d`` (unbiased, may be negative), k2 = ``d^2 / 2``, k3 = ``exp(d) - d - 1``
    (unbiased, never negative). As a loss they differ: on-policy the expected gradient of k1 is zero, so it holds
    nothing back; that of k2 is the gradient of the KL itself (arXiv 2506.09477); k3's agrees with it while the two
    policies are close.

    Args:
        logprobs: Any shape, of the policy.
        reference_logprobs: The same shape.
        estimator: k1, k2 or k3.
    """
    d = reference_logprobs - logprobs
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return d.square() / 2
    return d.clamp(max=_LOG_RATIO_LIMIT).exp() - d - 1.0
