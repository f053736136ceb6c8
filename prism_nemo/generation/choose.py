"""From logits to tokens: temperature, top-k, nucleus, and the inverse of the cumulative distribution.

A token is the place where the cumulative sum of its row's weights passes a uniform random number, so a row's choice
depends on its own logits and number alone. (torch.multinomial draws one stream for the whole batch and takes 20 ms for
128 rows of 8,192 tokens on a CPU core; this takes 2.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from prism_nemo.generation import cpu_kernels
from prism_nemo.generation.drawing_kernel import draw
from prism_nemo.generation.requests import SamplingParams

# Tokens per block: a cumulative sum over blocks, then one inside the chosen block, instead of one over the vocabulary.
_BLOCK = 128


def choose(
    logits: torch.Tensor, sampling: list[SamplingParams], uniforms: list[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row.

    Args:
        logits: [n, vocab], fp32.
        sampling: Of each row.
        uniforms: A number in [0, 1) for each row; not read where the temperature is 0.

    Returns:
        Token ids [n], and the log-probability of each at temperature 1 over all tokens, [n] fp64.
    """
    if not cpu_kernels.serves(logits):
        return _in_torch(logits, sampling, uniforms)
    cut = [i for i, s in enumerate(sampling) if _is_cut(s)]
    if not cut:
        return _in_kernel(logits, sampling, uniforms)
    # What a row's choice is computed with must not depend on the other rows.
    tokens = torch.empty(len(sampling), dtype=torch.long)
    logprobs = torch.empty(len(sampling), dtype=torch.float64)
    for way, rows in ((_in_torch, cut), (_in_kernel, [i for i, s in enumerate(sampling) if not _is_cut(s)])):
        if rows:
            own = torch.tensor(rows)
            tokens[own], logprobs[own] = way(logits[own], [sampling[i] for i in rows], [uniforms[i] for i in rows])
    return tokens, logprobs


def _is_cut(sampling: SamplingParams) -> bool:
    return sampling.temperature > 0 and (sampling.top_k > 0 or sampling.top_p < 1)


def _in_kernel(
    logits: torch.Tensor, sampling: list[SamplingParams], uniforms: list[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    heat = torch.tensor([s.temperature for s in sampling], dtype=torch.float32)
    return draw(logits, heat, torch.tensor(uniforms, dtype=torch.float64))


def _in_torch(
    logits: torch.Tensor, sampling: list[SamplingParams], uniforms: list[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    # One fused kernel that reads a row while it is in the core's cache, where its parts would each read all rows.
    scores = logits.log_softmax(dim=-1)
    greedy = [s.temperature == 0 for s in sampling]
    if all(greedy):
        chosen = largest(logits)
        return chosen, _of(scores, chosen)
    heat = [s.temperature or 1.0 for s in sampling]
    heated = any(t != 1.0 for t in heat)
    weights = ((logits / torch.tensor(heat, device=logits.device).unsqueeze(-1)) if heated else logits).softmax(dim=-1)
    cut = [i for i, s in enumerate(sampling) if _is_cut(s)]
    if cut:
        rows = torch.tensor(cut, device=logits.device)
        kept = restrict(weights[rows], [sampling[i].top_k for i in cut], [sampling[i].top_p for i in cut])
        weights.index_copy_(0, rows, kept)
    chosen = invert(weights, torch.tensor(uniforms, dtype=torch.float64, device=logits.device))
    if any(greedy):
        chosen = torch.where(torch.tensor(greedy, device=logits.device), largest(logits), chosen)
    return chosen, _of(scores, chosen)


def _of(scores: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Each row's score of its token, in fp64."""
    return scores.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).double()


def largest(logits: torch.Tensor) -> torch.Tensor:
    """The first index of each row's maximum. torch's search is not vectorised; this one is on all but a block."""
    blocks = _blocks(logits, -torch.inf)
    block = blocks.amax(-1).argmax(-1)
    place = blocks[torch.arange(len(blocks), device=blocks.device), block].argmax(-1)
    return block * _BLOCK + place


def restrict(weights: torch.Tensor, top_k: list[int], top_p: list[float]) -> torch.Tensor:
    """Weights [n, vocab] with those of unlikely tokens set to 0, each row by its own `top_k` and `top_p`."""
    ordered, order = weights.sort(dim=-1, descending=True)
    limit = torch.tensor([k or weights.shape[-1] for k in top_k], device=weights.device).unsqueeze(-1)
    wide = ordered.double().masked_fill_(torch.arange(weights.shape[-1], device=weights.device) >= limit, 0.0)
    mass = wide.cumsum(dim=-1)
    # The token that crosses top_p is kept, so at least one always is; at top_p 1 none may go by rounding.
    share = torch.tensor([p if p < 1 else 2.0 for p in top_p], dtype=torch.float64, device=weights.device)
    wide.masked_fill_(mass - wide >= share.unsqueeze(-1) * mass[:, -1:], 0.0)
    return torch.zeros_like(weights).scatter_(-1, order, ordered.masked_fill_(wide == 0.0, 0.0))


def invert(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The first token at which the cumulative sum of a row passes ``uniform * sum of the row``.

    Args:
        weights: [n, vocab], not negative; a token of weight 0 is never chosen.
        uniforms: [n] in [0, 1), fp64.

    Returns:
        [n] token ids.
    """
    width = weights.shape[-1]
    blocks = _blocks(weights, 0.0)
    sums = blocks.sum(-1).double().cumsum_(-1)
    block, target = _passes(sums, uniforms * sums[:, -1])
    before = sums.gather(-1, (block - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
    inside = blocks[torch.arange(len(blocks), device=blocks.device), block].double().cumsum_(-1)
    place, _ = _passes(inside, torch.where(block > 0, target - before, target))
    return (block * _BLOCK + place).clamp_(max=width - 1)


def _blocks(rows: torch.Tensor, padding: float) -> torch.Tensor:
    """[n, vocab] -> [n, blocks, block size]."""
    missing = -rows.shape[-1] % _BLOCK
    return (F.pad(rows, (0, missing), value=padding) if missing else rows).unflatten(-1, (-1, _BLOCK))


def _passes(sums: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where ascending `sums` first exceed the target, and the target as used.

    Rounding may put a target on or above the last sum, or below 0; the nearest number under the last sum makes the
    place one whose own weight is positive.
    """
    last = sums[:, -1]
    target = torch.minimum(target.clamp(min=0.0), torch.nextafter(last, torch.zeros_like(last)))
    return (sums <= target.unsqueeze(-1)).sum(-1), target
