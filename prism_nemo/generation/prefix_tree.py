"""Rows of tokens as a tree in which what they begin with alike stands once.

The questions of a task share its examples, the options of a question share the question, and answers of one token share
all that is read: in five-shot multiple choice, nine tokens of ten. Rows are sorted as bytes and compared with their
neighbour only, so that building the tree costs a fraction of reading one of them with a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_Row = np.ndarray[Any, Any]


@dataclass(eq=False)
class Node:
    """Tokens that follow each other in every row that comes this way.

    Attributes:
        row: A row that comes this way.
        start: Place in it of the first token; 0 is the row's beginning.
        end: Place after the last one; equal to `start` in the root alone.
        parent: What the rows have before; None for the root.
        children: How they go on; each begins with another token.
        targets: (place, slot): what stands in `slot` is asked of the output at `place`.
        size: Tokens of this node and all below it.
    """

    row: _Row
    start: int
    end: int
    parent: Node | None = None
    children: list[Node] = field(default_factory=list)
    targets: list[tuple[int, int]] = field(default_factory=list)
    size: int = 0

    def __len__(self) -> int:
        return self.end - self.start

    def __bool__(self) -> bool:
        return True

    def walk(self) -> Iterator[Node]:
        """This node and all below it, parents before their children and each child's subtree as a whole."""
        stack = [self]
        while stack:
            node = stack.pop()
            yield node
            stack += reversed(node.children)

    def split(self, place: int) -> Node:
        """Cut the node in two before `place`; this one keeps the end and what follows, the new one is given back."""
        if self.parent is None or not self.start < place < self.end:
            raise ValueError(f"cannot cut tokens {self.start} to {self.end} at {place}")
        upper = Node(self.row, self.start, place, self.parent, [self])
        self.parent.children[self.parent.children.index(self)] = upper
        self.start, self.parent = place, upper
        return upper


def sortable(row: Sequence[int]) -> _Row:
    """A row as big-endian numbers, whose bytes sort as the numbers do."""
    return np.asarray(row, dtype=">u4")


def shared_length(one: _Row, other: _Row) -> int:
    """How many tokens two rows begin with alike."""
    least = min(len(one), len(other))
    different = np.flatnonzero(one[:least] != other[:least])
    return int(different[0]) if len(different) else least


def in_order(rows: Sequence[_Row]) -> list[int]:
    """Indices of the rows, sorted by their tokens: rows that begin alike follow each other, a prefix comes first."""
    keys = [row.tobytes() for row in rows]
    return sorted(range(len(rows)), key=keys.__getitem__)


def build_tree(rows: Sequence[_Row], longest: int) -> tuple[Node, list[Node]]:
    """The tree of some rows.

    Args:
        rows: From `sortable`; none is empty.
        longest: Most tokens of a node; longer ones are cut into nodes that follow each other.

    Returns:
        The root, which has no tokens of its own, and for each row the node that it ends with.
    """
    root = Node(sortable([]), 0, 0)
    ends, path = [root] * len(rows), [root]
    previous = root.row
    for index in in_order(rows):
        row = rows[index]
        shared = shared_length(previous, row)
        while len(path) > 1 and path[-1].start >= shared:
            path.pop()
        if path[-1].end > shared:
            path[-1] = path[-1].split(shared)
        if len(row) > shared:
            path[-1].children.append(Node(row, shared, len(row), path[-1]))
            path.append(path[-1].children[-1])
        ends[index], previous = path[-1], row
    for node in list(root.walk()):
        while len(node) > longest:
            node.split(node.start + longest)
    for node in reversed(list(root.walk())):
        node.size = len(node) + sum(child.size for child in node.children)
    return root, ends


def ask(end: Node, first: int, slot: int) -> None:
    """Ask for the outputs of a row from place `first` to its end, into `slot` and the following ones.

    Args:
        end: The node that the row ends with.
        first: Place in the row.
        slot: Where the answers go.
    """
    node: Node | None = end
    while node is not None and node.end > first:
        node.targets += [(place, slot + place - first) for place in range(max(first, node.start), node.end)]
        node = node.parent


def families(siblings: Sequence[Node], limit: int) -> Iterator[list[Node]]:
    """All nodes of some subtrees, parents first and each subtree as a whole.

    Args:
        siblings: Nodes with the same parent.
        limit: Leaves of one parent come together, as many as have this many tokens.

    Returns:
        Leaves that come together, and other nodes by themselves.
    """

    def leaves(nodes: Sequence[Node]) -> Iterator[list[Node]]:
        return packed([node for node in nodes if not node.children], limit)

    yield from leaves(siblings)
    stack = [node for node in reversed(siblings) if node.children]
    while stack:
        node = stack.pop()
        yield [node]
        yield from leaves(node.children)
        stack += [child for child in reversed(node.children) if child.children]


def packed(nodes: Sequence[Node], limit: int) -> Iterator[list[Node]]:
    """Neighbouring subtrees, as many as have `limit` tokens together; one at least."""
    batch: list[Node] = []
    total = 0
    for node in nodes:
        if batch and total + node.size > limit:
            yield batch
            batch, total = [], 0
        batch.append(node)
        total += node.size
    if batch:
        yield batch


def shares(rows: Sequence[_Row], parts: int) -> list[list[int]]:
    """Indices of the rows for each of some readers, such that rows that begin alike mostly have the same one.

    Args:
        rows: From `sortable`.
        parts: Readers.

    Returns:
        For each of them a stretch of the sorted rows; together about as many different tokens as each other one has.
    """
    order = in_order(rows)
    new = [len(rows[i]) - (shared_length(rows[order[k - 1]], rows[i]) if k else 0) for k, i in enumerate(order)]
    middles = np.cumsum(new) - np.asarray(new) / 2
    owners = np.minimum(middles * parts / max(1, sum(new)), parts - 1).astype(int).tolist()
    found: list[list[int]] = [[] for _ in range(parts)]
    for index, owner in zip(order, owners, strict=True):
        found[owner].append(index)
    return found
