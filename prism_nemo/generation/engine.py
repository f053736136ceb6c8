"""Continuous batching over the trainer's own weights.

A response that ends leaves its row of the caches at once and the next waiting one takes it. A prompt that several
requests share is read once; prompts are read some ahead of need and several at a time. Every rank of a model-parallel
group calls `Engine.generate` with the same requests and makes the same decisions from the same tokens, which one rank
draws and sends to all: ranks cannot part, whatever their rounding.

With a pipeline there are as many lanes of rows as stages, and the tokens of a lane are waited for only when its turn
comes again: meanwhile the stages work at the other lanes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from prism_nemo.errors import InputError
from prism_nemo.generation.choose import choose
from prism_nemo.generation.decode import Decoder
from prism_nemo.generation.requests import Request, Response, check_request
from prism_nemo.generation.room import affordable
from prism_nemo.generation.rows import Lane, Prompt, Sequence
from prism_nemo.models.decoder import LanguageModel

# Columns that a row starts with beyond its prompt; doubled when a response outgrows them.
_FIRST_ROOM = 64
# Bands that a lane's rows are cut into where torch's kernels attend: each reads the columns of its longest response.
# More bands, smaller products.
_BANDS = 4
# A prompt is read together with others down to this share of the longest one's length.
_SIMILAR = 0.75


class Engine:
    """Samples responses from a Megatron model in place.

    Nothing is kept between calls of `generate`: the weights may change, and the memory of the caches is free for
    training.

    Args:
        model: This rank's part, in any tensor- and pipeline-parallel layout.
        slots: Responses that are written at a time.
        cache_tokens: Most tokens that the caches hold, over all slots; fewer slots are used where prompts and responses
            could be longer than their share. None for as many as fit in half of the memory that is free when `generate`
            is called.
        prefill_tokens: Prompts are read up to this many tokens at a time.
        decode: Text of token ids, for requests with `stop_texts`.
    """

    def __init__(
        self,
        model: LanguageModel,
        slots: int = 256,
        cache_tokens: int | None = None,
        prefill_tokens: int = 1024,
        decode: Callable[[list[int]], str] | None = None,
    ) -> None:
        if slots < 1:
            raise InputError(f"slots: {slots} is less than 1")
        self.model, self.slots, self.cache_tokens = model, slots, cache_tokens
        self.prefill_tokens, self.decode = prefill_tokens, decode

    @torch.inference_mode()
    def generate(self, requests: list[Request]) -> list[Response]:
        """Sample a response to each request; every rank of the model-parallel group calls this with the same ones.

        Returns:
            In the order of the requests, the same on every rank.

        Raises:
            InputError: For a request that the model or its options cannot serve.
            PrismError: If logits are not finite.
        """
        if not requests:
            return []
        for number, request in enumerate(requests):
            self._check(number, request)
        return _Run(self, requests).responses()

    def _check(self, number: int, request: Request) -> None:
        a, sampling = self.model.architecture, request.sampling
        check_request(number, request, a.max_position_embeddings, a.vocab_size)
        prompt, new = len(request.prompt), sampling.max_new_tokens
        if self.cache_tokens is not None and prompt + new > self.cache_tokens:
            raise InputError(
                f"a prompt of {prompt} tokens and max_new_tokens {new} do not fit the cache of {self.cache_tokens} "
                "tokens; raise cache_tokens or lower max_new_tokens"
            )
        if sampling.stop_texts and self.decode is None:
            raise InputError(f"request {number}: stop_texts need an engine with `decode`")


class _Run:
    """One call of `generate`."""

    def __init__(self, engine: Engine, requests: list[Request]) -> None:
        self.decoder, self.decode, self.prefill_tokens = Decoder(engine.model), engine.decode, engine.prefill_tokens
        shared: dict[tuple[int, ...], Prompt] = {}
        self.sequences = []
        for index, request in enumerate(requests):
            prompt = shared.setdefault(tuple(request.prompt), Prompt(request.prompt))
            prompt.waiting += 1
            self.sequences.append(Sequence(index, request, prompt))
        # Prompts of similar length come together, the longest first; requests of one prompt follow each other.
        prompts = sorted(shared.values(), key=lambda p: -len(p.tokens))
        rank = {id(prompt): i for i, prompt in enumerate(prompts)}
        self.unread = deque(prompts)
        self.waiting = deque(sorted(self.sequences, key=lambda s: rank[id(s.prompt)]))
        self.most = max(len(r.prompt) + r.sampling.max_new_tokens for r in requests)
        group = parallel_state.get_model_parallel_group()
        self.group = group if group.size() > 1 else None
        self.lanes = self._lanes(engine, len(prompts[0].tokens))
        # Ranks count tensor-parallel ranks first, then stages: the first rank of the last stage draws the tokens.
        self.drawing = group.size() - parallel_state.get_tensor_model_parallel_world_size()
        # By lane, what its last turn gave, and the messages to wait for before it is read.
        self.drawn: dict[int, tuple[torch.Tensor, list[Any]]] = {}

    def _lanes(self, engine: Engine, longest_prompt: int) -> list[Lane]:
        if engine.cache_tokens is None:
            room = affordable(self.decoder, self.most, self.group)
        else:
            room = engine.cache_tokens // self.most
        slots = min(engine.slots, room, len(self.sequences))
        count = min(slots, parallel_state.get_pipeline_model_parallel_world_size())
        rows = slots // count
        a = engine.model.architecture
        banded = not self.decoder.packed and (not a.layer_pattern or "*" in a.layer_pattern)
        band = max(8, -(-rows // _BANDS)) if banded else rows
        # Memory that a packed cache does not touch is not taken, so that its rows need not be copied to grow.
        capacity = self.most if self.decoder.packed else min(self.most, longest_prompt + _FIRST_ROOM)
        return [Lane(rows, band, self.decoder.caches(rows, capacity), capacity) for _ in range(count)]

    def responses(self) -> list[Response]:
        """Advance the lanes in turn until all responses are written."""
        while self.waiting or any(lane.sequences for lane in self.lanes):
            for number, lane in enumerate(self.lanes):
                self._collect(number, lane)
                self._advance(number, lane)
        return [sequence.response() for sequence in self.sequences]

    def _collect(self, number: int, lane: Lane) -> None:
        """Take in the tokens that the lane's last turn gave."""
        if number not in self.drawn:
            return
        drawn, messages = self.drawn.pop(number)
        for message in messages:
            message.wait()
        tokens, logprobs = drawn.tolist()
        for sequence, token, logprob in zip(lane.sequences, tokens, logprobs, strict=True):
            sequence.accept(int(token), logprob, self.decode)

    def _advance(self, number: int, lane: Lane) -> None:
        """One more token for every response in the lane, after ended ones have made room for waiting ones."""
        lane.compact()
        going = list(lane.sequences)
        new = self._admit(lane.rows - len(going))
        if not going and not new:
            return
        longest = max([s.position for s in going] + [len(s.prompt.tokens) for s in new])
        lane.grow(longest + 1, self.most)
        lane.place(new)
        parts: list[torch.Tensor | None] = []
        if going:
            tokens, positions = [s.tokens[-1] for s in going], [s.position for s in going]
            parts.append(self.decoder.step(tokens, positions, lane.caches, lane.band))
        for sequence in new:
            logits = sequence.prompt.logits
            parts.append(None if logits is None else logits[sequence.prompt.place].unsqueeze(0))
            sequence.prompt.waiting -= 1
            if sequence.prompt.waiting == 0:
                sequence.prompt.memories = sequence.prompt.logits = None
        drawn, messages = self._draw(lane.sequences, [part for part in parts if part is not None])
        self.drawn[number] = drawn, messages + self.decoder.take_sent()

    def _admit(self, free: int) -> list[Sequence]:
        """The next waiting responses, their prompts read."""
        new: list[Sequence] = []
        while self.waiting and len(new) < free:
            sequence = self.waiting.popleft()
            if sequence.prompt.memories is None:
                self._read()
            new.append(sequence)
        return new

    def _read(self) -> None:
        """Read the next prompts, as many as fit one pass."""
        together = [self.unread.popleft()]
        width = len(together[0].tokens)
        while self.unread and len(self.unread[0].tokens) >= _SIMILAR * width:
            if (len(together) + 1) * width > self.prefill_tokens:
                break
            together.append(self.unread.popleft())
        logits, memories = self.decoder.prefill([prompt.tokens for prompt in together])
        for place, prompt in enumerate(together):
            prompt.memories, prompt.logits, prompt.place = memories, logits, place

    def _draw(self, sequences: list[Sequence], logits: list[torch.Tensor]) -> tuple[torch.Tensor, list[Any]]:
        """Tokens and log-probabilities [2, n] in fp64, drawn on one rank and on their way to all."""
        if self.decoder.has_logits:
            sampling = [s.request.sampling for s in sequences]
            together = logits[0] if len(logits) == 1 else torch.cat(logits)
            tokens, logprobs = choose(together, sampling, [s.uniform() for s in sequences])
            drawn = torch.stack((tokens.double(), logprobs))
        else:
            drawn = self.decoder.like.new_empty(2, len(sequences), dtype=torch.float64)
        if self.group is None:
            return drawn, []
        return drawn, [dist.broadcast(drawn, group=self.group, group_src=self.drawing, async_op=True)]
