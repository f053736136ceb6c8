"""vLLM as what an evaluation asks, through the backend of rollouts: weights come from the Megatron model.

Tested with a stand-in and with vLLM itself on the CPU; not yet run on a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from prism_nemo.config import ParallelConfig
from prism_nemo.data.tokenizer import Tokenizer
from prism_nemo.errors import InputError, PrismError
from prism_nemo.evaluation.engines.parallel import ParallelModel
from prism_nemo.generation.requests import Request, Response
from prism_nemo.generation.rows import Prompt, Sequence
from prism_nemo.generation.score import Row, Scored
from prism_nemo.generation.vllm import VLLMEngine, check_vllm
from prism_nemo.models.decoder import LanguageModel
from prism_nemo.models.family import Architecture
from prism_nemo.runtime.cuda import capability
from prism_nemo.runtime.detect import VLLM, is_present

# vLLM scores the tokens of a prompt, and writes one token more: a row has one that the model does not read.
_BEYOND = 2
DEFAULT_SHARE = 0.5


def longest_of(architecture: Architecture, max_length: int | None) -> int:
    """Most tokens that are read: as asked, or as many as vLLM can score with this model.

    Raises:
        InputError: If it cannot score that many.
    """
    most = architecture.max_position_embeddings - _BEYOND
    if max_length is not None and max_length > most:
        raise InputError(f"max_length: {max_length} is more than the {most} tokens that vLLM can score with this model")
    return max_length or most


def check_engine(
    architecture: Architecture, parallel: ParallelConfig, memory_share: float, max_length: int | None
) -> None:
    """Refuse what vLLM cannot do here; called before processes start, imports nothing.

    Raises:
        InputError: Naming what is missing and what works.
    """
    native = "or choose engine=megatron, which needs nothing"
    if not is_present(VLLM):
        raise InputError(f"engine: vllm is not installed; pip install 'prism-nemo[vllm]', {native}")
    if capability() is None:
        raise InputError(f"engine: vllm needs a CUDA device and there is none; run on GPUs, {native}")
    check_vllm(architecture, parallel, memory_share)
    longest_of(architecture, max_length)


class VLLMModel(ParallelModel):
    """See `prism_nemo.evaluation.engines.parallel.ParallelModel`.

    Prompts that begin alike share vLLM's own cache when it writes; what it scores it reads whole.

    Args:
        model: This rank's part of the weights; not needed afterwards.
        tokenizer: Of the checkpoint.
        folder: Where vLLM's configuration is written; the same on all ranks.
        dtype: Of weights and activations.
        memory_share: Share of the GPU's memory that vLLM takes.
        max_length: Most tokens that are read; two fewer than the model's own maximum if not given.

    Raises:
        InputError: If the model cannot read that many tokens, the tokenizer has tokens that it lacks, or vLLM cannot be
            imported.
        PrismError: If vLLM does not take the weights.
    """

    engine = "vllm"

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        folder: Path,
        dtype: torch.dtype,
        memory_share: float = DEFAULT_SHARE,
        max_length: int | None = None,
    ) -> None:
        super().__init__(model.architecture, tokenizer, longest_of(model.architecture, max_length))
        self._engine = _Engine(model, folder, dtype, self.max_length + _BEYOND, memory_share)
        self._engine.refit(model)

    def _generate(self, requests: list[Request]) -> list[Response]:
        """vLLM has no text to look for stop texts in, so that responses are written on, and cut here."""
        plain = [replace(request, sampling=replace(request.sampling, stop_texts=())) for request in requests]
        found = []
        for i, (request, response) in enumerate(zip(requests, self._engine.generate(plain), strict=True)):
            sequence = Sequence(i, request, Prompt(request.prompt))
            for token, logprob in zip(response.tokens, response.logprobs, strict=True):
                if not sequence.done:
                    sequence.accept(token, logprob, self.tokenizer.decode)
            found.append(sequence.response())
        return found

    def _score(self, rows: list[Row]) -> list[Scored]:
        return self._engine.score(rows)


class _Engine(VLLMEngine):
    """The rollout engine, which here also scores."""

    def score(self, rows: list[Row]) -> list[Scored]:
        """What the model says to each row; every rank of the model-parallel group calls this with the same ones.

        Raises:
            PrismError: If vLLM does not answer what it was asked.
        """
        if not rows:
            return []
        params = self._sampling_params(
            n=1, max_tokens=1, temperature=0.0, ignore_eos=True, prompt_logprobs=0, detokenize=False
        )
        prompts = [{"prompt_token_ids": list(row.tokens)} for row in rows]
        outputs = self._llm.generate(prompts, [params] * len(rows), use_tqdm=False)
        if len(outputs) != len(rows):
            raise PrismError(f"vLLM gave {len(outputs)} answers to {len(rows)} rows")
        found = [[_scored(i, r, output) for i, (r, output) in enumerate(zip(rows, outputs, strict=True))]]
        if self._group.size() > 1:
            # Ranks round differently; the first one's numbers are everyone's.
            dist.broadcast_object_list(found, group=self._group, group_src=0)
        return found[0]


def _scored(number: int, row: Row, output: Any) -> Scored:
    """vLLM's answer to a row.

    Raises:
        PrismError: If it is not one.
    """
    tokens, entries = list(row.tokens), output.prompt_logprobs or []
    if list(output.prompt_token_ids) != tokens or len(entries) != len(tokens):
        raise PrismError(f"vLLM's answer to row {number} is not to its {len(tokens)} tokens; use engine=megatron")
    try:
        asked = [entry[token] for entry, token in zip(entries[row.first :], tokens[row.first :], strict=True)]
        logprobs = [float(entry.logprob) for entry in asked]
        greedy = all(int(entry.rank) == 1 for entry in asked)
    except (KeyError, TypeError, AttributeError) as error:
        raise PrismError(f"vLLM's answer to row {number} lacks log-probabilities; use engine=megatron") from error
    if not all(-torch.inf < logprob <= 0.0 for logprob in logprobs):
        raise PrismError(
            f"row {number}: vLLM's log-probabilities are not finite; the weights have diverged or overflow in this "
            "precision"
        )
    return Scored(logprobs, greedy)
