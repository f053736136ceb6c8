"""GRPO: group-relative advantages and the token-level clipped objective.

Shapes: B responses of at most T tokens; a group is the responses to one prompt and stands together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from prism_nemo.config import GRPOConfig

_STD_FLOOR = 1e-4


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
    return advantages.flatten()


def live_groups(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    """[groups] of bool: whether a group's rewards differ."""
    grouped = rewards.view(-1, group_size)
    return grouped.amax(dim=1) > grouped.amin(dim=1)


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
) -> PolicyLoss:
    """Token-level clipped policy loss with truncated importance sampling and a KL term.

    ``L = -sum_t w_t min(rho_t A, clip(rho_t, 1 - low, 1 + high) A) + beta sum_t KL_t`` where ``rho = pi / pi_old``;
    ``w = min(pi_old / pi_sampler, C)`` corrects for a sampler whose numerics differ from the trainer's;
    ``KL_t = r - log r - 1`` with ``r = pi_ref / pi`` (the k3 estimator, http://joschu.net/blog/kl-approx.html).
    Normalising by all tokens rather than per response is the study's choice (arXiv 2603.17074, section 4).

    Args:
        logprobs: [B, T] of the policy being trained, with gradient.
        sampler_logprobs: [B, T] as recorded while sampling.
        advantages: [B].
        mask: [B, T], 1 on response tokens.
        config: Coefficients.
        old_logprobs: [B, T] of the policy before this batch's first update; None when strictly on-policy, where it is
            the policy itself.
        reference_logprobs: [B, T] of the reference policy; needed when ``kl_beta`` is positive.

    Raises:
        ValueError: If ``kl_beta`` is positive and there is no reference.
    """
    old = logprobs.detach() if old_logprobs is None else old_logprobs
    ratio = (logprobs - old).exp()
    weight = (old - sampler_logprobs).exp().clamp(max=config.importance_cap)
    scale = advantages[:, None]
    clipped = ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    objective = weight * torch.minimum(ratio * scale, clipped * scale)
    loss = -(objective * mask).sum()
    detached = logprobs.detach()
    sums = {
        "loss": loss.detach(),
        "tokens": mask.sum(),
        "logprob_gap": ((detached - sampler_logprobs).abs() * mask).sum(),
        "clipped": ((ratio.detach() != clipped.detach()) * mask).sum(),
    }
    if config.kl_beta > 0:
        if reference_logprobs is None:
            raise ValueError("kl_beta > 0 needs reference_logprobs")
        log_ratio = reference_logprobs - logprobs
        kl = ((log_ratio.exp() - log_ratio - 1.0) * mask).sum()
        loss = loss + config.kl_beta * kl
        sums["kl"] = kl.detach()
    return PolicyLoss(loss, sums)
