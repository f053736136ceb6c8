"""The state-space recurrence of Mamba-2 (SSD) on plain torch kernels.

Per head, with a state s of shape [p, n]: s_t = exp(dt_t A) s_{t-1} + dt_t x_t B_t^T and y_t = s_t C_t + D x_t. Inside a
chunk of tokens this is a decayed linear attention, done by matrix products; from chunk to chunk the state is carried.
Chunks are visited one after another, so that the largest intermediate, [heads, chunk, chunk], stays in the processor's
cache, and the backward pass computes it again instead of keeping it.

Documents packed into one row are isolated exactly: what one computes has no term, not even a rounding error, that
depends on another. So a log-decay is a sum that starts inside its document; a difference of two cumulative sums that
both ran over the documents before would carry the rounding of those documents along.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def document_runs(seq_idx: torch.Tensor) -> torch.Tensor:
    """Number the runs of equal values in `seq_idx` [b, l], so that an index that returns later is another document."""
    changes = seq_idx[:, 1:] != seq_idx[:, :-1]
    return torch.nn.functional.pad(changes.cumsum(1, dtype=torch.int32), (1, 0))


def _computed_in(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@dataclass
class _Chunk:
    """One chunk of q tokens in the type that is computed in; h heads are g groups of r.

    Attributes:
        x: [b, g, r, q, p].
        dt: [b, g, r, q].
        B: [b, g, q, n].
        C: [b, g, q, n].
        sums: [b or 1, q, q], 1 where token j is token i or a token of the same document before it. Times a vector over
            tokens it gives the cumulative sum that starts with the document or the chunk, whichever is later.
        a: [b, g, r, q], that sum of the log-decays dt A, in fp64: only differences count, and those of nearby tokens,
            which decay least, are small ones of large numbers.
        carried: [b, g, r, q], decay from the end of the previous chunk to each token, 0 in documents that start here.
        left: [b, g, r, q], decay from each token to the end of this chunk, 0 in documents that end before.
    """

    x: torch.Tensor
    dt: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    sums: torch.Tensor
    a: torch.Tensor
    carried: torch.Tensor
    left: torch.Tensor

    @classmethod
    def read(cls, start: int, stop: int, tensors: tuple[torch.Tensor, ...], runs: torch.Tensor | None) -> _Chunk:
        """Tokens start..stop of x, dt, A, B, C as `ssd_scan` gets them."""
        x, dt, A, B, C = tensors
        kind, b, g, q = _computed_in(x), x.shape[0], B.shape[2], stop - start
        x = _by_group(x[:, start:stop].to(kind), g)
        dt = _by_group(dt[:, start:stop].to(kind), g)
        B, C = (t[:, start:stop].to(kind).transpose(1, 2) for t in (B, C))
        sums = torch.ones(1, q, q, dtype=kind, device=x.device).tril_()
        if runs is not None:
            here = runs[:, start:stop]
            sums = sums * (here[:, :, None] == here[:, None, :])
        log_decay = dt.double() * A.double().view(g, -1, 1)
        a = torch.matmul(log_decay.flatten(1, 2), sums.mT.double()).view_as(log_decay)
        carried, left = _exp(a, kind), _exp(a[..., -1:] - a, kind)
        if runs is not None:
            carried.mul_((here == runs[:, max(start - 1, 0), None]).view(b, 1, 1, q))
            left.mul_((here == here[:, -1:]).view(b, 1, 1, q))
        return cls(x, dt, B, C, sums, a, carried, left)

    def decay(self) -> torch.Tensor:
        """Decay from token j to token i, [b, g, r, q, q]; where `sums` is 0, some number of at most 1.

        Whatever uses it also multiplies by `sums`.
        """
        return _exp(self.a.unsqueeze(-1) - self.a.unsqueeze(-2), self.x.dtype)

    def scores(self) -> torch.Tensor:
        """C_i . B_j where `sums` is 1, [b, g, 1, q, q]."""
        return torch.matmul(self.C, self.B.mT).mul_(self.sums.unsqueeze(1)).unsqueeze(2)


def _exp(log_decay: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """exp(log_decay) as a new tensor, between e^-60 and 1.

    A log-decay between tokens of one document is never positive; others may be, and must not overflow before they are
    masked. e^-60 is nothing beside 1 in fp64 too, and from there down to 0 lie numbers, or products with them, that
    processors compute ten times slower (denormal ones).
    """
    return log_decay.clamp(-60.0, 0.0).to(kind).exp_()


def _by_group(t: torch.Tensor, g: int) -> torch.Tensor:
    """[b, q, h, ...] -> [b, g, r, q, ...], contiguous."""
    return t.unflatten(2, (g, -1)).movedim(1, 3).contiguous()


def _by_token(t: torch.Tensor) -> torch.Tensor:
    """[b, g, r, q, ...] -> [b, q, h, ...]."""
    return t.movedim(3, 1).flatten(2, 3)


def _wide(t: torch.Tensor) -> torch.Tensor:
    """[b, g, r, q, p] -> [b, g, q, r p]: the heads of a group side by side, for one matrix product instead of r."""
    return t.transpose(2, 3).flatten(3)


def _narrow(t: torch.Tensor, r: int) -> torch.Tensor:
    """[b, g, q, r p] -> [b, g, r, q, p]."""
    return t.unflatten(3, (r, -1)).transpose(2, 3)


class _Scan(torch.autograd.Function):
    """`ssd_scan` with its state as [b, g, n, r p], and the gradient by hand."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
        state: torch.Tensor,
        runs: torch.Tensor | None,
        chunk_size: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        length, r = x.shape[1], x.shape[2] // B.shape[2]
        y, states = torch.empty_like(x, memory_format=torch.contiguous_format), []
        for start in range(0, length, chunk_size):
            stop = min(start + chunk_size, length)
            states.append(state)
            k = _Chunk.read(start, stop, (x, dt, A, B, C), runs)
            added = k.x * k.dt.unsqueeze(-1)  # what each token adds to the state, without B
            out = torch.matmul(k.decay().mul_(k.scores()), added)
            out.addcmul_(_narrow(torch.matmul(k.C, state), r), k.carried.unsqueeze(-1))
            if D is not None:
                out.addcmul_(k.x, D.to(out.dtype).view(-1, r, 1, 1))
            y[:, start:stop] = _by_token(out)
            kept = torch.matmul(k.B.mT, _wide(added.mul_(k.left.unsqueeze(-1))))
            state = kept.add_(_decayed(state, k.carried[..., -1]))
        ctx.save_for_backward(x, dt, A, B, C, D, runs, *states)
        ctx.chunk_size = chunk_size
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """From the last chunk to the first, with the gradient of the state carried backwards.

        Decays enter as exp(sum of log-decays), so their part of the gradient is first taken with respect to the sums,
        `grad_a`, and at the end added up over the tokens that each log-decay counts for. Most of it cancels there (a
        decay from token to token has the gradient g at one end and -g at the other), hence fp64.
        """
        grad_y, grad_state = grads
        x, dt, A, B, C, D, runs, *states = ctx.saved_tensors
        grad_x, grad_dt, grad_B, grad_C = (torch.empty_like(t) for t in (x, dt, B, C))
        g, r, kind = B.shape[2], x.shape[2] // B.shape[2], _computed_in(x)
        grad_A, grad_D = A.new_zeros(g, r, dtype=kind), A.new_zeros(g, r, dtype=kind)
        for index in reversed(range(len(states))):
            start, state = index * ctx.chunk_size, states[index]
            stop = min(start + ctx.chunk_size, x.shape[1])
            k = _Chunk.read(start, stop, (x, dt, A, B, C), runs)
            grad = _by_group(grad_y[:, start:stop].to(kind), g)
            added, decay, scores = k.x * k.dt.unsqueeze(-1), k.decay(), k.scores()

            # Tokens of this chunk upon each other.
            grad_added = torch.matmul((decay * scores).mT, grad)
            grad_log = decay.mul_(torch.matmul(grad, added.mT))
            grad_scores = grad_log.sum(2).mul_(k.sums.unsqueeze(1))
            grad_log.mul_(scores)
            grad_a = grad_log.sum(-1, dtype=torch.float64).sub_(grad_log.sum(-2, dtype=torch.float64))
            # The incoming state upon the tokens.
            seen = _wide(grad * k.carried.unsqueeze(-1))
            grad_a.add_((grad * _narrow(torch.matmul(k.C, state), r)).sum(-1).mul_(k.carried))
            # The tokens, and the incoming state, upon the outgoing one.
            kept = _wide(added * k.left.unsqueeze(-1))
            outgoing = _narrow(torch.matmul(k.B, grad_state), r)
            grad_added.addcmul_(outgoing, k.left.unsqueeze(-1))
            grad_left = (added * outgoing).sum(-1).mul_(k.left)
            through = _decayed(grad_state, k.carried[..., -1])
            grad_a.sub_(grad_left)
            grad_a[..., -1] += grad_left.sum(-1) + (through * state).sum(2).unflatten(-1, (r, -1)).sum(-1)

            grad_log_decay = torch.matmul(grad_a.flatten(1, 2), k.sums.double()).view_as(grad_a).to(kind)
            grad_A += (grad_log_decay * k.dt).sum((0, 3))
            grad_D += (grad * k.x).sum((0, 3, 4))
            grad_dt[:, start:stop] = _by_token((grad_added * k.x).sum(-1).add_(grad_log_decay * A.view(g, r, 1)))
            grad_added.mul_(k.dt.unsqueeze(-1))
            if D is not None:
                grad_added.addcmul_(grad, D.to(kind).view(g, r, 1, 1))
            grad_x[:, start:stop] = _by_token(grad_added)
            to_B = torch.matmul(grad_scores.mT, k.C) + torch.matmul(kept, grad_state.mT)
            to_C = torch.matmul(grad_scores, k.B) + torch.matmul(seen, state.mT)
            grad_B[:, start:stop], grad_C[:, start:stop] = to_B.transpose(1, 2), to_C.transpose(1, 2)
            grad_state = through.add_(torch.matmul(k.C.mT, seen))
        grad_D = None if D is None else grad_D.flatten().to(D.dtype)
        return grad_x, grad_dt, grad_A.flatten().to(A.dtype), grad_B, grad_C, grad_D, grad_state, None, None


