"""Advantages and the policy loss against numbers worked out by hand and a formula without autograd."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_nemo.config import GRPOConfig
from prism_nemo.rl.grpo import group_advantages, kl_estimate, live_groups, policy_loss, response_weights

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
    # Between sampler and trainer as they were before the first update, not what updates have changed since.
    before = logprobs if old is None else old
    gap = sum(abs(x) for x in ((before - sampler) * mask).flatten().tolist())
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


LENGTHS = [2, 4, 6, 1, 3, 5]  # two groups of three


@pytest.mark.parametrize(
    ("aggregation", "weights", "divisor"),
    [
        ("token", [1.0] * 6, 21),
        ("group", [1 / 12] * 3 + [1 / 9] * 3, 2),
        ("sequence", [1 / 2, 1 / 4, 1 / 6, 1, 1 / 3, 1 / 5], 6),
        ("constant", [1.0] * 6, 6 * 8),
    ],
)
def test_what_a_token_weighs(aggregation: str, weights: list[float], divisor: float) -> None:
    """By hand: lengths 2, 4, 6 and 1, 3, 5, at most 8 tokens."""
    found, by = response_weights(LENGTHS, 3, aggregation, 8)
    assert found == pytest.approx(weights)
    assert by == divisor
    if aggregation in ("group", "sequence", "token"):  # a loss of 1 at every token has the mean 1
        assert sum(w * n for w, n in zip(found, LENGTHS, strict=True)) / by == pytest.approx(1.0)


def test_unknown_aggregations_are_refused() -> None:
    with pytest.raises(ValueError, match="aggregation 'mean' is unknown"):
        response_weights([1, 2], 2, "mean", 8)


def test_weights_scale_loss_and_gradient_of_their_response() -> None:
    """Objective and KL term alike; metrics stay sums over tokens."""
    generator = torch.Generator().manual_seed(3)
    values = -torch.rand(4, 3, 5, generator=generator)
    mask = (torch.rand(3, 5, generator=generator) < 0.7).float()
    advantages, weights = torch.tensor([1.0, -0.5, 2.0]), torch.tensor([0.5, 3.0, 0.0])
    config = GRPOConfig(kl_beta=0.2)

    def gradient(rows: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, dict[str, float]]:
        leaf = values[0].clone().requires_grad_()
        result = policy_loss(
            leaf[rows], values[1][rows], advantages[rows], mask[rows], config, values[2][rows], values[3][rows], scale
        )
        result.loss.backward()
        assert leaf.grad is not None
        return leaf.grad, {k: v.item() for k, v in result.sums.items()}

    together, sums = gradient(torch.arange(3), weights)
    parts = [gradient(torch.tensor([i]), None) for i in range(3)]
    expected = sum(w * grad for w, (grad, _) in zip(weights.tolist(), parts, strict=True))
    assert torch.allclose(together, torch.as_tensor(expected), atol=1e-6)
    assert not together[2].any()
    assert sums["loss"] == pytest.approx(sum(w * s["loss"] for w, (_, s) in zip(weights.tolist(), parts, strict=True)))
    assert sums["kl"] == pytest.approx(sum(s["kl"] for _, s in parts))


def test_sequence_ratio_is_that_of_gspo() -> None:
    """GSPO eq. 5 to 7 in plain floats: one ratio per response, the geometric mean of its tokens', clipped whole."""
    generator = torch.Generator().manual_seed(7)
    shape = (5, 6)
    logprobs, drift = -torch.rand(shape, generator=generator), torch.randn(shape, generator=generator) * 0.5
    mask = torch.ones(shape)
    mask[0, 3:], mask[2, :2], mask[4, 1:] = 0, 0, 0
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0])
    config = GRPOConfig(kl_beta=0.0, ratio="sequence", clip_low=0.1, clip_high=0.15)
    lengths = mask.sum(1).tolist()
    weights = torch.tensor([1 / n for n in lengths])
    old = logprobs - drift
    leaf = logprobs.clone().requires_grad_()
    result = policy_loss(leaf, old, advantages, mask, config, old, None, weights)
    result.loss.backward()
    total, clipped = 0.0, 0
    for i in range(5):
        ratio = math.exp(sum(drift[i, t].item() for t in range(6) if mask[i, t]) / lengths[i])
        bounded = min(max(ratio, 0.9), 1.15)
        a = advantages[i].item()
        total -= min(ratio * a, bounded * a)
        clipped += int(lengths[i]) if ratio != bounded else 0
        # d loss / d logp_t = -s A / |o| for each token inside, 0 where the clip binds
        slope = 0.0 if bounded * a < ratio * a else -ratio * a / lengths[i]
        assert leaf.grad is not None
        assert leaf.grad[i][mask[i].bool()].tolist() == pytest.approx([slope] * int(lengths[i]), abs=1e-6)
    assert result.loss.item() == pytest.approx(total, rel=1e-5)
    assert result.sums["clipped"].item() == clipped
    assert 0 < clipped < mask.sum().item()


