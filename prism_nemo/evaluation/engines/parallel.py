"""A model on several ranks as what an evaluation asks: the work shared out over data-parallel ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeVar

from megatron.core import parallel_state

from prism_nemo.data.tokenizer import Tokenizer
from prism_nemo.errors import InputError
from prism_nemo.evaluation.engines.continuations import likelihood, rows_of
from prism_nemo.evaluation.engines.contract import Continuation, Likelihood
from prism_nemo.generation.prefix_tree import shares, sortable
from prism_nemo.generation.requests import Request, Response, check_request
from prism_nemo.generation.score import Row, Scored
from prism_nemo.models.family import Architecture
from prism_nemo.runtime import gather

T = TypeVar("T")


def check_model(architecture: Architecture, tokenizer: Tokenizer, max_length: int | None) -> int:
    """Refuse a tokenizer or a length that is not the model's.

    Args:
        architecture: Of the model.
        tokenizer: That it is to be asked with.
        max_length: Most tokens that are to be read, or None for the model's own maximum.

    Returns:
        Most tokens that are read.

    Raises:
        InputError: If the model cannot read that many, or lacks tokens.
    """
    most = architecture.max_position_embeddings
    if max_length is not None and not 1 <= max_length <= most:
        raise InputError(f"max_length: {max_length} is not from 1 to the model's {most}")
    if tokenizer.vocab_size > architecture.vocab_size:
        raise InputError(
            f"{tokenizer.path}: has {tokenizer.vocab_size} tokens, but the model has {architecture.vocab_size}; it is "
            "not this model's tokenizer"
        )
    return max_length or most


class ParallelModel(ABC):
    """See `prism_nemo.evaluation.engines.contract.EvaluationModel`.

    Data-parallel ranks share the work: each gets the requests of other prompts, and a stretch of the continuations in
    the order of their tokens, so that what these begin with alike is mostly read by one rank. What a rank found is
    gathered on all of them.

    Args:
        architecture: Of the model.
        tokenizer: Of the checkpoint.
        max_length: Most tokens that are read; the model's own maximum if not given.

    Raises:
        InputError: See `check_model`.
    """

    engine: str

    def __init__(self, architecture: Architecture, tokenizer: Tokenizer, max_length: int | None) -> None:
        self.tokenizer, self.vocab_size = tokenizer, architecture.vocab_size
        self.max_length = check_model(architecture, tokenizer, max_length)

    @abstractmethod
    def _generate(self, requests: list[Request]) -> list[Response]:
        """Answer what this data-parallel rank was given."""

    @abstractmethod
    def _score(self, rows: list[Row]) -> list[Scored]:
        """Score what this data-parallel rank was given."""

    def generate(self, requests: Sequence[Request]) -> list[Response]:
        """See `EvaluationModel.generate`; what is answered does not depend on the number of ranks.

        Raises:
            InputError: For a request that the model cannot serve, before any is served.
            PrismError: If logits are not finite.
        """
        for number, request in enumerate(requests):
            check_request(number, request, self.max_length, self.vocab_size)
        prompts: dict[tuple[int, ...], list[int]] = {}
        for index, request in enumerate(requests):
            prompts.setdefault(tuple(request.prompt), []).append(index)
        size = parallel_state.get_data_parallel_world_size()
        dealt = [[i for own in list(prompts.values())[rank::size] for i in own] for rank in range(size)]
        mine = dealt[parallel_state.get_data_parallel_rank()]
        return _together(dealt, self._generate([requests[i] for i in mine]))

    def score(self, continuations: Sequence[Continuation]) -> list[Likelihood]:
        """See `EvaluationModel.score`; cut as `prism_nemo.evaluation.engines.continuations.rows_of` says.

        Raises:
            InputError: For a continuation that the model cannot score, before any is scored.
            PrismError: If log-probabilities are not finite.
        """
        rows = rows_of(continuations, self.max_length, self.vocab_size)
        size = parallel_state.get_data_parallel_world_size()
        dealt = shares([sortable(row.tokens) for row in rows], size) if size > 1 else [list(range(len(rows)))]
        mine = dealt[parallel_state.get_data_parallel_rank()]
        return _together(dealt, [likelihood(scored) for scored in self._score([rows[i] for i in mine])])


def _together(dealt: list[list[int]], own: list[T]) -> list[T]:
    """What all data-parallel ranks found, in the order that was asked for.

    Args:
        dealt: For each of them, the places of what it found.
        own: What this one found.
    """
    placed: dict[int, T] = {}
    for mine, found in zip(dealt, gather(own), strict=True):
        placed.update(zip(mine, found, strict=True))
    return [placed[i] for i in range(len(placed))]
