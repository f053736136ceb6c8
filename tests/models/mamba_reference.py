"""Mamba-2 by its definition, token by token and document by document, on whole (tensor-parallel size 1) parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """What a mixer is made of."""

    heads: int = 8
    head_dim: int = 4
    groups: int = 2
    d_state: int = 6
    hidden: int = 12
    conv_bias: bool = True
    eps: float = 0.5
    dt_limit: tuple[float, float] = (0.0, float("inf"))

    @property
    def rows(self) -> dict[str, int]:
        """Of the input projection, in order."""
        inner, bc = self.heads * self.head_dim, self.groups * self.d_state
        return {"z": inner, "x": inner, "B": bc, "C": bc, "dt": self.heads}


def token_recurrence(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [b, l, h, p] and the last state [b, h, p, n]; B and C are expanded to heads."""
    batch, length, heads, head_dim = x.shape
    state = x.new_zeros(batch, heads, head_dim, B.shape[-1]) if initial_state is None else initial_state
    outputs = []
    for t in range(length):
        if seq_idx is not None and t > 0:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1]).view(-1, 1, 1, 1)
        b, c = (m[:, t].repeat_interleave(heads // B.shape[2], dim=1) for m in (B, C))
        decay = torch.exp(dt[:, t] * A)
        state = state * decay[..., None, None] + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], b)
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, c) + D[:, None] * x[:, t])
    return torch.stack(outputs, dim=1), state


def conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """silu of torch's depthwise convolution, [b, l, c]."""
    return F.silu(F.conv1d(F.pad(x.mT, (weight.shape[-1] - 1, 0)), weight, bias, groups=len(weight))).mT


def mixer(w: Tensors, hidden: torch.Tensor, sizes: Sizes, ends: tuple[int, ...] | None = None) -> torch.Tensor:
    """The whole mixer on [l, b, hidden]; `ends` are the ends of the documents in the row."""
    ends = (len(hidden),) if ends is None else ends
    outputs, first = [], 0
    for last in ends:
        projected = (hidden[first:last] @ w["in_proj.weight"].T).transpose(0, 1)
        z, x, B, C, dt = projected.split(list(sizes.rows.values()), dim=-1)
        xBC = conv(torch.cat((x, B, C), dim=-1), w["conv1d.weight"], w.get("conv1d.bias"))
        x, B, C = xBC.split(list(sizes.rows.values())[1:4], dim=-1)
        y, _ = token_recurrence(
            x.unflatten(-1, (sizes.heads, -1)),
            F.softplus(dt + w["dt_bias"]).clamp(*sizes.dt_limit),
            -torch.exp(w["A_log"].float()).to(dt.dtype),  # rounded as the mixer, whose A_log is fp32, rounds it
            B.unflatten(-1, (sizes.groups, -1)),
            C.unflatten(-1, (sizes.groups, -1)),
            w["D"],
        )
        gated = (y.flatten(2) * F.silu(z)).unflatten(-1, (sizes.groups, -1))
        normed = gated / (gated.square().mean(-1, keepdim=True) + sizes.eps).sqrt()
        outputs.append(((normed.flatten(2) * w["norm.weight"]) @ w["out_proj.weight"].T).transpose(0, 1))
        first = last
    return torch.cat(outputs)


def whole(parts: list[Tensors], sizes: Sizes) -> Tensors:
    """The whole parameters (or their gradients) of a mixer from those of the tensor-parallel ranks.

    Replicated B and C must be equal on all ranks; they are put back between the cut rows.
    """
    tp, result = len(parts), {}
    for name in parts[0]:
        if "_bc" in name:
            assert all(torch.equal(part[name], parts[0][name]) for part in parts), f"{name} differs between ranks"
            continue
        if name == "out_proj.weight":
            result[name] = torch.cat([part[name] for part in parts], dim=1)
            continue
        module, kind = name.split(".") if "." in name else (name, "")
        sections = {"in_proj": ["z", "x", "B", "C", "dt"], "conv1d": ["x", "B", "C"]}.get(module)
        if sections is None:
            result[name] = torch.cat([part[name] for part in parts])
            continue
        copy = parts[0].get(f"{module}_bc.{kind}")
        cut = [section for section in sections if copy is None or section not in "BC"]
        pieces = [part[name].split([sizes.rows[section] // tp for section in cut]) for part in parts]
        joined = dict(zip(cut, (torch.cat(ranks) for ranks in zip(*pieces, strict=True)), strict=True))
        if copy is not None:
            joined["B"], joined["C"] = copy.chunk(2)
        result[name] = torch.cat([joined[section] for section in sections])
    return result
