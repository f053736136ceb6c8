"""Making a text as long as was asked for: never longer, and at most a fiftieth shorter."""

from __future__ import annotations

from collections.abc import Callable

from prism_nemo.errors import InputError, PrismError

# At most this share of the length may be missing.
SLACK = 0.02


def fit(render: Callable[[int, int], str], count: Callable[[str], int], budget: int, least: int, what: str) -> str:
    """The longest text of at most `budget` tokens.

    Args:
        render: The text with so many units of filler and so many short ones at its end; more units, more tokens.
        count: Tokens of a text.
        budget: Most tokens.
        least: Fewest tokens that will do.
        what: Name of the task, for messages.

    Raises:
        InputError: Not even the text without filler fits.
        PrismError: The units are too coarse to come near enough.
    """
    empty = count(render(0, 0))
    if empty > budget:
        raise InputError(f"{what}: its question alone has {empty} tokens, and {budget} are left for it; ask for more")
    units = _most(lambda units: count(render(units, 0)), budget, empty)
    short = _most(lambda number: count(render(units, number)), budget, count(render(units, 0)))
    text = render(units, short)
    length = count(text)
    if not least <= length <= budget:
        raise PrismError(f"{what}: a text of {least} to {budget} tokens was asked for, but it has {length}")
    return text


def _most(length: Callable[[int], int], budget: int, empty: int) -> int:
    """The largest number whose length is within the budget.

    By interpolation, as the length grows evenly and every look at a text of 128k tokens takes a while.
    """
    low, low_length = 0, empty
    high, high_length = None, 0
    middle = 16
    while low_length < budget:
        found = length(middle)
        if found <= budget:
            if found == low_length:
                raise PrismError(
                    f"{middle} units of filler are no longer than {low}; {budget} tokens cannot be reached"
                )
            low, low_length = middle, found
        else:
            high, high_length = middle, found
        if high is None:
            middle = low + max(1, int((budget - low_length) * low / (low_length - empty)))
        elif high - low == 1:
            break
        else:
            each = (high_length - low_length) / (high - low)
            middle = min(high - 1, max(low + 1, low + int((budget - low_length) / each)))
    return low
