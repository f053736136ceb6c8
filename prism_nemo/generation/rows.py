"""Which row of the cache each response has, and how rows are kept in order of length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from prism_nemo.errors import PrismError
from prism_nemo.generation.caches import Cache, Memory
from prism_nemo.generation.requests import Request, Response, Uniforms


@dataclass
class Prompt:
    """A prompt that some requests share.

    Attributes:
        tokens: Token ids.
        waiting: Requests that have no row yet; once there are none, `memories` and `logits` are let go.
        memories: What each layer remembers of the prompts that were read together, this one at `place`.
        logits: [b, vocab] of the next token of each of those, where logits are.
        place: Row of both.
    """

    tokens: list[int]
    waiting: int = 0
    memories: list[Memory] | None = None
    logits: torch.Tensor | None = None
    place: int = 0


@dataclass
class Sequence:
    """A response that is being written.

    Attributes:
        index: Of the request.
        request: What was asked for.
        prompt: Shared with other requests.
        tokens: Written so far.
        logprobs: Of each.
        finished: Whether a stop token or text was reached.
        done: Whether it is over, stopped or cut.
        row: In the cache.
    """

    index: int
    request: Request
    prompt: Prompt
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False
    done: bool = False
    row: int = -1

    def __post_init__(self) -> None:
        self._uniforms = Uniforms(self.request.sampling.seed)

    @property
    def position(self) -> int:
        """Where the last written token stands: the next step puts it there."""
        return len(self.prompt.tokens) + len(self.tokens) - 1

    def uniform(self) -> float:
        """The random number for the next token."""
        return 0.0 if self.request.sampling.temperature == 0 else self._uniforms.at(len(self.tokens))

    def accept(self, token: int, logprob: float, decode: Callable[[list[int]], str] | None) -> None:
        """Write a token.

        Raises:
            PrismError: If the model's logits were not finite.
        """
        if not logprob <= 0.0:
            raise PrismError(
                f"request {self.index}: the logits after {self.position + 1} tokens are not finite; the weights have "
                "diverged or overflow in this precision"
            )
        sampling = self.request.sampling
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.finished = token in sampling.stop_ids
        if sampling.stop_texts and decode is not None and not self.finished:
            # A character takes four tokens at most, one per byte; what came before these was looked at before.
            tail = decode(self.tokens[-4 * max(map(len, sampling.stop_texts)) - 4 :])
            self.finished = any(text in tail for text in sampling.stop_texts)
        self.done = self.finished or len(self.tokens) >= sampling.max_new_tokens

    def response(self) -> Response:
        """As it stands."""
        return Response(self.request.prompt, self.tokens, self.logprobs, self.finished)


@dataclass
class Lane:
    """Rows that advance together; a pipeline of n stages has n lanes, so that every stage has one to work at.

    Attributes:
        rows: How many there are.
        band: Rows that attend together: bands of rows with longer responses come first.
        caches: One per layer of this rank.
        capacity: Tokens per row.
        sequences: One per row in use, in order.
    """

    rows: int
    band: int
    caches: list[Cache]
    capacity: int
    sequences: list[Sequence] = field(default_factory=list)

    def compact(self) -> None:
        """Let finished responses go and close the gaps, with long responses kept before short ones."""
        kept = [s for s in self.sequences if not s.done]
        order = rearranged(kept, self.band)
        moved = [(s.row, row) for row, s in enumerate(order) if s.row != row]
        if moved:
            device = self.caches[0].device if self.caches else None
            sources, targets = torch.tensor(moved, device=device).T
            length = max(order[row].position for _, row in moved)
            for cache in self.caches:
                cache.move(sources, targets, length)
        for row, sequence in enumerate(order):
            sequence.row = row
        self.sequences = order

    def grow(self, capacity: int, most: int) -> None:
        """Room for `capacity` tokens per row, doubled up to `most` so that rows are seldom copied."""
        if capacity > self.capacity:
            self.capacity = min(most, max(capacity, 2 * self.capacity))
            for cache in self.caches:
                cache.grow(self.capacity)

    def place(self, new: list[Sequence]) -> None:
        """Give responses the rows behind those in use, with what was remembered of their prompts."""
        first = len(self.sequences)
        self.sequences += new
        while first < len(self.sequences):
            memories = self.sequences[first].prompt.memories
            if memories is None:
                raise RuntimeError("a response was given a row before its prompt was read")
            end = first
            while end < len(self.sequences) and self.sequences[end].prompt.memories is memories:
                self.sequences[end].row = end
                end += 1
            device = self.caches[0].device if self.caches else None
            sources = torch.tensor([s.prompt.place for s in self.sequences[first:end]], device=device)
            for cache, memory in zip(self.caches, memories, strict=True):
                cache.fill(memory, sources, first)
            first = end


def rearranged(kept: list[Sequence], band: int) -> list[Sequence]:
    """New rows for the responses that go on, such that few are moved and bands stay in order of length.

    Each band passes its longest response to the gap in the band before it: a gap costs one row copied per band, and
    attention, which reads as many columns as the longest row of a band has, reads little that it does not need.
    """
    count = len(kept)
    bands: list[list[Sequence]] = [[] for _ in range(-(-max((s.row + 1 for s in kept), default=0) // band))]
    for sequence in kept:
        bands[sequence.row // band].append(sequence)
    result: list[Sequence] = []
    for i, members in enumerate(bands):
        size = min(band, count - len(result))
        donors = (later for later in bands[i + 1 :])
        donor: list[Sequence] = []
        while len(members) < size:
            while not donor:
                donor = next(donors)
            longest = max(donor, key=lambda s: s.position)
            donor.remove(longest)
            members.append(longest)
        first = i * band
        places: dict[int, Sequence] = {s.row: s for s in members if first <= s.row < first + size}
        gaps = iter([row for row in range(first, first + size) if row not in places])
        for sequence in members:
            if not first <= sequence.row < first + size:
                places[next(gaps)] = sequence
        result += [places[row] for row in range(first, first + size)]
    return result
