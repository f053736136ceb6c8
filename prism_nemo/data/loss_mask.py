"""From stretches of text that are trained on to the tokens that are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def token_mask(offsets: np.ndarray, counted: Sequence[tuple[int, int]], characters: int) -> np.ndarray:
    """Returns which tokens of a document are in the loss.

    A token is if any of its characters lies in a counted stretch. A token without a character of its own (a normaliser
    may insert one, and some tokenizers place the first bytes of a character that they cut there) goes with the
    character that it stands at. The end-of-document token is in the loss if the last character is, so that a model
    learns to stop after an answer.

    Args:
        offsets: First character of each token and one past its last, (tokens, 2).
        counted: The stretches, in order, as `template.spans_of` gives them.
        characters: Of the document.

    Returns:
        (tokens + 1,) uint8, 0 or 1; the last one is for the end-of-document token.
    """
    # before[i] is how many of the first i characters count.
    before = np.zeros(characters + 1, np.int64)
    for begin, stop in counted:
        before[begin + 1 : stop + 1] = 1
    np.cumsum(before, out=before)
    last = max(characters - 1, 0)
    first = np.minimum(offsets[:, 0], last)
    end = np.maximum(offsets[:, 1], first + 1) if characters else offsets[:, 1]
    mask = np.empty(len(offsets) + 1, np.uint8)
    mask[:-1] = before[end] > before[first]
    mask[-1] = before[characters] > before[last]
    return mask
