"""What prism_nemo.generation.vllm uses of vLLM, on transformers and CPU: the calls, not the speed.

Weights are random until they are loaded, the process's generators are seeded, prompts are cached until that is reset:
vLLM does all of these, and each is a trap. `faults` breaks one thing at a time. Arguments are keywords by name, so that
one that vLLM does not have is an error here too.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig
from transformers.models.auto import AutoModelForCausalLM

faults: set[str] = set()


@dataclass
class SamplingParams:
    """The fields that are asked for."""

    n: int = 1
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True


@dataclass
class Logprob:
    logprob: float


@dataclass
class CompletionOutput:
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


class Model(torch.nn.Module):
    """A transformers model with vLLM's `load_weights`."""

    def __init__(self, folder: str, dtype: str) -> None:
        super().__init__()
        config = AutoConfig.from_pretrained(folder)
        self.inner = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation="eager"
        ).eval()
        self.loads = 0
        for module in self.modules():
            if hasattr(module, "time_step_limit"):
                module.time_step_limit = (0.0, float("inf"))  # vLLM has no floor

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return self.inner.named_parameters(*args, **kwargs)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Copies what it is given and returns the names."""
        self.loads += 1
        own, loaded = dict(self.named_parameters()), set()
        for name, tensor in weights:
            if "stops early" in faults and name.startswith("model.layers.1."):
                break
            stale = "stale" in faults or ("one stale layer" in faults and name.startswith("model.layers.1."))
            if not (stale and self.loads > 1):
                own[name].copy_(tensor)
            loaded.add(name)
        return loaded - {"model.norm.weight"} if "skips a tensor" in faults else loaded


class LLM:
    """Offline inference in this process."""

    def __init__(
        self,
        *,
        model: str,
        dtype: str,
        load_format: str,
        skip_tokenizer_init: bool,
        generation_config: str,
        tensor_parallel_size: int,
        distributed_executor_backend: str,
        max_model_len: int,
        gpu_memory_utilization: float,
        logprobs_mode: str,
        seed: int,
        mamba_ssm_cache_dtype: str = "auto",
    ) -> None:
        self.options = {k: v for k, v in locals().items() if k != "self"}
        if load_format != "dummy" or distributed_executor_backend != "external_launcher":
            raise ValueError("the stand-in has only dummy weights and the external launcher")
        if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0" or "LOCAL_RANK" not in os.environ:
            raise AssertionError("the external launcher runs in this process and reads torchrun's variables")
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        self.model = Model(model, dtype)
        self.old: Model | None = None
        self.cached: dict[tuple[int, ...], torch.Tensor] = {}
        self.asked: list[SamplingParams] = []

    def apply_model(self, function: Callable[[torch.nn.Module], Any]) -> list[Any]:
        """One result for each worker, which is one."""
        return [function(self.model)]

    def reset_prefix_cache(self) -> bool:
        """Forgets prompts."""
        if "keeps its cache" in faults:
            return False
        if "forgets to reset" not in faults:
            self.cached.clear()
        return True

    @torch.no_grad()
    def generate(
        self, prompts: list[dict[str, list[int]]], sampling_params: list[SamplingParams], *, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        """One response to each prompt."""
        if "old graph" in faults and self.old is None:  # computes on from the first weights, whatever is loaded later
            self.old = deepcopy(self.model)
        self.asked = list(sampling_params)
        asked = list(zip(prompts, sampling_params, strict=True))
        outputs = [self._write(p["prompt_token_ids"], s) for p, s in asked]
        return outputs[::-1] if "out of order" in faults else outputs

    def _write(self, prompt: list[int], sampling: SamplingParams) -> RequestOutput:
        seed = sampling.seed or 0
        if "ranks part" in faults:
            seed += int(os.environ["RANK"])
        draw = torch.Generator().manual_seed(seed)
        tokens: list[int] = []
        entries: list[dict[int, Logprob]] = []
        while len(tokens) < sampling.max_tokens:
            logits = self._logits(prompt, tokens)
            raw = torch.log_softmax(logits, -1)
            if sampling.temperature == 0:
                token = int(logits.argmax())
            else:
                token = int(torch.multinomial(torch.softmax(logits / sampling.temperature, -1), 1, generator=draw))
            tokens.append(token)
            entries.append({token: Logprob(float("nan") if "not finite" in faults else raw[token].item())})
            if token in sampling.stop_token_ids:
                return _output(prompt, tokens, entries, "stop")
        return _output(prompt, tokens, entries, "length")

    def _logits(self, prompt: list[int], tokens: list[int]) -> torch.Tensor:
        if not tokens and tuple(prompt) in self.cached:
            return self.cached[tuple(prompt)]
        model = self.old or self.model
        logits = model.inner(torch.tensor([prompt + tokens])).logits[0, -1].double()
        if not tokens:
            self.cached[tuple(prompt)] = logits
        return logits


def _output(prompt: list[int], tokens: list[int], entries: list[dict[int, Logprob]], reason: str) -> RequestOutput:
    if "no log-probabilities" in faults:
        return RequestOutput(prompt, [CompletionOutput(tokens, None, reason)])
    return RequestOutput(prompt, [CompletionOutput(tokens, entries, reason)])
