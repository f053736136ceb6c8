"""How weights of several models become one: linear, task arithmetic, TIES, SLERP; one tensor at a time.

Tensors of 16-bit types are merged in fp32, those of fp32 in fp64, and rounded once at the end. A model of weight 0 is
not read into the sum, so that weights 1 and 0 give the parent back bit for bit (0 * x would lose the sign of a zero).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from prism_nemo.errors import InputError

METHODS = ("linear", "task_arithmetic", "ties", "slerp")
# Tensors whose angle has a sine below this are interpolated in a straight line: sin(t a) / sin(a) loses its digits.
PARALLEL = 1e-4
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Recipe:
    """A merge.

    Attributes:
        method: One of `METHODS`.
        weights: See `recipe_of`.
        density: TIES only: share of each update that is kept, 0 to 1.
    """

    method: str
    weights: tuple[float, ...]
    density: float = 0.2

    @property
    def whole_tensors(self) -> bool:
        """Whether a result depends on more than the same place of each parent."""
        return self.method in ("ties", "slerp")


def recipe_of(method: str, models: int, weights: Sequence[float] | None, density: float = 0.2) -> Recipe:
    """Check what was asked for, and fill in what was not.

    Args:
        method: One of `METHODS`.
        models: Number of parents. For task arithmetic and TIES the first one is the base of the others.
        weights: linear: of each parent, sum 1; the last may be left out; equal if none is given. slerp: of the first of
            two. task_arithmetic, ties: of each parent but the base; 1 each if not given.
        density: See `Recipe`.

    Raises:
        InputError: Naming the option.
    """
    if method not in METHODS:
        raise InputError(f"--method '{method}' is unknown; choose one of {', '.join(METHODS)}")
    if models < 2:
        raise InputError("merge: at least two models are merged")
    given = [float(weight) for weight in weights or ()]
    if not all(abs(weight) < float("inf") for weight in given):
        raise InputError("--weight: must be finite numbers")
    if method in ("linear", "slerp"):
        if method == "slerp" and models != 2:
            raise InputError(f"--method slerp takes two models, not {models}")
        shares = given or [1 / models] * models
        if len(shares) == models - 1:
            shares.append(1 - sum(shares))
        if len(shares) != models or abs(sum(shares) - 1) > 1e-6:
            raise InputError(
                f"--weight: {method} of {models} models takes {models - 1} numbers (the last model gets the rest), or "
                f"{models} that add up to 1; got {', '.join(map(str, given))}"
            )
        if method == "slerp" and not 0 <= shares[0] <= 1:
            raise InputError(f"--weight {shares[0]}: slerp lies between the two models; use 0 to 1")
        return Recipe(method, tuple(shares))
    factors = given or [1.0] * (models - 1)
    if len(factors) != models - 1:
        raise InputError(
            f"--weight: {method} takes a number for each model but the first, which is the base: {models - 1}, not "
            f"{len(factors)}"
        )
    if method == "ties" and not 0 < density <= 1:
        raise InputError(f"--density {density}: the share of an update that is kept lies above 0 and at most at 1")
    return Recipe(method, tuple(factors), density)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which numbers of a stored type are merged."""
    return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32


