from __future__ import annotations

import models_workers as workers
import pytest
import torch

from prism_nemo.runtime.launch import launch


@pytest.mark.parametrize("scale", [1.0, 1e4], ids=["ordinary logits", "logits whose exponentials overflow"])
@pytest.mark.parametrize("tp", [1, 2])
def test_split_cross_entropy_is_torchs(tp: int, scale: float) -> None:
    """Loss on every rank and each rank's part of the gradient; some positions are masked out by a weight of 0."""
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(7, 2, 10, generator=generator)
    target = torch.randint(0, 10, (7, 2), generator=generator)
    target[0] = torch.tensor([0, 9])  # the ends of the vocabulary
    target[1] = torch.tensor([4, 5])  # both sides of the cut
    weight = torch.rand(7, 2, generator=generator)
    weight[2] = 0.0
    results = launch(workers.split_cross_entropy, logits, target, weight, tp, processes=tp)

    exact = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact.permute(0, 2, 1), target, reduction="none")
    (expected_gradient,) = torch.autograd.grad((expected * weight).sum(), exact)
    for loss, _ in results:
        torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-5)
    gradient = torch.cat([g for _, g in results], dim=-1)
    torch.testing.assert_close(gradient, expected_gradient.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tp", [1, 2])
def test_lowest_finite_logits_take_no_part(tp: int) -> None:
    """Padding of the vocabulary is set to the lowest finite number; the loss stays a number and its gradient 0."""
    logits = torch.randn(3, 1, 8, generator=torch.Generator().manual_seed(1))
    logits[..., 5:] = torch.finfo(torch.float32).min
    target = torch.tensor([[0], [3], [4]])
    results = launch(workers.split_cross_entropy, logits, target, torch.ones(3, 1), tp, processes=tp)
    expected = torch.nn.functional.cross_entropy(logits[..., :5].permute(0, 2, 1), target, reduction="none")
    gradient = torch.cat([g for _, g in results], dim=-1)
    torch.testing.assert_close(results[0][0], expected)
    assert torch.equal(gradient[..., 5:], torch.zeros(3, 1, 3))
