"""Decoding over the parameters of a Megatron model, without copies.

Megatron's own static engine reaches 0.6 to 0.8 times Hugging Face's speed on CPU and is deprecated; this loop reads the
same parameter tensors and computes the same function with preallocated caches. It must stay equal to the model's own
forward pass: tests compare every greedy token and every log-probability with a full forward, at TP 1 and 2.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state

from prism_nemo.errors import InputError
from prism_nemo.generation.layers import Layer, Span, layers_of
from prism_nemo.models.decoder import LanguageModel
from prism_nemo.models.layers.rope import inverse_frequencies
from prism_nemo.models.names import actual_name


class Decoder:
    """Incremental forward of a model for one batch of sequences that are padded on the left.

    Args:
        model: The whole depth of the model (pipeline_model_parallel_size 1); any tensor-parallel size.

    Raises:
        InputError: For a pipeline-parallel model.
    """

    def __init__(self, model: LanguageModel) -> None:
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            raise InputError(
                "generation needs pipeline_model_parallel_size 1; load the checkpoint with tensor or data parallelism"
            )
        a = self.architecture = model.architecture
        self._tp = parallel_state.get_tensor_model_parallel_group()
        self._tp_size = self._tp.size()
        self.eps, self.window = a.norm_epsilon, a.sliding_window
        self.vocab_size = a.vocab_size
        parameters = dict(model.named_parameters())
        self.embedding = parameters["embedding.word_embeddings.weight"]
        self.layers: list[Layer] = []
        for i, layer in enumerate(model.decoder.layers):

            def get(name: str, prefix: str = f"decoder.layers.{i}.") -> torch.Tensor:
                return parameters[actual_name(prefix + name, parameters)]

            self.layers += layers_of(a, i, layer, get, self._tp_size)
        final = "decoder.final_norm.weight" if a.layer_pattern else "decoder.final_layernorm.weight"
        self.final_norm = parameters[final]
        self.output = self.embedding if a.tied_embeddings else parameters["output_layer.weight"]
        self.inv_freq = None
        if a.rope is not None:
            self.inv_freq = inverse_frequencies(a.rope, a.kv_channels).to(self.embedding.device)

    def _reduce(self, x: torch.Tensor) -> torch.Tensor:
        if self._tp_size > 1:
            dist.all_reduce(x, group=self._tp)
        return x

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        if self._tp_size == 1:
            found = self.embedding[tokens]
        else:
            rows = self.embedding.shape[0]
            local = tokens - rows * self._tp.rank()
            mine = (local >= 0) & (local < rows)
            found = self._reduce(self.embedding[local.clamp(0, rows - 1)] * mine.unsqueeze(-1))
        scale = self.architecture.embedding_multiplier
        return found if scale == 1.0 else found * scale

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        """[b, h] -> [b, vocab] in fp32, padding rows dropped."""
        local = F.linear(F.rms_norm(x, (x.shape[-1],), self.final_norm, self.eps), self.output)
        if self._tp_size > 1:
            parts = [torch.empty_like(local) for _ in range(self._tp_size)]
            dist.all_gather(parts, local.contiguous(), group=self._tp)
            local = torch.cat(parts, dim=-1)
        logits, scale = local[:, : self.vocab_size].float(), self.architecture.logits_scaling
        return logits if scale == 1.0 else logits / scale

    def _span(self, tokens: torch.Tensor, start: int, offsets: torch.Tensor) -> Span:
        """Positions, angles and mask of [b, t] tokens that stand at cache positions start..start+t-1."""
        t = tokens.shape[1]
        end = start + t
        columns = torch.arange(start, end, device=tokens.device)
        keys = torch.arange(end, device=tokens.device)[None]
        real = keys >= offsets[:, None]
        mask = real[:, None, None, :]
        if self.window is not None:
            mask = mask & (columns[:, None] - keys < self.window)[None, None]
        if t > 1:
            # Padding rows attend to themselves: a row without any key would be NaN.
            mask = (mask & (keys <= columns[:, None])[None, None]) | (keys == columns[:, None])[None, None]
        cos = sin = None
        if self.inv_freq is not None:
            # A row padded on the left by `offset` has its first real token at position 0.
            angles = (columns[None] - offsets[:, None]).clamp(min=0).float()[..., None] * self.inv_freq
            cos, sin = angles.cos()[:, None].to(self.embedding.dtype), angles.sin()[:, None].to(self.embedding.dtype)
        return Span(start, end, real, mask, cos, sin)

    def _forward(self, tokens: torch.Tensor, start: int, offsets: torch.Tensor) -> torch.Tensor:
        """Logits of the last position of [b, t] tokens that stand at cache positions start..start+t-1."""
        span = self._span(tokens, start, offsets)
        x = self._embed(tokens)
        scale = self.architecture.residual_multiplier
        for layer in self.layers:
            added = self._reduce(layer(F.rms_norm(x, (x.shape[-1],), layer.norm, self.eps), span))
            x = torch.add(x, added, alpha=scale)
        return self._logits(x[:, -1])

    def prefill(self, tokens: torch.Tensor, offsets: torch.Tensor, room: int) -> torch.Tensor:
        """Fill the caches with the prompts.

        Args:
            tokens: [b, p], padded on the left.
            offsets: [b] padding of each row.
            room: Tokens that will be added at most.

        Returns:
            [b, vocab] logits of the next token.
        """
        for layer in self.layers:
            layer.begin(len(tokens), tokens.shape[1] + room, self.embedding)
        return self._forward(tokens, 0, offsets)

    def step(self, tokens: torch.Tensor, position: int, offsets: torch.Tensor) -> torch.Tensor:
        """Add one token per row at cache position `position`; [b] -> [b, vocab] logits of the next."""
        return self._forward(tokens[:, None], position, offsets)

    def select(self, rows: torch.Tensor) -> None:
        """Keep (or repeat) the given rows of the caches."""
        for layer in self.layers:
            layer.select(rows)