def test_without_a_cap_there_is_no_correction() -> None:
    logprobs = torch.tensor([[-1.0]], requires_grad=True)
    config = GRPOConfig(kl_beta=0.0, importance_cap=0.0)
    result = policy_loss(logprobs, torch.tensor([[-3.0]]), torch.tensor([1.0]), torch.ones(1, 1), config)
    assert result.loss.item() == pytest.approx(-1.0)
    assert "importance_truncated" not in result.sums


@pytest.mark.parametrize(("estimator", "value"), [("k1", -0.4), ("k2", 0.08), ("k3", math.exp(0.4) - 1.4)])
def test_kl_estimators_by_hand(estimator: str, value: float) -> None:
    """log pi = -2, log pi_ref = -1.6, so d = 0.4."""
    found = kl_estimate(torch.tensor([-2.0]), torch.tensor([-1.6]), estimator)
    assert found.item() == pytest.approx(value, rel=1e-5)


def test_kl_estimators_in_expectation() -> None:
    """Over all actions: k1 and k3 have the KL as mean; the gradient of k2 is the KL's, that of k1 is zero."""
    generator = torch.Generator().manual_seed(1)
    theta = torch.randn(6, generator=generator, dtype=torch.float64).requires_grad_()
    reference = (theta.detach() + 0.3 * torch.randn(6, generator=generator, dtype=torch.float64)).log_softmax(0)
    logprobs = theta.log_softmax(0)
    p = logprobs.detach().exp()
    kl = (logprobs.exp() * (logprobs - reference)).sum()
    (true_gradient,) = torch.autograd.grad(kl, theta, retain_graph=True)
    means, gradients = {}, {}
    for name in ("k1", "k2", "k3"):
        mean = (p * kl_estimate(logprobs, reference, name)).sum()  # the actions are drawn; only the estimate has slope
        (gradients[name],) = torch.autograd.grad(mean, theta, retain_graph=True)
        means[name] = mean.item()
    assert means["k1"] == pytest.approx(kl.item())
    assert means["k3"] == pytest.approx(kl.item())
    assert gradients["k1"].abs().max() < 1e-12
    assert torch.allclose(gradients["k2"], true_gradient)
    assert torch.nn.functional.cosine_similarity(gradients["k3"], true_gradient, dim=0) > 0.95


def test_a_policy_that_has_left_gives_finite_numbers() -> None:
    """exp of 200 is infinite, and infinite times a clipped zero is NaN."""
    logprobs = torch.tensor([[-300.0, -1.0]], requires_grad=True)
    config = GRPOConfig(kl_beta=0.1)
    far = torch.tensor([[-1.0, -300.0]])
    result = policy_loss(logprobs, far, torch.tensor([-1.0]), torch.ones(1, 2), config, far, far)
    result.loss.backward()
    assert torch.isfinite(result.loss)
    assert logprobs.grad is not None
    assert torch.isfinite(logprobs.grad).all()


def test_fractions_of_equal_rewards_are_no_signal() -> None:
    """The mean of seven times 0.1 is not 0.1 in floats, and dividing by a small deviation would blow that up."""
    assert group_advantages(torch.full((7,), 0.1), 7, normalize=True).tolist() == [0.0] * 7