def linear(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum_i w_i W_i``; model soups (Wortsman et al. 2022, arXiv 2203.05482), and the study's 15/85 merge."""
    kept = [(weight, tensor) for weight, tensor in zip(weights, tensors, strict=True) if weight != 0]
    if not kept:
        return torch.zeros_like(tensors[0])
    total = kept[0][1] * kept[0][0]
    for weight, tensor in kept[1:]:
        total = total + weight * tensor
    return total


def task_arithmetic(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``W_0 + sum_i w_i (W_i - W_0)`` (Ilharco et al. 2023, arXiv 2212.04089).

    Computed as ``(1 - sum_i w_i) W_0 + sum_i w_i W_i``, which is the same number, and exact for one weight of 1.
    """
    return linear(tensors, [1 - sum(weights), *weights])


def ties(tensors: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Trim, elect sign and merge (Yadav et al. 2023, arXiv 2306.01708).

    1. Of each update ``d_i = W_i - W_0`` the `density` share of largest magnitude is kept, with all that equal the
       smallest of these; the rest becomes 0.
    2. At each place the sign of ``sum_i w_i d_i`` is elected.
    3. The result is ``W_0 + lambda * m`` with m the mean, weighted by w_i, of those ``d_i`` that are kept and have the
       elected sign, and lambda the mean of the weights: equal weights w give the paper's lambda = w.

    Trimmed within each tensor, as merge tools do that stream; the paper trims within all weights of a model together.
    """
    return _elected(tensors, weights, [trim_limit(tensors[0], tensor, density) for tensor in tensors[1:]])


def trim_limit(base: Tensor, tensor: Tensor, density: float) -> float:
    """Magnitude that an update must reach to be kept; see `ties`."""
    size = base.numel()
    if size == 0:
        return 0.0
    kept = max(1, round(density * size))
    # Selected in place: of the largest tensor of a model a sort would need several copies.
    sizes = (tensor.to(working_dtype(base.dtype)) - base.to(working_dtype(base.dtype))).abs_().flatten().numpy()
    sizes.partition(size - kept)
    return float(sizes[size - kept])


def _elected(tensors: Sequence[Tensor], weights: Sequence[float], limits: Sequence[float]) -> Tensor:
    """Steps 2 and 3 of `ties`, at any places of the tensors."""
    base, votes = tensors[0], torch.zeros_like(tensors[0])
    updates = []
    for tensor, weight, limit in zip(tensors[1:], weights, limits, strict=True):
        update = tensor - base
        update = update.masked_fill(update.abs() < limit, 0.0)
        votes += weight * update
        updates.append(update)
    elected, total, mean = votes.sign(), torch.zeros_like(base), torch.zeros_like(base)
    for update, weight in zip(updates, weights, strict=True):
        # As numbers of their type: a truth value times a Python number would be fp32.
        share = ((update != 0) & ((weight * update).sign() == elected)).to(base.dtype) * abs(weight)
        total += share
        mean += share * update
    scale = sum(abs(weight) for weight in weights) / len(weights)
    # A place that nothing moves keeps the base's own number, also a negative zero.
    merge = torch.where(total > 0, base + scale * mean / torch.where(total > 0, total, 1.0), base)
    # NaN agrees with nothing and would be dropped without a word.
    return torch.where(votes.isfinite(), merge, votes)


def slerp(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """Along the great circle between two tensors (Shoemake 1985), each tensor as one vector.

    With the angle a between them and t = 1 - `weight`:
    ``sin((1 - t) a) / sin(a) W_1 + sin(t a) / sin(a) W_2``. Nearly parallel, opposite or zero tensors are interpolated
    in a straight line.

    Args:
        first: One tensor.
        second: The other.
        weight: Of the first, 0 to 1.
    """
    return linear((first, second), slerp_shares(first, second, weight))


def slerp_shares(first: Tensor, second: Tensor, weight: float) -> tuple[float, float]:
    """What the two tensors are multiplied with; computed in fp64, a million numbers at a time."""
    t = 1 - weight
    pairs = [first.flatten().split(_CHUNK), second.flatten().split(_CHUNK)]
    norms = [math.sqrt(sum(float(part.double().square().sum()) for part in parts)) for parts in pairs]
    if min(norms) == 0:
        return weight, t
    # From half chords, not the arc cosine of the product, which has no digits left near 0.
    apart = along = 0.0
    for a, b in zip(*pairs, strict=True):
        u, v = a.double() / norms[0], b.double() / norms[1]
        apart, along = apart + float((u - v).square().sum()), along + float((u + v).square().sum())
    angle = 2 * math.atan2(math.sqrt(apart), math.sqrt(along))
    sine = math.sin(angle)
    if sine < PARALLEL:
        return weight, t
    return math.sin(weight * angle) / sine, math.sin(t * angle) / sine


def place_by_place(recipe: Recipe, tensors: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], Tensor]:
    """How the same part of each parent becomes that part of the merge, in the type of the parents.

    Args:
        recipe: From `recipe_of`.
        tensors: The whole tensors; looked at only if `recipe.whole_tensors`.
    """
    work: Callable[[Sequence[Tensor]], Tensor]
    if recipe.method == "ties":
        limits = [trim_limit(tensors[0], tensor, recipe.density) for tensor in tensors[1:]]
        work = partial(_elected, weights=recipe.weights, limits=limits)
    elif recipe.method == "slerp":
        work = partial(linear, weights=slerp_shares(tensors[0], tensors[1], recipe.weights[0]))
    else:
        work = partial(linear if recipe.method == "linear" else task_arithmetic, weights=recipe.weights)

    def merge(parts: Sequence[Tensor]) -> Tensor:
        dtype = parts[0].dtype
        return work([part.to(working_dtype(dtype)) for part in parts]).to(dtype)

    return merge


def merged(recipe: Recipe, tensors: Sequence[Tensor]) -> Tensor:
    """One tensor from the same tensor of each parent, in their type."""
    return place_by_place(recipe, tensors)(tensors)
