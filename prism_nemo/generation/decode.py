"""Decoding over the parameters of a Megatron model, without copies.

Megatron's own static engine reaches 0.6 to 0.8 times Hugging Face's speed on CPU and is deprecated; this reads the same
parameter tensors and computes the same function with preallocated caches. It must stay equal to the model's own forward
pass: tests compare every greedy token and every log-probability with a full forward, in every layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state

from prism_nemo.generation import cpu_kernels
from prism_nemo.generation.caches import Cache, Memory
from prism_nemo.generation.layers import MLP, Layer, layers_of
from prism_nemo.generation.products import Product
from prism_nemo.generation.spans import Prompts, Step, bands_of
from prism_nemo.models.decoder import LanguageModel
from prism_nemo.models.layers.rope import inverse_frequencies
from prism_nemo.models.names import actual_name


class _Message:
    """A tensor on its way to the next pipeline stage, which must not be freed or changed before it has arrived."""

    def __init__(self, tensor: torch.Tensor, stages: Any) -> None:
        self.tensor = tensor
        self._work = dist.isend(tensor, group=stages, group_dst=stages.rank() + 1)

    def wait(self) -> None:
        """Until it has been handed over."""
        if self._work is not None:  # None on ranks outside the group
            self._work.wait()


class Decoder:
    """Incremental forward of this rank's part of a model.

    Pipeline stages hand the residual stream on: every rank calls the same methods in the same order, and the logits are
    on the first tensor-parallel rank of the last stage.

    Args:
        model: This rank's part, in any tensor- and pipeline-parallel layout.

    Attributes:
        packed: Whether the kernels of `prism_nemo.generation.cpu_kernels` are used: then rows of any lengths attend
            together.
        observe: Called with a layer's name and the residual stream [..., h] after it; None to look at nothing.
    """

    def __init__(self, model: LanguageModel) -> None:
        a = self.architecture = model.architecture
        self._tp = parallel_state.get_tensor_model_parallel_group()
        self._pp = parallel_state.get_pipeline_model_parallel_group()
        self._tp_size = self._tp.size()
        self.first, self.last = self._pp.rank() == 0, self._pp.rank() == self._pp.size() - 1
        self.has_logits = self.last and self._tp.rank() == 0
        self.eps, self.vocab_size = a.norm_epsilon, a.vocab_size
        parameters = dict(model.named_parameters())
        self.like = next(iter(parameters.values()))
        self.packed = cpu_kernels.serves(self.like)
        self.embedding = parameters.get("embedding.word_embeddings.weight")
        self.layers: list[Layer] = []
        for i, layer in enumerate(model.decoder.layers):

            def get(name: str, prefix: str = f"decoder.layers.{i}.") -> torch.Tensor:
                return parameters[actual_name(prefix + name, parameters)]

            for part in layers_of(a, layer, get, self._tp_size):
                part.name = f"decoder.layers.{layer.layer_number - 1}"
                self.layers.append(part)
        final = "decoder.final_norm.weight" if a.layer_pattern else "decoder.final_layernorm.weight"
        self.final_norm = parameters.get(final)
        output = parameters.get("output_layer.weight", self.embedding)
        self.output = Product(output) if self.last and output is not None else None
        self.inv_freq = None
        if a.rope is not None:
            self.inv_freq = inverse_frequencies(a.rope, a.kv_channels).to(self.like.device)
        self._angles: tuple[torch.Tensor, torch.Tensor] | None = None
        self.observe: Callable[[str, torch.Tensor], None] | None = None
        self._sent: list[_Message] = []

    def caches(self, rows: int, capacity: int) -> list[Cache]:
        """Room for `rows` responses of up to `capacity` tokens in each of this rank's layers."""
        return [layer.cache(rows, capacity, self.like) for layer in self.layers]

    def _cos_sin(self, length: int) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        """Cosines and sines of positions 0..length-1, [at least length, 1, 1, d / 2]; kept between calls."""
        if self.inv_freq is None:
            return None, None
        if self._angles is None or len(self._angles[0]) < length:
            places = torch.arange(2 * length, device=self.like.device, dtype=torch.float32)
            angles = torch.outer(places, self.inv_freq)[:, None, None]
            self._angles = angles.cos().to(self.like.dtype), angles.sin().to(self.like.dtype)
        return self._angles

    def _reduce(self, x: torch.Tensor) -> torch.Tensor:
        if self._tp_size > 1:
            dist.all_reduce(x, group=self._tp)
        return x

    def _enter(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embed tokens of any shape, or receive the residual stream from the stage before."""
        if not self.first:
            x = self.like.new_empty(*tokens.shape, self.architecture.hidden_size)
            dist.recv(x, group=self._pp, group_src=self._pp.rank() - 1)
            return x
        if self.embedding is None:
            raise RuntimeError("the first stage has no embedding")
        if self._tp_size == 1:
            found = F.embedding(tokens, self.embedding)
        else:
            rows = self.embedding.shape[0]
            local = tokens - rows * self._tp.rank()
            mine = (local >= 0) & (local < rows)
            found = self._reduce(self.embedding[local.clamp(0, rows - 1)] * mine.unsqueeze(-1))
        scale = self.architecture.embedding_multiplier
        x = found if scale == 1.0 else found * scale
        if self.observe is not None:
            self.observe("embedding", x)
        return x

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if self.packed and x.is_contiguous():
            return cpu_kernels.normed(x, weight, self.eps)
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps)

    def _add(self, x: torch.Tensor, layer: Layer, inner: torch.Tensor) -> torch.Tensor:
        """The residual stream [..., h] after the layer's projection of [..., inner]."""
        scale = self.architecture.residual_multiplier
        if self._tp_size > 1:
            x = torch.add(x, self._reduce(layer.out(inner)), alpha=scale)
        else:
            x = layer.out.added(inner, x, scale)
        if self.observe is not None:
            self.observe(layer.name, x)
        return x

    def _leave(self, x: torch.Tensor) -> torch.Tensor | None:
        """Hand the residual stream on; from the last stage [n, h], logits [n, vocab] in fp32 on its first rank."""
        if not self.last:
            self._sent.append(_Message(x.contiguous(), self._pp))
            return None
        if self.final_norm is None or self.output is None:
            raise RuntimeError("the last stage has no output layer")
        logits = self.output(self._normed(x, self.final_norm))
        if self._tp_size > 1:
            parts = [torch.empty_like(logits) for _ in range(self._tp_size)] if self.has_logits else None
            dist.gather(logits.contiguous(), parts, group=self._tp, group_dst=0)
            if parts is None:
                return None
            logits = torch.cat(parts, dim=-1)
        logits, scale = logits[:, : self.vocab_size].float(), self.architecture.logits_scaling
        return logits if scale == 1.0 else logits / scale

    def take_sent(self) -> list[_Message]:
        """Messages to the next stage since the last call, to be waited for; their tensors live as long as they do."""
        sent, self._sent = self._sent, []
        return sent

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor | None, list[Memory]]:
        """Read prompts.

        Args:
            prompts: Token ids; best of similar length.

        Returns:
            Logits [b, vocab] of each prompt's next token where they are, and what each layer remembers.
        """
        device, width = self.like.device, max(map(len, prompts))
        tokens = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        real = torch.arange(width, device=device) < lengths.unsqueeze(-1)
        cos, sin = self._cos_sin(width)
        if cos is not None and sin is not None:
            cos, sin = cos[:width], sin[:width]
        span = Prompts(lengths, real.unsqueeze(-1), cos, sin)
        x, memories = self._enter(tokens), []
        # Behind the last layer that remembers, only what the next token is asked of needs to be computed.
        rows, ends = torch.arange(len(prompts), device=device), lengths - 1
        needed = max((i for i, layer in enumerate(self.layers) if not isinstance(layer, MLP)), default=0)
        for i, layer in enumerate(self.layers):
            inner, memory = layer.prefill(self._normed(x, layer.norm), span)
            memories.append(memory)
            if i == needed and self.last and self.observe is None:
                inner, x = inner[rows, ends], x[rows, ends]
            x = self._add(x, layer, inner)
        return self._leave(x if x.dim() == 2 or not self.last else x[rows, ends]), memories

    def step(self, tokens: list[int], positions: list[int], caches: list[Cache], band: int) -> torch.Tensor | None:
        """Add one token to each of the first rows of the caches.

        Args:
            tokens: One per row.
            positions: Where each stands in its response.
            caches: From `caches`.
            band: Rows of similar length that attend together, where `packed` is false.

        Returns:
            Logits [rows, vocab] of the next token of each, where they are.
        """
        places = torch.tensor(positions, device=self.like.device)
        cos, sin = self._cos_sin(max(positions) + 1)
        window = self.architecture.sliding_window
        bands = [] if self.packed else bands_of(positions, band, window, self.like)
        span = Step(len(tokens), places, bands, None if cos is None or sin is None else (cos, sin))
        x = self._enter(torch.tensor(tokens, device=self.like.device))
        for layer, cache in zip(self.layers, caches, strict=True):
            x = self._add(x, layer, layer.step(self._normed(x, layer.norm), cache, span))
        return self._leave(x)