def _decayed(state: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """State [b, g, n, r p] times one number per head [b, g, r]."""
    return (state.unflatten(3, (decay.shape[2], -1)) * decay[:, :, None, :, None]).flatten(3)


def ssd_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    *,
    chunk_size: int,
    initial_state: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence over whole sequences. Computes in fp32, in fp64 if x is.

    Args:
        x: [b, l, h, p].
        dt: [b, l, h], positive: after softplus and clamp.
        A: [h], negative.
        B: [b, l, g, n]; each group serves h / g consecutive heads and is never expanded to them.
        C: [b, l, g, n].
        D: [h], or None for no skip connection.
        chunk_size: Tokens per chunk; any number, the result does not depend on it but for rounding.
        initial_state: [b, h, p, n] that the first document continues from; zeros if None.
        seq_idx: Index [b, l] of each token's document; the state starts from zero where it changes.

    Returns:
        y [b, l, h, p] in the type of x, and the state [b, h, p, n] after the last token in the type computed in.
    """
    b, _, h, p = x.shape
    g, n = B.shape[2:]
    if initial_state is None:
        state = x.new_zeros(b, g, n, h // g * p, dtype=_computed_in(x))
    else:
        state = initial_state.to(_computed_in(x)).view(b, g, -1, n).mT.contiguous()
    runs = None if seq_idx is None else document_runs(seq_idx)
    y, state = _Scan.apply(x, dt, A, B, C, D, state, runs, chunk_size)
    return y, state.mT.reshape(b, h, p, n)


def ssd_step(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
) -> torch.Tensor:
    """One token of the recurrence, for decoding.

    Args:
        state: [b, h, p, n]; updated in place.
        x: [b, h, p].
        dt: [b, h], after softplus and clamp.
        A: [h], negative.
        B: [b, g, n].
        C: [b, g, n].
        D: [h], or None.

    Returns:
        y [b, h, p], in the type of x.
    """
    g, kind = B.shape[1], state.dtype
    wide, dt, B, C = x.to(kind), dt.to(kind), B.to(kind), C.to(kind)
    decay = torch.exp(dt * A.to(kind))
    state.mul_(decay[..., None, None])
    added = (wide * dt.unsqueeze(-1)).unflatten(1, (g, -1))
    grouped = state.unflatten(1, (g, -1))
    grouped.addcmul_(added.unsqueeze(-1), B[:, :, None, None, :])
    y = torch.matmul(grouped, C[:, :, None, :, None]).squeeze(-1).flatten(1, 2)
    if D is not None:
        y.addcmul_(wide, D.to(kind).unsqueeze(-1))
    return y.to(x.dtype)
