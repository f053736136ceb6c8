"""Exact FLOPs of a forward and a training pass: matrix products with weights, attention, Mamba's scan, logits.

A multiplication and an addition count as two. Elementwise work (norms, rotations, activations, the short convolution)
is not counted, as is usual for MFU; it is a matter of bandwidth. The counts are checked against
``torch.utils.flop_counter`` in ``tests/planning/test_flops.py``.

Sources: a matrix product [m, k] x [k, n] is 2 m k n; its backward pass is two of the same size. The scan is the chunked
algorithm of Mamba-2 (arXiv 2405.21060, section 6).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from prism_nemo.models.family import Architecture, Mamba

RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Flops:
    """FLOPs of a forward pass, by what does them.

    Attributes:
        projections: Products with the layers' weights.
        attention: Scores and their products with values.
        scan: Mamba's recurrence.
        logits: The output layer.
    """

    projections: float = 0.0
    attention: float = 0.0
    scan: float = 0.0
    logits: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.projections + self.attention + self.scan + self.logits

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.projections + other.projections,
            self.attention + other.attention,
            self.scan + other.scan,
            self.logits + other.logits,
        )


def attention_pairs(lengths: Sequence[int], window: int | None = None, masked: bool = False) -> int:
    """Pairs of a query and a key in a row of documents that do not see each other.

    Args:
        lengths: Tokens of each document.
        window: Positions that a token attends to, itself included.
        masked: Count the whole square of each document, as FlopCounterMode does, and not only the pairs that the causal
            mask (and the window) leaves. Kernels that skip masked blocks come close to the latter.
    """
    if masked:
        return sum(n * n for n in lengths)
    total = 0
    for n in lengths:
        w = n if window is None else min(window, n)
        total += w * (w + 1) // 2 + (n - w) * w
    return total


def projection_weights(a: Architecture, kind: str) -> int:
    """Weights that each token is multiplied with in one layer of a kind: "M" mixer, "*" attention, "-" MLP."""
    h = a.hidden_size
    if kind == "M":
        m = _mamba(a)
        rows = 2 * m.inner_size + 2 * m.groups * m.state_size + m.heads
        return h * (rows + m.inner_size)
    if kind == "*":
        queries, keys = a.num_attention_heads * a.kv_channels, a.num_query_groups * a.kv_channels
        return h * (2 * queries + 2 * keys)
    return h * a.ffn_hidden_size * (3 if a.activation == "swiglu" else 2)


def scan_flops(mamba: Mamba, tokens: int) -> int:
    """Forward FLOPs of one mixer's scan over a row of tokens, in chunks of q.

    Per chunk: scores C B^T (groups q^2 n), their product with the inputs (heads q^2 p), the state's part of the outputs
    and the outputs' part of the state (heads q n p each).
    """
    q, g, h, p, n = mamba.chunk_size, mamba.groups, mamba.heads, mamba.head_dim, mamba.state_size
    total = 0
    for chunk, count in ((q, tokens // q), (tokens % q, 1)):
        total += count * 2 * (g * chunk**2 * n + h * chunk**2 * p + 2 * h * chunk * n * p)
    return total


def layer_flops(
    a: Architecture, kind: str, lengths: Sequence[int], masked: bool = False, tp: int = 1, cp: int = 1
) -> Flops:
    """Forward FLOPs of one layer of a kind over one row of documents, all `tp` x `cp` ranks of a replica together.

    Where a mixer has fewer groups than ranks, every tensor-parallel rank computes the B and C that its heads need, and
    every context-parallel rank their part of the scan.
    """
    if kind == "M" and a.mamba is not None and a.mamba.groups < tp:
        a = replace(a, mamba=replace(a.mamba, groups=tp))
    tokens = sum(lengths)
    projections = 2 * tokens * projection_weights(a, kind)
    if kind == "*":
        pairs = attention_pairs(lengths, a.sliding_window, masked)
        return Flops(projections, attention=4 * pairs * a.num_attention_heads * a.kv_channels)
    if kind != "M":
        return Flops(projections)
    mamba = _mamba(a)
    return Flops(projections, scan=scan_flops(replace(mamba, groups=max(mamba.groups, tp * cp)), tokens))


def forward_flops(a: Architecture, lengths: Sequence[int], masked: bool = False) -> Flops:
    """Forward FLOPs of the whole model over one row.

    Args:
        a: The model.
        lengths: Tokens of each document of the row; ``[seq_length]`` where documents are not kept apart.
        masked: See `attention_pairs`.
    """
    total = Flops(logits=2 * sum(lengths) * a.hidden_size * a.vocab_size)
    for kind in "M*-":
        layer, count = None, len(a.layers_of(kind))
        if count:
            layer = layer_flops(a, kind, lengths, masked)
            total += Flops(count * layer.projections, count * layer.attention, count * layer.scan)
    return total


def training_flops(a: Architecture, lengths: Sequence[int], recompute: str = "none", masked: bool = False) -> float:
    """FLOPs of a forward and backward pass over one row: three times the forward pass, and what is computed again.

    Args:
        a: The model.
        lengths: Tokens of each document of the row.
        recompute: "none" for the model's own FLOPs, by which MFU is defined (arXiv 2204.02311, appendix B); "selective"
            (the attention's core again) or "full" (every layer again, not the logits) for the hardware's, HFU.
        masked: See `attention_pairs`.
    """
    forward = forward_flops(a, lengths, masked)
    again = {"none": 0.0, "selective": forward.attention, "full": forward.total - forward.logits}
    return 3 * forward.total + again[recompute]


def flops_per_token(a: Architecture, lengths: Sequence[int] | int, recompute: str = "none") -> float:
    """Training FLOPs per token of rows like this one.

    Args:
        a: The model.
        lengths: A sequence length, or the tokens of each document of a row.
        recompute: See `training_flops`.
    """
    row = [lengths] if isinstance(lengths, int) else lengths
    return training_flops(a, row, recompute) / sum(row)


def model_flops_utilisation(
    a: Architecture, lengths: Sequence[int] | int, tokens_per_second: float, gpus: int, peak_flops: float
) -> float:
    """MFU: the model's own FLOPs per second as a share of the peak of all GPUs."""
    return flops_per_token(a, lengths) * tokens_per_second / (gpus * peak_flops)


def _mamba(a: Architecture) -> Mamba:
    if a.mamba is None:
        raise ValueError(f"{a.family} has no Mamba layers")
    return a.mamba
