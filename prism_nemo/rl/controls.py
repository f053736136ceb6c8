"""Rewards that are not the task's: length shaping, and the controls that tell learning from drift.

A control replaces the reward after it was computed, so that everything else of a run (prompts, sampling, optimizer,
schedule) is that of the real one. What the policy does under a control is what updates of that size do by themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

CONTROLS = ("none", "random", "shuffled", "format_only", "frozen")


def overlong_penalty(length: int, max_new_tokens: int, buffer: int, penalty: float) -> float:
    """DAPO's soft punishment of length (arXiv 2503.14476 eq. 13), a number of 0 or less.

    0 up to ``max_new_tokens - buffer`` tokens, then falling in a straight line to ``-penalty`` at `max_new_tokens`.

    Args:
        length: Tokens of the response.
        max_new_tokens: The most it may have.
        buffer: Tokens before the limit in which the penalty grows; 0: none.
        penalty: At the limit.
    """
    if buffer == 0:
        return 0.0
    over = length - (max_new_tokens - buffer)
    return -penalty * min(max(over, 0), buffer) / buffer


def controlled(
    control: str,
    rewards: Sequence[float],
    well_formed: Sequence[bool],
    texts: Sequence[tuple[str, str]],
    group_size: int,
    seed: Sequence[int],
    rate: float,
) -> list[float]:
    """The rewards that a control gives instead.

    - ``random``: 1 with probability `rate`, anew for every response, whatever it says.
    - ``shuffled``: the group's own rewards in random order. Mean, variance and number of groups that teach something
      stay those of the real run; only the link between response and reward is cut.
    - ``format_only``: 1 for the required form, right or wrong.
    - ``frozen``: 1 for a share `rate` of all (question, response) pairs, the same ones throughout the run: a reward
      that is consistent, can be learned, and says nothing about being right.

    Args:
        control: One of `CONTROLS`.
        rewards: The real ones, groups together.
        well_formed: Whether each response has the required form.
        texts: (question, response) of each.
        group_size: Responses per prompt.
        seed: Of each group: its number in the run (and nothing else, so any layout gives the same rewards).
        rate: See above.

    Returns:
        One reward for each response.
    """
    if control == "none":
        return list(rewards)
    if control == "format_only":
        return [float(formed) for formed in well_formed]
    if control == "frozen":
        return [float(_fraction(question, response) < rate) for question, response in texts]
    result: list[float] = []
    for number, first in enumerate(range(0, len(rewards), group_size)):
        rng = np.random.Generator(np.random.Philox(key=np.array([0xC0, seed[number]], np.uint64)))
        if control == "random":
            result += (rng.random(group_size) < rate).astype(float).tolist()
        else:
            result += rng.permutation(np.asarray(rewards[first : first + group_size], dtype=float)).tolist()
    return result


def _fraction(question: str, response: str) -> float:
    """A number in [0, 1) that is fixed by the two texts."""
    digest = hashlib.sha256(f"{len(question)}/{question}{response}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2.0**64
