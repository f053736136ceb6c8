"""Rollouts with vLLM: the same requests and responses as `prism_nemo.generation.engine`, its kernels, its own weights.

One vLLM engine runs in every process of the stage (its "external launcher"): the ranks of a model-parallel group are
the tensor-parallel ranks of one vLLM model, which has a copy of the weights in its own layout. `VLLMEngine.refit`
brings that copy up to date after every update. A copy that was not updated samples fluent text from an old policy and
nothing shows it, so each step of a refit is checked; see `VLLMEngine.refit`.

vLLM is imported when an engine is made, and never before: it is optional, and takes seconds. Tested with a stand-in
that can be broken, and with vLLM itself on the CPU (tests/generation/vllm_published.py); not yet run on a GPU.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from prism_nemo.checkpoint.exporting import hf_config
from prism_nemo.checkpoint.gathered import gathered_hf_tensors
from prism_nemo.config import ParallelConfig
from prism_nemo.errors import InputError, PrismError
from prism_nemo.generation.requests import Request, Response, check_request
from prism_nemo.models.decoder import LanguageModel
from prism_nemo.models.family import Architecture
from prism_nemo.runtime.cuda import capability
from prism_nemo.runtime.detect import VLLM, is_present
from prism_nemo.training.guards import bit_sum

# Seeds go to torch's generators, which take 63 bits without a sign.
_SEEDS = 2**63 - 1


def check_vllm(architecture: Architecture, parallel: ParallelConfig, memory_share: float) -> None:
    """Refuse what vLLM cannot do here; called before processes start, imports nothing.

    Raises:
        InputError: Naming the key and what works.
    """
    native = "or choose rollout.backend=native, which needs nothing"
    if not is_present(VLLM):
        raise InputError(f"rollout.backend: vllm is not installed; pip install 'prism-nemo[vllm]', {native}")
    if capability() is None:
        raise InputError(f"rollout.backend: vllm needs a CUDA device and there is none; run on GPUs, {native}")
    if not 0 < memory_share < 1:
        raise InputError(
            f"rollout.vllm_memory_share: {memory_share} must be above 0 and below 1: the share of a GPU's memory that "
            "vLLM takes for the whole run"
        )
    tp, pp, dp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.data_parallel_size,
    )
    if pp > 1 and dp > 1:
        # vLLM takes consecutive ranks for one model; Megatron numbers the stages of a pipeline last, so that with data
        # parallelism the ranks of one model are not consecutive and would be given different prompts.
        raise InputError(
            f"rollout.backend: vllm cannot follow {parallel.describe()}: pipeline and data parallelism together deal "
            "the ranks of one model out over the machine; use parallel.pipeline_model_parallel_size=1 with any tensor "
            f"and data parallelism, parallel.data_parallel_size=1 with a pipeline, {native}"
        )
    works = [n for n in range(1, architecture.num_attention_heads + 1) if _fits(architecture, n)]
    if tp * pp not in works:
        raise InputError(
            f"rollout.backend: vllm would cut the model into {tp * pp} parts (tensor times pipeline parallelism), "
            f"which its {architecture.num_attention_heads} attention heads and {architecture.num_query_groups} "
            f"key/value heads do not allow; these do: {works}; choose sizes with such a product, {native}"
        )


def _fits(a: Architecture, size: int) -> bool:
    """Whether vLLM can cut the model into tensor-parallel parts; it repeats key/value heads and a single group."""
    heads, groups = a.num_attention_heads, a.num_query_groups
    dense = heads % size == 0 and (groups % size == 0 or size % groups == 0) and a.ffn_hidden_size % size == 0
    mamba = a.mamba
    return dense and (mamba is None or (mamba.heads % size == 0 and (mamba.groups % size == 0 or mamba.groups == 1)))


class VLLMEngine:
    """Samples responses from vLLM's copy of a Megatron model; `refit` it before the first use and after each update.

    Every rank of the model-parallel group makes one, with the same arguments.

    Args:
        model: This rank's part of the trainer's model.
        folder: Where the Hugging Face configuration is written that vLLM reads; the same on all ranks. It gets no
            weights: they come by `refit`. Until then vLLM's are random, so that one which does not work cannot pass
            for the starting model.
        dtype: Of weights and activations.
        max_length: Most tokens of a prompt with its response.
        memory_share: Share of the GPU's memory that vLLM takes, weights and caches, until the process ends.

    Raises:
        InputError: If vLLM cannot be imported.
    """

    def __init__(
        self, model: LanguageModel, folder: Path, dtype: torch.dtype, max_length: int, memory_share: float
    ) -> None:
        self.architecture, self.dtype, self.max_length = model.architecture, dtype, max_length
        self._group = parallel_state.get_model_parallel_group()
        self._device = next(model.parameters()).device
        # Engines must live in this process: the weights are handed over in its memory.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        for name in ("RANK", "LOCAL_RANK"):  # torchrun sets them; vLLM asks for them also where there is one process
            os.environ.setdefault(name, "0")
        try:
            import vllm
        except Exception as error:  # a build for another torch raises OSError, among others
            raise InputError(
                f"rollout.backend: vllm is installed but cannot be imported ({type(error).__name__}: {error}); install "
                "the build that fits this torch, or choose rollout.backend=native"
            ) from error
        self._sampling_params = vllm.SamplingParams
        _write_config(folder, self.architecture, dtype)
        options: dict[str, Any] = {}
        if self.architecture.mamba is not None:
            options["mamba_ssm_cache_dtype"] = "float32"  # as in training; bf16 states drift over a response
        torch.cuda.empty_cache()  # what the trainer's allocator holds without use counts as taken
        with _random_state_kept():
            self._llm = vllm.LLM(
                model=str(folder),
                dtype=str(dtype).removeprefix("torch."),
                load_format="dummy",
                skip_tokenizer_init=True,
                generation_config="vllm",  # not the model's own temperature and top_p
                tensor_parallel_size=self._group.size(),
                distributed_executor_backend="external_launcher",
                max_model_len=max_length,
                gpu_memory_utilization=memory_share,
                logprobs_mode="raw_logprobs",  # before temperature and nucleus: what the trainer sees
                seed=0,
                **options,
            )
        self._sent: dict[str, int] = {}
        self._held = self._fingerprint()
        self._fresh = False

    def generate(self, requests: list[Request]) -> list[Response]:
        """Sample a response to each request; every rank of the model-parallel group calls this with the same ones.

        Returns:
            In the order of the requests, the same on every rank.

        Raises:
            InputError: For a request that the model or vLLM cannot serve.
            PrismError: If there was no refit before, or vLLM does not answer what it was asked.
        """
        if not requests:
            return []
        for number, request in enumerate(requests):
            check_request(number, request, self.max_length, self.architecture.vocab_size)
            if request.sampling.stop_texts:
                raise InputError(f"request {number}: stop_texts: only the native engine has them; use stop_ids")
        if not self._fresh:
            raise PrismError("vLLM's weights are random until the first refit; call refit before generate")
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(request.prompt)} for request in requests],
            [self._params(request) for request in requests],
            use_tqdm=False,
        )
        if len(outputs) != len(requests):
            raise PrismError(f"vLLM gave {len(outputs)} responses to {len(requests)} requests")
        found = [_response(i, r, output) for i, (r, output) in enumerate(zip(requests, outputs, strict=True))]
        return self._agreed(found)

    def _params(self, request: Request) -> Any:
        sampling = request.sampling
        return self._sampling_params(
            n=1,
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or -1,
            seed=sampling.seed % _SEEDS,
            stop_token_ids=list(sampling.stop_ids),
            ignore_eos=True,  # end at the request's stop_ids and at nothing else that a configuration names
            logprobs=0,  # of the sampled token only
            detokenize=False,
            skip_special_tokens=False,
        )

    def _agreed(self, found: list[Response]) -> list[Response]:
        """The first rank's log-probabilities, after making sure that all ranks sampled the same tokens.

        Each rank's engine draws for itself, from equal logits and seeds. Ranks that part would train on different
        responses.
        """
        if self._group.size() == 1:
            return found
        everyone: list[Any] = [None] * self._group.size()
        dist.all_gather_object(everyone, [response.tokens for response in found], group=self._group)
        if any(tokens != everyone[0] for tokens in everyone):
            raise PrismError(
                "vLLM's ranks sampled different tokens from one model; the rollouts cannot be used. Set "
                "rollout.backend=native, or parallel sizes with which one rank holds the model"
            )
        logprobs = torch.tensor([x for r in found for x in r.logprobs], dtype=torch.float64, device=self._device)
        dist.broadcast(logprobs, group=self._group, group_src=0)
        left = iter(logprobs.tolist())
        for response in found:
            response.logprobs = [next(left) for _ in response.tokens]
        return found

    @torch.no_grad()
    def refit(self, model: LanguageModel) -> None:
        """Copy the trainer's weights into vLLM's model; every rank of the model-parallel group calls this.

        Tensors go straight to the model's own ``load_weights``. vLLM's ``reload_weights`` is not used: it may load what
        it kept from before (vllm-project/vllm issue 32718). Afterwards

        - the model must have taken every tensor, and every parameter of it must have been loaded;
        - where the trainer's weights of a layer changed, bits of vLLM's weights of that layer must have changed;
        - the cache of prompts is emptied: it holds keys and values of the old weights.

        Args:
            model: This rank's part of the trainer's model, as it is now.

        Raises:
            PrismError: If any of this did not happen.
        """
        sent: dict[str, torch.Tensor] = {}
        given = 0

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal given
            for name, tensor in gathered_hf_tensors(model):
                part = _part(name)
                # In vLLM's type: what its rounding loses is no change.
                bits = bit_sum(tensor.to(self.dtype))
                sent[part] = sent[part] + bits if part in sent else bits
                given += 1
                yield name, tensor

        def load(vllm_model: Any) -> tuple[set[str], int]:
            stream = tensors()
            loaded = vllm_model.load_weights(stream)
            taken = given
            for _ in stream:  # to the end in any case: the other ranks take part in every tensor
                pass
            names = {name for name, _ in vllm_model.named_parameters()}
            return names - set(loaded or ()), given - taken

        missed, left = self._llm.apply_model(load)[0]
        now, held = {part: int(bits) for part, bits in sent.items()}, self._fingerprint()
        changed = {part for part, bits in held.items() if bits != self._held.get(part)}
        everyone: list[Any] = [(missed, left, changed)] * self._group.size()
        if self._group.size() > 1:
            dist.all_gather_object(everyone, (missed, left, changed), group=self._group)
        missed = sorted({name for names, _, _ in everyone for name in names})
        if missed or any(left for _, left, _ in everyone):
            what = f"'{missed[0]}' and {len(missed) - 1} more were not loaded" if missed else "it stopped reading early"
            raise PrismError(f"vLLM did not take the trainer's weights: {what}; use rollout.backend=native")
        changed = {part for _, _, parts in everyone for part in parts}
        stale = sorted(part for part, bits in now.items() if bits != self._sent.get(part) and part not in changed)
        if stale:
            raise PrismError(
                f"vLLM's weights are stale: the trainer's changed and vLLM's did not, in {', '.join(stale[:4])}; its "
                "rollouts would come from an old policy. Use rollout.backend=native, or another version of vLLM"
            )
        if self._llm.reset_prefix_cache() is False:
            raise PrismError("vLLM kept its cache of prompts, which is of the old weights; use rollout.backend=native")
        self._sent, self._held, self._fresh = now, held, True

    def _fingerprint(self) -> dict[str, int]:
        """By part of the model, the sum of the bits of this rank's share of vLLM's weights."""

        def look(vllm_model: Any) -> dict[str, int]:
            sums: dict[str, torch.Tensor] = {}
            for name, parameter in vllm_model.named_parameters():
                part, bits = _part(name), bit_sum(parameter)
                sums[part] = sums[part] + bits if part in sums else bits
            return {part: int(bits) for part, bits in sums.items()}

        found: dict[str, int] = self._llm.apply_model(look)[0]
        return found


def _part(name: str) -> str:
    """Part of the model that a parameter belongs to, by either side's name: prefixes and fused names differ."""
    layer = re.search(r"\blayers\.(\d+)\.", name)
    return f"layer {layer[1]}" if layer else "embedding, final norm and output layer"


