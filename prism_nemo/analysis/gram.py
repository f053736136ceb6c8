"""Three forms of linear CKA from Gram matrices: for all pairs of layers at once, and for many draws of the texts.

With K = X X^T and L = Y Y^T, every form is a cosine between two matrices made of them:

- plain: K and L themselves, as the PRISM study prints it;
- centred: H K H and H L H with H = I - 1/n (Kornblith et al. 2019);
- debiased: the U-centred matrices, whose inner product is n (n - 3) times the unbiased estimator of HSIC
  (Song et al. 2012; Szekely and Rizzo 2014, section 3).

So a matrix is computed once for each layer, however many layers it is compared with, and a draw of the texts needs
products with 0 and 1 instead of new Gram matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MEASURES = ("plain", "centred", "debiased")
_LEAST_ROWS = 4  # of the debiased form
# A norm below this share of the matrix's own is nothing but rounding.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Gram:
    """A layer's rows as inner products.

    Attributes:
        plain: [n, n] of the rows as they are, fp64.
        centred: [n, n] of the rows less their mean, fp64. The debiased form does not change with a shift and uses it
            too: far from the origin the subtractions of its formula would cancel.
    """

    plain: Tensor
    centred: Tensor


def gram_of(x: Tensor, name: str = "x") -> Gram:
    """The Gram matrices of rows.

    Args:
        x: [n, features], any floating type.
        name: For messages.

    Raises:
        ValueError: Fewer than 4 rows, no features, NaN or Inf, or all rows equal.
    """
    if x.ndim != 2 or x.shape[0] < _LEAST_ROWS or x.shape[1] == 0:
        raise ValueError(f"{name}: at least {_LEAST_ROWS} rows with features are needed, got shape {tuple(x.shape)}")
    x = x.detach().double()
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name}: holds NaN or Inf")
    if bool((x == x[0]).all()):
        raise ValueError(f"{name}: every feature is constant over the rows, so CKA is undefined")
    moved = x - x.mean(dim=0)
    return Gram(x @ x.T, moved @ moved.T)


def formed(gram: Gram, measure: str) -> Tensor:
    """The matrix [n, n] whose cosine with another one's is the measure (one of `MEASURES`)."""
    if measure == "plain":
        return gram.plain
    if measure == "centred":
        return gram.centred
    n, k = len(gram.centred), gram.centred.clone()
    k.fill_diagonal_(0)
    rows = k.sum(dim=1)
    k = k - (rows.unsqueeze(0) + rows.unsqueeze(1)) / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
    return k.fill_diagonal_(0)


def _normed(gram: Gram, measure: str) -> Tensor:
    matrix = formed(gram, measure)
    norm = matrix.norm()
    if not bool(norm > _ROUNDING * (gram.plain if measure == "plain" else gram.centred).norm()):
        raise ValueError("its rows are all equally far apart, so debiased CKA is undefined; use more rows")
    return (matrix / norm).flatten()


def cross_cka(first: Sequence[Gram], second: Sequence[Gram], measure: str) -> Tensor:
    """CKA of every layer of one model with every layer of another, on the same rows.

    Args:
        first: A Gram matrix for each layer.
        second: The same of the other model.
        measure: One of `MEASURES`.

    Returns:
        [layers of the first, layers of the second], fp64.

    Raises:
        ValueError: If a layer has nothing to align.
    """
    a = torch.stack([_normed(gram, measure) for gram in first])
    b = torch.stack([_normed(gram, measure) for gram in second])
    return a @ b.T


def cka(a: Gram, b: Gram, measure: str) -> float:
    """CKA of two layers; see `cross_cka`."""
    return float(_normed(a, measure) @ _normed(b, measure))


def half_samples(groups: Tensor, draws: int, seed: int) -> Tensor:
    """Draws of half of the texts, without replacement: 100 of 200, as the study draws them.

    A draw with replacement would hold texts twice, which the unbiased estimator of HSIC takes for alike. And of half
    samples the spread needs no correction: around the value of all texts it is that of all texts around the truth
    (the delete-half jackknife, Shao and Wu 1989).

    Args:
        groups: [n] the text that each row belongs to. All rows of a text are drawn together: tokens of one text are
            not independent.
        draws: How many.
        seed: Of the draws.

    Returns:
        [n, draws] fp64, 1 where a row is drawn.
    """
    texts, place = torch.unique(groups, return_inverse=True)
    rng = np.random.default_rng(seed)
    chosen = np.zeros((len(texts), draws))
    for draw in range(draws):
        chosen[rng.permutation(len(texts))[: len(texts) // 2], draw] = 1
    return torch.from_numpy(chosen)[place]


def _hsic(k: Tensor, m: Tensor, w: Tensor, measure: str) -> Tensor:
    """[draws] inner products of two Gram matrices' forms over the drawn rows only, up to a common factor."""
    both = (w * ((k * m) @ w)).sum(dim=0)
    if measure == "plain":
        return both
    n, kw, mw = w.sum(dim=0), k @ w, m @ w
    if measure == "debiased":
        k_diagonal, m_diagonal = k.diagonal().unsqueeze(1), m.diagonal().unsqueeze(1)
        both = both - (w * k_diagonal * m_diagonal).sum(dim=0)
        kw, mw = kw - k_diagonal * w, mw - m_diagonal * w
    sums, crossed = (w * kw).sum(dim=0) * (w * mw).sum(dim=0), (w * kw * mw).sum(dim=0)
    if measure == "centred":
        return both - 2 / n * crossed + sums / n**2
    return both - 2 / (n - 2) * crossed + sums / ((n - 1) * (n - 2))


def drawn_cka(a: Gram, b: Gram, w: Tensor, measure: str) -> Tensor:
    """CKA [draws] of two layers over the drawn rows alone; NaN where a draw leaves nothing to align.

    Args:
        a: One model's layer, n rows.
        b: The other's.
        w: [n, draws], from `half_samples`.
        measure: One of `MEASURES`.
    """
    k, m = (a.plain, b.plain) if measure == "plain" else (a.centred, b.centred)
    own = _hsic(k, k, w, measure) * _hsic(m, m, w, measure)
    return _hsic(k, m, w, measure) / own.clamp(min=0).sqrt()


def half_sample_interval(
    estimate: float, drawn: Tensor, texts: int, confidence: float = 0.95
) -> tuple[float, float] | None:
    """Interval around the value of all texts, from values of halves of them.

    The ends are the percentiles of the draws (2.5 and 97.5 for 0.95) less their mean, added to the estimate. The
    percentiles themselves would be those of half as many texts, for which the plain and the centred form are biased
    further upwards.

    For representations that have something in common the width is right (0.99 of that of 200 fresh sets of 61 texts).
    For unrelated ones it is too wide by sqrt(3): the error of the debiased form then shrinks as 1 / n, not as
    1 / sqrt(n), and half samples of n / 2 lie further out. So 0 is inside more often than 95 times in 100.

    Args:
        estimate: Of all texts.
        drawn: [draws].
        texts: How many there are.
        confidence: 0.95 for 95 %.

    Returns:
        Low and high, within -1 to 1; None where fewer than half of the draws have a value.
    """
    values = drawn[torch.isfinite(drawn)].cpu().numpy()
    if len(values) < max(2, len(drawn) / 2):
        return None
    half = texts // 2
    scale = float(np.sqrt(half / (texts - half)))  # 1 for an even number of texts
    tail = (1 - confidence) / 2
    low, high = (np.quantile(values, (tail, 1 - tail)) - values.mean()) * scale
    return max(-1.0, min(estimate, estimate + float(low))), min(1.0, max(estimate, estimate + float(high)))
