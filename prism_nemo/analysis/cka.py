"""Linear centred kernel alignment (CKA): how alike two sets of representations of the same inputs are.

Kornblith et al. 2019 (arXiv 1905.00414). With X (n, p) and Y (n, q) centred by column,

    CKA = ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F) = <K, L>_F / (||K||_F ||L||_F),  K = X X^T, L = Y Y^T.

The first is the feature-space form, the second the Gram form; they are equal, and the cheaper one is used. CKA is 1 for
representations that differ by a rotation and a uniform scale, but not by an arbitrary linear map.

Read the values with care. A few dimensions of very large activation dominate both norms, so on raw residual states the
measure is nearly blind to everything else (flat lines near 1 over most of a stack). And for n rows of many more
features (p >> n), the plain form is biased upwards, towards 1 even for unrelated data: use `debiased_linear_cka`.
All values are computed in float64 and are exact to rounding, so 1 may come out as 1 + 1e-15.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _checked(x: Tensor, name: str) -> Tensor:
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"{name}: expected (rows, features) with at least one feature, got shape {tuple(x.shape)}")
    x = x.detach().double()
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name}: holds NaN or Inf; find the input that caused it and leave it out")
    return x


def _checked_pair(x: Tensor, y: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Both in float64; raises ValueError for wrong shapes, unequal or too few rows, and non-finite values."""
    x, y = _checked(x, "x"), _checked(y, "y")
    if x.shape[0] != y.shape[0]:
        raise ValueError(f"x has {x.shape[0]} rows, y has {y.shape[0]}; both need the same inputs in the same order")
    if x.shape[0] < least:
        raise ValueError(f"{x.shape[0]} rows are too few, at least {least} are needed")
    return x, y


def _centred(x: Tensor, name: str) -> Tensor:
    # Compare with the first row, not the norm after centring with 0: the mean of equal numbers is rounded.
    if bool((x == x[0]).all()):
        raise ValueError(f"{name}: every feature is constant over the rows, so CKA is undefined")
    return x - x.mean(dim=0)


def _gram_product(x: Tensor, y: Tensor) -> float:
    """<X X^T, Y Y^T>_F for x (n, p), y (n, q): by features where n exceeds both widths, else by Gram matrices."""
    if x.shape[0] > max(x.shape[1], y.shape[1]):
        return float((y.T @ x).square().sum())
    return float(((x @ x.T) * (y @ y.T)).sum())


def _ratio(xy: float, xx: float, yy: float) -> float:
    scale = math.sqrt(xx) * math.sqrt(yy)
    if scale == 0:
        raise ValueError("the features vary too little for float64, so CKA is undefined; scale them up")
    return xy / scale


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of two representations of the same n inputs (Kornblith et al. 2019, with the linear kernel).

    Args:
        x: (n, p), any floating type; centred here.
        y: (n, q), the same inputs in the same order.

    Returns:
        0 (unrelated) to 1 (equal up to rotation and uniform scale), to rounding.

    Raises:
        ValueError: not (rows, features); n differs or is below 2; NaN or Inf; all features of x or y are constant.
    """
    x, y = _checked_pair(x, y, least=2)
    x, y = _centred(x, "x"), _centred(y, "y")
    return _ratio(_gram_product(x, y), _gram_product(x, x), _gram_product(y, y))


def _unbiased_hsic(x: Tensor, y: Tensor) -> float:
    """Unbiased HSIC (Song et al. 2012) times n (n - 3), for centred x (n, p) and y (n, q).

    With zero diagonals written K~ and L~, the estimator is

        tr(K~ L~) + (1^T K~ 1)(1^T L~ 1) / ((n - 1)(n - 2)) - 2 / (n - 2) 1^T K~ L~ 1.

    It does not change when a constant is added to all rows of x, so x may be centred; then K 1 = 0, the row sums of K~
    are minus the diagonal of K, and no n x n matrix is needed for them.
    """
    n = x.shape[0]
    k, m = x.square().sum(dim=1), y.square().sum(dim=1)
    diagonals = float(k @ m)
    traces = float(k.sum()) * float(m.sum())
    return _gram_product(x, y) - diagonals + traces / ((n - 1) * (n - 2)) - 2 / (n - 2) * diagonals


def debiased_linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA with the unbiased estimator of HSIC (Song et al. 2012), free of the upward bias at p >> n.

    Nguyen et al. 2020 (arXiv 2010.15327) average the same estimator of (x, y), (x, x) and (y, y) over minibatches and
    divide at the end: an estimate of the same quantity from less memory, but not equal to this value. For an exact
    streaming result, of the plain form, see `LinearCKA`.

    Args:
        x: (n, p), any floating type.
        y: (n, q), the same inputs in the same order.

    Returns:
        At most 1, to rounding; about 0 for unrelated data, where it may be negative.

    Raises:
        ValueError: as `linear_cka`, with n below 4; or the rows are all equally far apart (nothing to align).
    """
    x, y = _checked_pair(x, y, least=4)
    x, y = _centred(x, "x"), _centred(y, "y")
    own = []
    for name, z in (("x", x), ("y", y)):
        value = _unbiased_hsic(z, z)
        if value <= 1e-12 * _gram_product(z, z):  # zero but for rounding
            raise ValueError(f"{name}: its rows are all equally far apart, so debiased CKA is undefined; use more rows")
        own.append(value)
    return _ratio(_unbiased_hsic(x, y), *own)


