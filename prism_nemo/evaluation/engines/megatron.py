"""The Megatron model itself as what an evaluation asks: no export, in whatever layout it was loaded."""

from __future__ import annotations

from prism_nemo.data.tokenizer import Tokenizer
from prism_nemo.evaluation.engines.parallel import ParallelModel
from prism_nemo.generation.engine import Engine
from prism_nemo.generation.requests import Request, Response
from prism_nemo.generation.score import Row, Scored, score_rows
from prism_nemo.models.decoder import LanguageModel


class MegatronModel(ParallelModel):
    """See `prism_nemo.evaluation.engines.parallel.ParallelModel`.

    Nothing of the weights is kept between calls, so that a model in training can be asked.

    Args:
        model: This rank's part, in any layout.
        tokenizer: Of the checkpoint.
        max_length: Most tokens that are read; the model's own maximum if not given.
        slots: Responses that are written at a time.
        cache_tokens: Most tokens that the caches of generation hold; None for what fits.
        pass_tokens: Most tokens that are scored at a time; by default as many as suit the device.

    Raises:
        InputError: If the model cannot read that many tokens, or the tokenizer has tokens that it lacks.
    """

    engine = "megatron"

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        max_length: int | None = None,
        slots: int = 256,
        cache_tokens: int | None = None,
        pass_tokens: int | None = None,
    ) -> None:
        super().__init__(model.architecture, tokenizer, max_length)
        self.model = model
        self._engine = Engine(model, slots, cache_tokens, decode=tokenizer.decode)
        self._pass_tokens = pass_tokens

    def _generate(self, requests: list[Request]) -> list[Response]:
        return self._engine.generate(requests)

    def _score(self, rows: list[Row]) -> list[Scored]:
        return score_rows(self.model, rows, self._pass_tokens)
