"""The optimizer that Megatron takes where Transformer Engine is, and what it clips gradients with.

Unlike torch's AdamW it counts steps once for each group of parameters, not for each parameter, and not at all for a
group of none. It is left out, as if it could not be imported, where STAND_IN_WITHOUT_OPTIMIZERS is set.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

if os.environ.get("STAND_IN_WITHOUT_OPTIMIZERS"):
    raise ImportError("left out")

Lists = list[list[torch.Tensor]]


def multi_tensor_applier(op: Callable[..., Any], noop_flag: torch.Tensor, lists: Lists, *arguments: Any) -> Any:
    return op(65536, noop_flag, lists, *arguments)


def multi_tensor_l2norm(_: int, __: torch.Tensor, lists: Lists, per_tensor: bool) -> tuple[torch.Tensor, None]:
    if per_tensor:
        raise NotImplementedError
    return torch.stack([tensor.float().norm() for tensor in lists[0]]).norm()[None], None


def multi_tensor_scale(_: int, overflow: torch.Tensor, lists: Lists, scale: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)
        overflow.logical_or_(~target.isfinite().all())


class FusedAdam(torch.optim.Optimizer):
    """AdamW, or Adam with decay in the gradient where `adam_w_mode` is false."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
    ) -> None:
        if amsgrad or not adam_w_mode:
            raise NotImplementedError
        super().__init__(
            params,
            {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps, "weight_decay": weight_decay},
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            first, second = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                if p.grad is None:
                    continue
                if p.grad.dtype != torch.float32:
                    raise NotImplementedError
                state["exp_avg"].lerp_(p.grad, 1 - first)
                state["exp_avg_sq"].mul_(second).addcmul_(p.grad, p.grad, value=1 - second)
                mean = state["exp_avg"] / (1 - first ** group["step"])
                spread = (state["exp_avg_sq"] / (1 - second ** group["step"])).sqrt() + group["eps"]
                p.sub_(group["lr"] * (mean / spread + group["weight_decay"] * p))


class FusedSGD:
    """Not used."""