def plain_linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA as the PRISM study prints it (arXiv 2603.17074): the formula above without centring.

    What all rows share counts as likeness. The mean of real residual streams is far longer than the spread around it,
    so this is near 1 for any two models that have it in common, and is reported beside the other forms only.

    Args:
        x: (n, p), any floating type.
        y: (n, q), the same inputs in the same order.

    Raises:
        ValueError: As `linear_cka`, with n of at least 1; or one of them is all zeros.
    """
    x, y = _checked_pair(x, y, least=1)
    return _ratio(_gram_product(x, y), _gram_product(x, x), _gram_product(y, y))


class LinearCKA:
    """Linear CKA over minibatches; the result is that of `linear_cka` on all rows at once, to rounding.

    Keeps means and centred cross products, updated by the merge rule of Chan, Golub and LeVeque 1983. Plain sums would
    do in exact arithmetic, but subtracting the mean at the end cancels where it is far larger than the spread, which is
    how massive activations look. Memory: p^2 + q^2 + p q doubles, for p = q = 4096 that is 400 MB.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._means: list[Tensor] = []
        self._products: list[Tensor] = []  # X^T X, Y^T Y, Y^T X, all centred
        self._first: list[Tensor] = []
        self._varies = [False, False]

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add a minibatch: x (m, p), y (m, q), m >= 1, of the same inputs.

        Raises:
            ValueError: not (rows, features), m or a width differs, no rows, NaN or Inf.
        """
        x, y = _checked_pair(x, y, least=1)
        if not self.rows:
            self._first = [x[0].clone(), y[0].clone()]
            self._means = [torch.zeros_like(x[0]), torch.zeros_like(y[0])]
            self._products = [x.new_zeros(x.shape[1], x.shape[1]), y.new_zeros(y.shape[1], y.shape[1])]
            self._products.append(x.new_zeros(y.shape[1], x.shape[1]))
        for name, z, first in zip("xy", (x, y), self._first, strict=True):
            if z.shape[1] != len(first):
                raise ValueError(f"{name}: {z.shape[1]} features, but {len(first)} in earlier minibatches")
        m = x.shape[0]
        means = [x.mean(dim=0), y.mean(dim=0)]
        cx, cy = x - means[0], y - means[1]
        dx, dy = means[0] - self._means[0], means[1] - self._means[1]
        weight = self.rows * m / (self.rows + m)
        pairs = ((cx, cx, dx, dx), (cy, cy, dy, dy), (cy, cx, dy, dx))
        for total, (left, right, d_left, d_right) in zip(self._products, pairs, strict=True):
            total += left.T @ right + weight * torch.outer(d_left, d_right)
        self._means[0] += dx * (m / (self.rows + m))
        self._means[1] += dy * (m / (self.rows + m))
        self._varies = [v or bool((z != f).any()) for v, z, f in zip(self._varies, (x, y), self._first, strict=True)]
        self.rows += m

    def compute(self) -> float:
        """Linear CKA of all rows so far.

        Raises:
            ValueError: fewer than 2 rows; all features of x or y are constant.
        """
        if self.rows < 2:
            raise ValueError(f"{self.rows} rows are too few, at least 2 are needed")
        for name, varies in zip("xy", self._varies, strict=True):
            if not varies:
                raise ValueError(f"{name}: every feature is constant over the rows, so CKA is undefined")
        xx, yy, yx = (float(product.square().sum()) for product in self._products)
        return _ratio(yx, xx, yy)


def cka_by_layer(states_a: list[Tensor], states_b: list[Tensor], *, debiased: bool = False) -> list[float]:
    """CKA of two models layer by layer, on the same inputs.

    Args:
        states_a: one (n, hidden) tensor per layer, for example hidden states averaged over the tokens of n texts.
        states_b: the same of the other model; hidden may differ.
        debiased: use `debiased_linear_cka`; advisable where hidden exceeds n.

    Returns:
        One value per layer.

    Raises:
        ValueError: the numbers of layers differ or are 0, or a layer cannot be compared; the message names the layer.
    """
    if len(states_a) != len(states_b) or not states_a:
        raise ValueError(f"{len(states_a)} and {len(states_b)} layers: two models with the same number are needed")
    measure = debiased_linear_cka if debiased else linear_cka
    values = []
    for layer, (a, b) in enumerate(zip(states_a, states_b, strict=True)):
        try:
            values.append(measure(a, b))
        except ValueError as error:
            raise ValueError(f"layer {layer}: {error}") from error
    return values
