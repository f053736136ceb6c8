"""What one pass over part of a prefix tree needs to know of its tokens, computed once and read by every layer.

The tokens of a pass lie one after another, without padding. Keys and values lie in buffers in which a column is a place
in a row. Nodes come in the tree's depth-first order, and each overwrites the columns behind its parent's: whenever a
node attends, the columns before it hold the tokens that it follows and no others, with nothing copied and no mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prism_nemo.generation.prefix_tree import Node

# Leaves of one parent attend together up to this many tokens: fewer calls, at the price of scores that are masked.
FAMILY = 128
# Tokens of a node that attend at a time, and elements of the mask that they share.
_BLOCK, _MASK = 256, 2**22
# Nodes are scanned together down to this share of the longest one's length.
_SIMILAR = 0.5


@dataclass
class Job:
    """Tokens that attend together.

    Attributes:
        first: First of them in the pass.
        last: Last plus one.
        at: Column of the first; the others follow.
        start: First column that any of them sees.
        stop: Last column plus one.
        mask: [tokens * query heads of a group, columns] to add to the scores, or None where all see all.
    """

    first: int
    last: int
    at: int
    start: int
    stop: int
    mask: torch.Tensor | None


@dataclass
class Stretch:
    """Nodes at the same distance from where the pass began, which a recurrence runs over together.

    Attributes:
        places: [b, t], where their tokens are in the pass; padding on the right repeats some token.
        real: [b, t, 1], whether it is no padding.
        lengths: [b].
        before: [b], the memory that each goes on from.
        continued: [k], those of them that others go on from.
        after: [k], the memories that these leave behind.
    """

    places: torch.Tensor
    real: torch.Tensor
    lengths: torch.Tensor
    before: torch.Tensor
    continued: torch.Tensor
    after: torch.Tensor


@dataclass
class Pass:
    """Tokens that are read together.

    Attributes:
        tokens: [n] ids.
        positions: [n], places in their rows.
        jobs: For attention, in order.
        stretches: For recurrences, in order.
        memories: How many memories of a recurrence there are: 0 is the one that the pass begins with.
        scored: [r], tokens whose output is asked for.
        outputs: [q], for each question the place in `scored`.
        slots: Of each question.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    jobs: list[Job]
    stretches: list[Stretch]
    memories: int
    scored: torch.Tensor
    outputs: torch.Tensor
    slots: list[int]


