"""Documents packed into one row: where they lie, and what every layer needs to keep them apart, prepared once.

Attention to many short documents, one call each, costs more in calls than in arithmetic; one masked call over the row
costs the square of the row. So documents of similar length share a call: they are laid out as a batch, each padded at
its end with copies of its own last token. Under a causal mask no token sees what comes after it, so the padding adds
terms that are exactly 0, and no row of the batch holds a token of another document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.packed_seq_params import PackedSeqParams

MAX_PADDING = 0.3
"""Largest share of padding, in tokens of the documents, that a group may add: memory is bounded by it."""

SHORTEST_ROW = 128
"""Tokens; cutting further saves no steps (a chunk of Mamba's recurrence has as many) and costs memory."""

# Forward and backward in fp32 on one core of a server CPU (benchmarks/packed_attention.py prints the shape of it). What
# counts is their proportion: a call costs as much as this many pairs of tokens.
_CALL_SECONDS = 150e-6
_PAIR_SECONDS = 0.4e-9  # per pair of tokens and number of a query (heads x head_dim)
_TOKEN_SECONDS = 4e-9  # per token, likewise: what is moved, and what a small product costs before it does anything

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Grouping:
    """How the heads of all tokens are laid out for attention, group after group.

    The heads of the queries, keys and values of a token are taken as rows of head_dim numbers, [tokens, heads + 2
    groups] of them. `rows` says which row goes where, as [documents, heads, length] queries, then keys, then values of
    the first group of documents, and so on. `out_rows` says it for the queries' heads alone, [tokens, heads].

    Attributes:
        shapes: (documents, length) of each group, padding included.
        rows: int32 [slots x (heads + 2 groups)].
        places: int32 [tokens x (heads + 2 groups)], where `rows` has put each row: its inverse.
        out_rows: int32 [slots x heads].
        out_places: int32 [tokens x heads].
        out_padding: int64, the rows of the output that are padding.
        positions: int64 [tokens], the place of each token in its document.
    """

    shapes: list[tuple[int, int]]
    rows: torch.Tensor
    places: torch.Tensor
    out_rows: torch.Tensor
    out_places: torch.Tensor
    out_padding: torch.Tensor
    positions: torch.Tensor


class PackedDocuments(PackedSeqParams):
    """Megatron's description of a packed row ("thd", batch 1), with what the layers here derive from it.

    Made by `pack_documents`; its tensors are its own and must not be written to.

    Attributes:
        bounds: Where documents begin, and the number of tokens: [documents + 1], increasing.
        seq_idx: Index of each token's document, int32 [1, tokens], as Mamba's kernels take it.
        rows: Into how many equal parts the row may be cut without cutting a document, no part being shorter than
            `SHORTEST_ROW`. A micro-batch of many rows comes flattened to one; where a layer goes along the sequence
            step by step, its parts side by side are as many times fewer steps.
    """

    def __init__(self, bounds: Integers, device: torch.device) -> None:
        lengths = np.diff(bounds)
        ends = torch.from_numpy(bounds.astype(np.int32)).to(device)
        longest = int(lengths.max())
        super().__init__(
            qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
        )
        self.bounds = bounds
        index = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        self.seq_idx = torch.from_numpy(index).to(device).unsqueeze(0)
        self.rows = _equal_rows(bounds)
        self._groupings: dict[tuple[int, int, int], Grouping] = {}

    @property
    def tokens(self) -> int:
        """Tokens of the row."""
        return int(self.bounds[-1])

    @property
    def lengths(self) -> list[int]:
        """Tokens of each document."""
        return [int(length) for length in np.diff(self.bounds)]

    def grouping(self, heads: int, groups: int, head_dim: int) -> Grouping:
        """The layout for attention of this shape (of one tensor-parallel rank); made once for all layers.

        Args:
            heads: Query heads.
            groups: Key/value heads.
            head_dim: Numbers of a head.
        """
        key = heads, groups, head_dim
        if key not in self._groupings:
            self._groupings[key] = _lay_out(self.bounds, heads, groups, head_dim, self.seq_idx.device)
        return self._groupings[key]


def pack_documents(
    cu_seqlens: torch.Tensor | Sequence[int], tokens: int | None = None, device: torch.device | None = None
) -> PackedDocuments:
    """Describe the documents of one packed row. Documents without tokens are left out.

    Args:
        cu_seqlens: Where each document begins, and at last the number of tokens; copied.
        tokens: What the row has, where that is known.
        device: Where the result lies; that of `cu_seqlens` if not given. From a card's memory it would have to be
            fetched, which waits for all that the card has to do.

    Raises:
        ValueError: If the numbers do not start at 0, decrease, or do not end at `tokens`.
    """
    if device is None:
        device = cu_seqlens.device if isinstance(cu_seqlens, torch.Tensor) else torch.device("cpu")
    values = cu_seqlens.detach().cpu().numpy() if isinstance(cu_seqlens, torch.Tensor) else np.asarray(cu_seqlens)
    if values.ndim != 1 or len(values) < 2 or values.dtype.kind not in "iu":
        raise ValueError(f"cu_seqlens must be integers [documents + 1], not {values.dtype} {list(values.shape)}")
    if values[0] != 0:
        raise ValueError(f"the first document must begin at 0, not at {values[0]}")
    lengths = np.diff(values.astype(np.int64))
    if (lengths < 0).any():
        at = int(np.argmax(lengths < 0))
        raise ValueError(f"document {at} begins at {values[at]} but ends before it, at {values[at + 1]}")
    if values[-1] == 0:
        raise ValueError("no document has a token")
    if tokens is not None and values[-1] != tokens:
        raise ValueError(f"documents end at {values[-1]}, but the row has {tokens} tokens")
    bounds = np.concatenate(([0], np.cumsum(lengths[lengths > 0])))
    return PackedDocuments(bounds, device)


def documents_of(packed: PackedSeqParams, tokens: int) -> PackedDocuments:
    """The documents of `packed`, which may be Megatron's own class: then they are made once for all layers.

    Where documents have been padded to multiples of something (``cu_seqlens_q_padded``), the padding counts as their
    own: it comes after them and cannot be seen.

    Args:
        packed: Of a row in the format "thd".
        tokens: What the row has.

    Raises:
        ValueError: If the documents do not end where the row does, or as `pack_documents` does.
    """
    if isinstance(packed, PackedDocuments):
        documents = packed
    else:
        ends = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
        # The same object may be filled anew for the next micro-batch: with another tensor, or by writing to this one.
        key: Any = None if ends.is_inference() else (ends, ends._version)
        made = vars(packed).get("_documents")
        if key is not None and made is not None and made[0][0] is ends and made[0][1] == ends._version:
            documents = made[1]
        else:
            documents = pack_documents(ends)
            if key is not None:
                vars(packed)["_documents"] = (key, documents)
    if documents.tokens != tokens:
        raise ValueError(f"documents end at {documents.tokens}, but the row has {tokens} tokens")
    return documents


def _equal_rows(bounds: Integers) -> int:
    """See `PackedDocuments.rows`."""
    tokens = int(bounds[-1])
    for length in bounds[(bounds >= SHORTEST_ROW) & (tokens % np.maximum(bounds, 1) == 0)].tolist():
        if np.isin(np.arange(length, tokens, length), bounds).all():
            return tokens // length
    return 1


def group_lengths(lengths: Integers, width: int) -> list[Integers]:
    """Split documents into groups that share a call, at the least cost in time with at most `MAX_PADDING`.

    In order of length a group is a range. The best split up to each length follows from those up to shorter ones. Only
    distinct lengths count, and a row of t tokens has at most (2 t)^1/2 of those.

    Args:
        lengths: Tokens of each document, positive.
        width: Numbers of a token's query.

    Returns:
        Indices of documents, one array per group.
    """
    order = np.argsort(lengths, kind="stable")
    distinct, counts = np.unique(lengths, return_counts=True)
    many = np.concatenate(([0], np.cumsum(counts)))
    real = np.concatenate(([0], np.cumsum(counts * distinct)))
    best, begins = np.zeros(len(distinct) + 1), np.zeros(len(distinct), dtype=np.int64)
    for last, length in enumerate(distinct):
        documents = many[last + 1] - many[: last + 1]
        tokens = real[last + 1] - real[: last + 1]
        slots = documents * length
        cost = _CALL_SECONDS + slots * width * (_TOKEN_SECONDS + _PAIR_SECONDS * length)
        cost = np.where(slots <= (1 + MAX_PADDING) * tokens, best[: last + 1] + cost, np.inf)
        begins[last] = np.argmin(cost)
        best[last + 1] = cost[begins[last]]
    groups, end = [], len(distinct)
    while end:
        begin = int(begins[end - 1])
        groups.append(order[many[begin] : many[end]])
        end = begin
    return groups


def _lay_out(bounds: Integers, heads: int, groups: int, head_dim: int, device: torch.device) -> Grouping:
    """See `Grouping`."""
    lengths, tokens, every = np.diff(bounds), int(bounds[-1]), heads + 2 * groups
    shapes: list[tuple[int, int]] = []
    rows, out_rows, real, out_real = [], [], [], []
    for members in group_lengths(lengths, heads * head_dim):
        own, longest = lengths[members], int(lengths[members].max())
        place = np.arange(longest)
        tokens_of = bounds[members, None] + np.minimum(place, own[:, None] - 1)
        is_real = place < own[:, None]
        shapes.append((len(members), longest))
        for first, count in ((0, heads), (heads, groups), (heads + groups, groups)):
            block = tokens_of[:, None] * every + (first + np.arange(count))[:, None]
            rows.append(block.ravel())
            real.append(np.broadcast_to(is_real[:, None], block.shape).ravel())
        out_rows.append((tokens_of[:, None] * heads + np.arange(heads)[:, None]).ravel())
        out_real.append(real[-3])

    def moved(x: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(x).to(device)

    into, is_row, out, is_out = (np.concatenate(parts) for parts in (rows, real, out_rows, out_real))
    return Grouping(
        shapes,
        moved(into.astype(np.int32)),
        moved(_inverse(into, is_row, tokens * every)),
        moved(out.astype(np.int32)),
        moved(_inverse(out, is_out, tokens * heads)),
        moved(np.flatnonzero(~is_out)),
        moved(np.arange(tokens) - np.repeat(bounds[:-1], lengths)),
    )


def _inverse(index: Integers, real: npt.NDArray[np.bool_], size: int) -> npt.NDArray[np.int32]:
    """Where in `index` each of 0..size-1 stands, not counting padding."""
    inverse = np.empty(size, dtype=np.int32)
    places = np.flatnonzero(real)
    inverse[index[places]] = places
    return inverse
