"""Advantages and the policy loss against numbers worked out by hand and a formula without autograd."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_nemo.config import GRPOConfig
from prism_nemo.rl.grpo import group_advantages, live_groups, policy_loss

PLAIN = GRPOConfig(kl_beta=0.0)


def test_advantages_are_rewards_minus_the_mean_of_their_own_group() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0])
    assert group_advantages(rewards, 4, normalize=False).tolist() == [
        0.75,
        -0.25,
        -0.25,
        -0.25,
        0.25,
        0.25,
        0.25,
        -0.75,
    ]
    assert group_advantages(rewards, 8, normalize=False).tolist() == [0.5, -0.5, -0.5, -0.5, 0.5, 0.5, 0.5, -0.5]


def test_normalised_advantages_are_divided_by_the_population_deviation() -> None:
    """One of four right: mean 1/4, variance 3/16, deviation 0.4330; the floor 1e-4 is added to it."""
    deviation = math.sqrt(3) / 4 + 1e-4
    found = group_advantages(torch.tensor([0.0, 0.0, 1.0, 0.0]), 4, normalize=True)
    assert found.tolist() == pytest.approx([-0.25 / deviation, -0.25 / deviation, 0.75 / deviation, -0.25 / deviation])
    assert found.tolist() == pytest.approx([-0.5772, -0.5772, 1.7316, -0.5772], abs=1e-4)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reward", [0.0, 1.0])
@pytest.mark.parametrize("size", [2, 3, 7, 12, 16])
def test_groups_of_equal_rewards_teach_nothing(size: int, reward: float, normalize: bool) -> None:
    """Exactly zero, not nearly: the trainer leaves out responses of advantage zero."""
    rewards = torch.full((size * 2,), reward)
    rewards[0] = 1.0 - reward
    assert group_advantages(rewards, size, normalize)[size:].tolist() == [0.0] * size
    assert live_groups(rewards, size).tolist() == [True, False]


@given(
    rewards=st.lists(st.sampled_from([0.0, 1.0]), min_size=12, max_size=12),
    size=st.sampled_from([2, 3, 4, 6, 12]),
    normalize=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_advantages_sum_to_zero_and_have_the_sign_of_success(rewards: list[float], size: int, normalize: bool) -> None:
    found = group_advantages(torch.tensor(rewards), size, normalize).view(-1, size)
    assert found.sum(1).abs().max() < 1e-5
    for group, advantages in zip(torch.tensor(rewards).view(-1, size), found, strict=True):
        if 0 < group.sum() < size:
            assert (advantages[group == 1] > 0).all()
            assert (advantages[group == 0] < 0).all()


def _by_hand(
    logprobs: torch.Tensor,
    sampler: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    config: GRPOConfig,
    old: torch.Tensor | None,
    reference: torch.Tensor | None,
) -> float:
    """The objective, token by token, in Python floats."""
    total = 0.0
    for row in range(logprobs.shape[0]):
        for column in range(logprobs.shape[1]):
            if not mask[row, column]:
                continue
            new, a = logprobs[row, column].item(), advantages[row].item()
            before = new if old is None else old[row, column].item()
            ratio = math.exp(new - before)
            low, high = 1 - config.clip_low, 1 + config.clip_high
            weight = min(math.exp(before - sampler[row, column].item()), config.importance_cap)
            total -= weight * min(ratio * a, min(max(ratio, low), high) * a)
            if config.kl_beta:
                assert reference is not None
                log_r = reference[row, column].item() - new
                total += config.kl_beta * (math.exp(log_r) - log_r - 1)
    return total


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("kl_beta", [0.0, 0.3])
def test_loss_equals_the_formula(on_policy: bool, kl_beta: float) -> None:
    """Old, sampler and reference are far enough from the policy that clips on both sides and the cap bind."""
    generator = torch.Generator().manual_seed(2)
    shape = (6, 9)
    logprobs = -torch.rand(shape, generator=generator) * 3
    near, far, other = (torch.randn(shape, generator=generator) * 0.6 for _ in range(3))
    old = None if on_policy else logprobs + near
    sampler = (logprobs if old is None else old) + far
    reference = logprobs + other if kl_beta else None
    advantages = torch.tensor([1.5, -0.5, 0.25, -2.0, 0.0, 1.0])
    mask = (torch.rand(shape, generator=generator) < 0.6).float()
    config = GRPOConfig(kl_beta=kl_beta, clip_low=0.2, clip_high=0.28, importance_cap=2.0)
    result = policy_loss(logprobs, sampler, advantages, mask, config, old, reference)
    assert result.loss.item() == pytest.approx(_by_hand(logprobs, sampler, advantages, mask, config, old, reference))
    ratio = torch.ones(shape) if old is None else (logprobs - old).exp()
    outside = ((ratio < 0.8) | (ratio > 1.28)) & mask.bool()
    assert result.sums["clipped"].item() == outside.sum().item()
    assert outside.any().item() is not on_policy
    assert result.sums["tokens"].item() == mask.sum().item()
    gap = sum(abs(x) for x in ((logprobs - sampler) * mask).flatten().tolist())
    assert result.sums["logprob_gap"].item() == pytest.approx(gap)
    if reference is not None:
        plain = policy_loss(logprobs, sampler, advantages, mask, PLAIN, old).loss.item()
        assert result.loss.item() == pytest.approx(plain + kl_beta * result.sums["kl"].item())


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [
        (1.0, 2.0, 2.0),
        (1.27, 2.0, 2.54),  # still inside
        (1.29, 2.0, 0.0),  # enough more of a good one
        (0.5, 2.0, 1.0),  # a good one that became rarer is pulled back without limit
        (0.81, -2.0, -1.62),
        (0.79, -2.0, 0.0),  # enough less of a bad one
        (1.5, -2.0, -3.0),  # a bad one that became more likely is pushed down without limit
    ],
)
def test_clip_stops_the_gradient_on_the_right_side(ratio: float, advantage: float, slope: float) -> None:
    """d loss / d logp = -ratio x A inside, 0 where the step has gone far enough. Bounds 0.8 and 1.28."""
    old = torch.tensor([[-1.0]])
    logprobs = (old + math.log(ratio)).requires_grad_()
    policy_loss(logprobs, old, torch.tensor([advantage]), torch.ones(1, 1), PLAIN, old).loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(-slope)


@pytest.mark.parametrize(
    ("sampler_ratio", "weight"), [(0.5, 0.5), (1.0, 1.0), (1.99, 1.99), (2.0, 2.0), (2.5, 2.0), (1e6, 2.0)]
)
def test_importance_weight_is_cut_above_only(sampler_ratio: float, weight: float) -> None:
    """Tokens that the sampler drew too often weigh less, too rarely more, but never more than the cap."""
    logprobs = torch.tensor([[-1.0]], requires_grad=True)
    sampler = torch.tensor([[-1.0 - math.log(sampler_ratio)]])
    result = policy_loss(logprobs, sampler, torch.tensor([3.0]), torch.ones(1, 1), PLAIN)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(-3.0 * weight, rel=1e-5)
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(-3.0 * weight, rel=1e-5)  # the weight itself has no gradient


@pytest.mark.parametrize("drift", [-0.7, -0.1, 0.1, 0.7])
def test_kl_is_positive_and_pulls_towards_the_reference(drift: float) -> None:
    """k3: exp(d) - d - 1 with d = log ref - log pi; gradient 1 - exp(d), so descent moves pi towards ref."""
    reference = torch.tensor([[-2.0]])
    logprobs = (reference - drift).requires_grad_()
    config = GRPOConfig(kl_beta=0.5)
    result = policy_loss(logprobs, logprobs.detach(), torch.zeros(1), torch.ones(1, 1), config, None, reference)
    result.loss.backward()
    assert result.sums["kl"].item() == pytest.approx(math.exp(drift) - drift - 1, rel=1e-5)
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(0.5 * (1 - math.exp(drift)), rel=1e-5)
    assert (logprobs.grad.item() > 0) == (logprobs.item() > reference.item())


def test_kl_without_a_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="reference_logprobs"):
        policy_loss(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1), GRPOConfig(kl_beta=0.1))


def test_what_is_masked_changes_nothing() -> None:
    """Prompt and padding positions hold numbers of no meaning: they must not reach loss, metrics or gradient."""
    generator = torch.Generator().manual_seed(5)
    mask = torch.zeros(3, 8)
    mask[:, 2:5] = 1.0
    config = GRPOConfig(kl_beta=0.2)
    results = []
    for junk in (0.0, -7.0, 2.5):
        generator.manual_seed(5)
        values = [-torch.rand(3, 8, generator=generator) for _ in range(4)]
        values = [torch.where(mask.bool(), v, torch.full_like(v, junk * (i + 1))) for i, v in enumerate(values)]
        logprobs = values[0].requires_grad_()
        result = policy_loss(logprobs, values[1], torch.tensor([1.0, -1.0, 0.5]), mask, config, values[2], values[3])
        result.loss.backward()
        assert logprobs.grad is not None
        assert not logprobs.grad[mask == 0].any()
        results.append([result.loss.item(), logprobs.grad.tolist(), {k: v.item() for k, v in result.sums.items()}])
    assert results[0] == results[1] == results[2]


def test_on_policy_gradient_is_that_of_reinforce() -> None:
    """d/d theta of the loss over N tokens is -(1/N) sum A d logp / d theta, by finite differences of a tiny policy.

    The loss itself has the value -sum A however the policy is: only its gradient means something.
    """
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    states = torch.tensor([[0, 1, 2], [3, 4, 0]])
    actions = torch.tensor([[1, 3, 0], [2, 2, 1]])
    advantages, mask = torch.tensor([1.5, -0.5]), torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])

    def logprobs(values: torch.Tensor) -> torch.Tensor:
        return values[states].log_softmax(-1).gather(-1, actions[..., None])[..., 0]

    def weighted(values: torch.Tensor) -> float:
        return (logprobs(values) * advantages[:, None] * mask).sum().item() / mask.sum().item()

    leaf = theta.clone().requires_grad_()
    output = logprobs(leaf)
    result = policy_loss(output, output.detach(), advantages, mask, PLAIN)
    (result.loss / mask.sum()).backward()
    assert leaf.grad is not None
    for i in range(theta.shape[0]):
        for j in range(theta.shape[1]):
            step = torch.zeros_like(theta)
            step[i, j] = 1e-6
            slope = (weighted(theta + step) - weighted(theta - step)) / 2e-6
            assert leaf.grad[i, j].item() == pytest.approx(-slope, abs=1e-8)
    assert result.loss.item() == pytest.approx(-(advantages[:, None] * mask).sum().item())
