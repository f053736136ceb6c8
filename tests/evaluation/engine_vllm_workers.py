"""What the tests of the vLLM engine run in processes of their own, with the stand-in for vLLM."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "stand_in"))

import engine_vllm_calls
import vllm
from engine_vllm_calls import Answers, answers

from prism_nemo.errors import PrismError
from prism_nemo.runtime import stop

scoring_faults: set[str] = set()


@dataclass
class SamplingParams(vllm.SamplingParams):
    """Also the field that scoring needs."""

    prompt_logprobs: int | None = None


@dataclass
class Logprob:
    """With its place among the likeliest, counted from 1."""

    logprob: float
    rank: int


class ScoringLLM(vllm.LLM):
    """The stand-in, which also gives the log-probabilities of prompts: None for a prompt's first token."""

    def generate(self, prompts: Any, sampling_params: Any, *, use_tqdm: bool = True) -> Any:
        longest = self.options["max_model_len"]
        if any(
            len(p["prompt_token_ids"]) + s.max_tokens > longest for p, s in zip(prompts, sampling_params, strict=True)
        ):
            raise ValueError(f"a prompt and its response have more than {longest} tokens")
        outputs = super().generate(prompts, sampling_params, use_tqdm=use_tqdm)
        for output, sampling in zip(outputs, sampling_params, strict=True):
            output.prompt_logprobs = None
            if sampling.prompt_logprobs is not None and "no prompt log-probabilities" not in scoring_faults:
                output.prompt_logprobs = self._of(output.prompt_token_ids)
        return outputs[1:] if "loses a row" in scoring_faults else outputs

    @torch.no_grad()
    def _of(self, tokens: list[int]) -> list[dict[int, Logprob] | None]:
        scores = self.model.inner(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
        entries: list[dict[int, Logprob] | None] = [None]
        for place, token in enumerate(tokens[1:]):
            own = float(scores[place, token])
            entries.append({token: Logprob(own, 1 + int((scores[place] > own).sum()))})
        return entries


def both(*args: Any) -> tuple[Answers, Answers, int]:
    """What vLLM and our engine answer; vLLM's longest length."""
    vllm.LLM, vllm.SamplingParams = ScoringLLM, SamplingParams  # type: ignore[misc]
    return engine_vllm_calls.both(*args)


def faulty(*args: Any) -> list[str]:
    """What is said with each fault."""
    vllm.LLM, vllm.SamplingParams = ScoringLLM, SamplingParams  # type: ignore[misc]
    engine, continuations = answers(*args)[2], args[4]
    said = []
    for fault in ("loses a row", "no prompt log-probabilities"):
        scoring_faults.add(fault)
        try:
            engine.score(continuations)
        except PrismError as error:
            said.append(str(error))
        scoring_faults.clear()
    stop()
    return said
