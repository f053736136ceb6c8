"""A Hugging Face folder in transformers, as another implementation that scores must agree with.

It is plain on purpose: batches of whole rows, nothing shared between them, and transformers' own `generate` with its
own caches. It stands in one process, on one device.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from prism_nemo.checkpoint.verification import set_dt_limits
from prism_nemo.data.tokenizer import Tokenizer
from prism_nemo.errors import InputError, PrismError
from prism_nemo.evaluation.engines.continuations import likelihood, rows_of
from prism_nemo.evaluation.engines.contract import Continuation, Likelihood
from prism_nemo.evaluation.engines.parallel import check_model
from prism_nemo.generation import rows as written
from prism_nemo.generation.choose import choose
from prism_nemo.generation.requests import Request, Response, check_request
from prism_nemo.generation.score import Row, Scored
from prism_nemo.models.family import read_hf_config


class TransformersModel:
    """See `prism_nemo.evaluation.engines.contract.EvaluationModel`.

    Args:
        folder: Hugging Face folder.
        tokenizer: Of it.
        max_length: Most tokens that are read; the model's own maximum if not given.
        batch_size: Rows of a batch.
        dtype: fp32 on CPU and bf16 on GPU if not given.

    Raises:
        InputError: If the folder cannot be loaded, the model cannot read that many tokens, or the tokenizer has tokens
            that it lacks.
    """

    engine = "transformers"

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        max_length: int | None = None,
        batch_size: int = 16,
        dtype: torch.dtype | None = None,
    ) -> None:
        architecture = read_hf_config(folder)
        if batch_size < 1:
            raise InputError(f"batch_size: {batch_size} is less than 1")
        self.max_length = check_model(architecture, tokenizer, max_length)
        self.tokenizer, self.vocab_size, self.batch_size = tokenizer, architecture.vocab_size, batch_size
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # Seconds to import, and other engines do without.
        from transformers import AutoModelForCausalLM, GenerationConfig
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()  # it warns that its Mamba kernels are not installed
        try:
            model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32),
                attn_implementation="sdpa",
                local_files_only=True,
                use_safetensors=True,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(f"{folder}: transformers cannot load it: {error}") from error
        # Otherwise a hybrid's mixers would have a floor of the step size that training has not.
        set_dt_limits(model, architecture)
        self.model = cast(Any, model.to(self.device).eval())
        # What the folder says of end tokens, temperatures and penalties must not get into an evaluation.
        self.model.generation_config = GenerationConfig()

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request]) -> list[Response]:
        """See `EvaluationModel.generate`; drawn with the same random numbers as by the other engines.

        Raises:
            InputError: For a request that the model cannot serve, before any is served.
            PrismError: If logits are not finite.
        """
        for number, request in enumerate(requests):
            check_request(number, request, self.max_length, self.vocab_size)
        waiting = [written.Sequence(i, r, written.Prompt(r.prompt)) for i, r in enumerate(requests)]
        order = sorted(waiting, key=lambda s: (-len(s.prompt.tokens), -s.request.sampling.max_new_tokens))
        for first in range(0, len(order), self.batch_size):
            self._write(order[first : first + self.batch_size])
        return [sequence.response() for sequence in waiting]

    def _write(self, batch: list[written.Sequence]) -> None:
        """Write a batch of responses to their ends."""
        from transformers.generation import LogitsProcessorList, StoppingCriteriaList

        width = max(len(s.prompt.tokens) for s in batch)
        padding = [width - len(s.prompt.tokens) for s in batch]
        tokens = [[0] * gap + s.prompt.tokens for gap, s in zip(padding, batch, strict=True)]
        mask = [[0] * gap + [1] * (width - gap) for gap in padding]

        def draw(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            """Leave each row the one token that it takes."""
            going = [i for i, s in enumerate(batch) if not s.done]
            own = [batch[i] for i in going]
            logits = scores[going, : self.vocab_size].float()
            drawn, logprobs = choose(logits, [s.request.sampling for s in own], [s.uniform() for s in own])
            chosen = torch.zeros(len(batch), dtype=torch.long, device=scores.device)
            chosen[going] = drawn
            for sequence, token, logprob in zip(own, drawn.tolist(), logprobs.tolist(), strict=True):
                sequence.accept(token, logprob, self.tokenizer.decode)
            return torch.full_like(scores, -torch.inf).scatter_(-1, chosen.unsqueeze(-1), 0.0)

        def ended(*_: Any, **__: Any) -> torch.Tensor:
            return torch.tensor([s.done for s in batch], device=self.device)

        self.model.generate(
            torch.tensor(tokens, device=self.device),
            attention_mask=torch.tensor(mask, device=self.device),
            max_new_tokens=max(s.request.sampling.max_new_tokens for s in batch),
            do_sample=False,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([draw]),
            stopping_criteria=StoppingCriteriaList([ended]),
        )

    def score(self, continuations: Sequence[Continuation]) -> list[Likelihood]:
        """See `EvaluationModel.score`; rows of similar length together, each read whole.

        Raises:
            InputError: For a continuation that the model cannot score, before any is scored.
            PrismError: If log-probabilities are not finite.
        """
        rows = rows_of(continuations, self.max_length, self.vocab_size)
        found: dict[int, Likelihood] = {}
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i].tokens))
        for first in range(0, len(order), self.batch_size):
            batch = order[first : first + self.batch_size]
            found.update(zip(batch, map(likelihood, self._score([rows[i] for i in batch])), strict=True))
        return [found[i] for i in range(len(rows))]

    @torch.inference_mode()
    def _score(self, rows: list[Row]) -> list[Scored]:
        """Padding stands on the right, where causal layers do not look."""
        width = max(len(row.tokens) - 1 for row in rows)
        read = [[*row.tokens[:-1], *[0] * (width + 1 - len(row.tokens))] for row in rows]
        mask = [[1] * (len(row.tokens) - 1) + [0] * (width + 1 - len(row.tokens)) for row in rows]
        logits = self.model(
            input_ids=torch.tensor(read, device=self.device),
            attention_mask=torch.tensor(mask, device=self.device),
            use_cache=False,
        ).logits
        found = []
        for row, own in zip(rows, logits, strict=True):
            scores = own[row.first - 1 : len(row.tokens) - 1, : self.vocab_size].float().log_softmax(dim=-1)
            wanted = torch.tensor(row.tokens[row.first :], device=self.device)
            logprobs = scores.gather(-1, wanted.unsqueeze(-1)).squeeze(-1).double().tolist()
            if not all(-torch.inf < logprob <= 0.0 for logprob in logprobs):
                raise PrismError(
                    "the log-probabilities are not finite; the weights have diverged or overflow in this precision"
                )
            found.append(Scored(logprobs, bool((scores.argmax(-1) == wanted).all())))
        return found