class Masks:
    """Makes the masks of attention.

    Args:
        longest: Most tokens of a row.
        per_group: Query heads of a group; they stand side by side for each token.
        window: Positions that a token sees, itself included; None for all before it.
        like: Gives type and device.
    """

    def __init__(self, longest: int, per_group: int, window: int | None, like: torch.Tensor) -> None:
        self.per_group, self.window, self._like, self._before = per_group, window, like, longest
        self.block = max(1, min(_BLOCK, longest, _MASK // longest))
        tokens = torch.arange(self.block, device=like.device).unsqueeze(-1)
        # Of tokens that stand at the very end of the longest row; a part of it serves those that stand before.
        self._chain = self._of(torch.arange(-longest, self.block, device=like.device), tokens)

    def start(self, at: int) -> int:
        """First column that a token in column `at` sees."""
        return 0 if self.window is None else max(0, at - self.window + 1)

    def chain(self, at: int, count: int) -> torch.Tensor | None:
        """For `count` tokens that follow each other, at most `block`, the first in column `at`."""
        if count == 1:
            return None
        first = self._before - at + self.start(at)
        return self._chain[: count * self.per_group, first : self._before + count]

    def family(self, at: int, lengths: Sequence[int]) -> torch.Tensor:
        """For nodes of these lengths, side by side from column `at` on, that each follow what is before `at`."""
        sizes = torch.tensor(lengths)
        member = torch.arange(len(lengths)).repeat_interleave(sizes)
        place = at + torch.cat([torch.arange(length) for length in lengths])
        before = torch.arange(self.start(at), at)
        stranger = torch.cat((torch.zeros(len(place), len(before), dtype=torch.bool), member != member[:, None]), dim=1)
        mask = self._of(torch.cat((before, place)), place.unsqueeze(-1), stranger)
        return mask.to(self._like.device)

    def _of(self, columns: torch.Tensor, tokens: torch.Tensor, hidden: torch.Tensor | None = None) -> torch.Tensor:
        later = columns > tokens
        if self.window is not None:
            later |= columns <= tokens - self.window
        if hidden is not None:
            later |= hidden
        zeros = torch.zeros(later.shape, dtype=self._like.dtype, device=later.device)
        return zeros.masked_fill_(later, -torch.inf).repeat_interleave(self.per_group, dim=0)


def plan(groups: Sequence[Sequence[Node]], masks: Masks | None, recurs: bool, device: torch.device) -> Pass:
    """Lay out a pass.

    Args:
        groups: Nodes that attend together, from `families`; a group of one may have any length.
        masks: None for a model without attention.
        recurs: Whether the model has recurrent layers.
        device: Of the tensors.
    """
    nodes = [node for group in groups for node in group]
    first: dict[Node, int] = {}
    count = 0
    for node in nodes:
        first[node] = count
        count += len(node)
    tokens = torch.cat([torch.from_numpy(node.row[node.start : node.end].astype("int64")) for node in nodes])
    positions = torch.cat([torch.arange(node.start, node.end) for node in nodes])
    jobs = [] if masks is None else [job for group in groups for job in _jobs(group, first[group[0]], masks)]
    stretches, memories = _stretches(nodes, first, device) if recurs else ([], 1)
    asked = [(first[node] + place - node.start, slot) for node in nodes for place, slot in node.targets]
    scored, outputs = torch.tensor([place for place, _ in asked], dtype=torch.long).unique(return_inverse=True)
    return Pass(
        tokens.to(device),
        positions.to(device),
        jobs,
        stretches,
        memories,
        scored.to(device),
        outputs.to(device),
        [slot for _, slot in asked],
    )


def _jobs(group: Sequence[Node], first: int, masks: Masks) -> list[Job]:
    at, lengths = group[0].start, [len(node) for node in group]
    if len(group) > 1:
        count = sum(lengths)
        return [Job(first, first + count, at, masks.start(at), at + count, masks.family(at, lengths))]
    found = []
    for done in range(0, lengths[0], masks.block):
        begin, count = at + done, min(masks.block, lengths[0] - done)
        mask = masks.chain(begin, count)
        found.append(Job(first + done, first + done + count, begin, masks.start(begin), begin + count, mask))
    return found


def _stretches(nodes: list[Node], first: dict[Node, int], device: torch.device) -> tuple[list[Stretch], int]:
    """Stretches, and how many memories there are."""
    depth: dict[Node, int] = {}
    memory: dict[Node, int] = {}
    levels: list[list[Node]] = []
    for node in nodes:
        depth[node] = depth.get(node.parent, -1) + 1 if node.parent is not None else 0
        if depth[node] == len(levels):
            levels.append([])
        levels[depth[node]].append(node)
        if node.children:  # also where they come in a later pass: then the memory is the last one, and kept
            memory[node] = len(memory) + 1
    found = []
    for level in levels:
        waiting = sorted(level, key=len, reverse=True)
        while waiting:
            together = [node for node in waiting if len(node) >= _SIMILAR * len(waiting[0])]
            waiting = waiting[len(together) :]
            found.append(_stretch(together, first, memory, device))
    return found, len(memory) + 1


def _stretch(nodes: list[Node], first: dict[Node, int], memory: dict[Node, int], device: torch.device) -> Stretch:
    lengths = torch.tensor([len(node) for node in nodes])
    starts = torch.tensor([first[node] for node in nodes])
    within = torch.arange(int(lengths.max()))
    places = starts.unsqueeze(-1) + torch.minimum(within, lengths.unsqueeze(-1) - 1)
    continued = [i for i, node in enumerate(nodes) if node in memory]
    before = [0 if node.parent is None else memory.get(node.parent, 0) for node in nodes]
    return Stretch(
        places.to(device),
        (within < lengths.unsqueeze(-1)).unsqueeze(-1).to(device),
        lengths.to(device),
        torch.tensor(before, device=device),
        torch.tensor(continued, dtype=torch.long, device=device),
        torch.tensor([memory[nodes[i]] for i in continued], dtype=torch.long, device=device),
    )