def _response(number: int, request: Request, output: Any) -> Response:
    """vLLM's answer to a request.

    Raises:
        PrismError: If it is not one.
    """
    written = output.outputs[0]
    tokens = [int(token) for token in written.token_ids]
    if list(output.prompt_token_ids) != list(request.prompt):
        raise PrismError(f"vLLM answered request {number} out of order; use rollout.backend=native")
    entries = written.logprobs or []
    if not tokens or len(entries) != len(tokens) or written.finish_reason not in ("stop", "length"):
        raise PrismError(
            f"vLLM's response to request {number} has {len(tokens)} tokens, {len(entries)} log-probabilities and ended "
            f"by '{written.finish_reason}'; expected as many of each, and an end by 'stop' or 'length'"
        )
    logprobs = [float(entry[token].logprob) for entry, token in zip(entries, tokens, strict=True)]
    if not all(-math.inf < x <= 0.0 for x in logprobs):
        raise PrismError(
            f"request {number}: vLLM's log-probabilities are not finite; the weights have diverged or overflow in this "
            "precision"
        )
    return Response(list(request.prompt), tokens, logprobs, tokens[-1] in request.sampling.stop_ids)


def _write_config(folder: Path, architecture: Architecture, dtype: torch.dtype) -> None:
    """``config.json`` as an export has it."""
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(hf_config(architecture, {dtype: 1}), indent=2) + "\n")
    dist.barrier()


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """vLLM seeds the generators of the process that it starts in; the trainer's must go on from where they stood."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    plain, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        yield
    random.setstate(plain)
    np.random.set_state(numbers)
