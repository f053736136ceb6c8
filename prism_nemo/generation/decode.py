"""Decoding over the parameters of a Megatron GPT model, without copies.

Megatron's own static engine reaches 0.6 to 0.8 times Hugging Face's speed on CPU and is deprecated; this loop reads the
same parameter tensors and computes the same function with a preallocated key/value cache. It must stay equal to
`GPT.forward`: tests compare every greedy token and every log-probability with a full forward, at TP 1 and 2.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state

from prism_nemo.errors import InputError
from prism_nemo.models.build import GPT
from prism_nemo.models.layers.rope import inverse_frequencies
from prism_nemo.models.names import actual_name

# The weights of one layer, in the order in which `Decoder._forward` uses them.
_LAYER = (
    "input_layernorm.weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight",
    "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
)


class Decoder:
    """Incremental forward of a dense GPT for one batch of sequences that are padded on the left.

    Args:
        model: The whole depth of the model (pipeline_model_parallel_size 1); any tensor-parallel size.

    Raises:
        InputError: For a pipeline-parallel model.
    """

    def __init__(self, model: GPT) -> None:
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            raise InputError(
                "generation needs pipeline_model_parallel_size 1; load the checkpoint with tensor or data parallelism"
            )
        config = model.config
        self._tp = parallel_state.get_tensor_model_parallel_group()
        self._tp_size = self._tp.size()
        self.groups = config.num_query_groups // self._tp_size
        self.heads = config.num_attention_heads // self._tp_size
        self.head_dim = config.kv_channels
        self.eps = config.layernorm_epsilon
        self.vocab_size = model.architecture.vocab_size
        parameters = dict(model.named_parameters())
        self.embedding = parameters["embedding.word_embeddings.weight"]
        self.layers = [
            tuple(parameters[actual_name(f"decoder.layers.{i}.{name}", parameters)] for name in _LAYER)
            for i in range(len(model.decoder.layers))
        ]
        self.final_norm = parameters["decoder.final_layernorm.weight"]
        tied = model.share_embeddings_and_output_weights
        self.output = self.embedding if tied else parameters["output_layer.weight"]
        self.inv_freq = inverse_frequencies(model.architecture.rope, self.head_dim).to(self.embedding.device)
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def _reduce(self, x: torch.Tensor) -> torch.Tensor:
        if self._tp_size > 1:
            dist.all_reduce(x, group=self._tp)
        return x

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        if self._tp_size == 1:
            return self.embedding[tokens]
        rows = self.embedding.shape[0]
        local = tokens - rows * self._tp.rank()
        mine = (local >= 0) & (local < rows)
        found = self.embedding[local.clamp(0, rows - 1)] * mine.unsqueeze(-1)
        return self._reduce(found)

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        """[b, h] -> [b, vocab] in fp32, padding rows dropped."""
        local = F.linear(F.rms_norm(x, (x.shape[-1],), self.final_norm, self.eps), self.output)
        if self._tp_size > 1:
            parts = [torch.empty_like(local) for _ in range(self._tp_size)]
            dist.all_gather(parts, local.contiguous(), group=self._tp)
            local = torch.cat(parts, dim=-1)
        return local[:, : self.vocab_size].float()

    def _rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    def _forward(self, tokens: torch.Tensor, start: int, offsets: torch.Tensor) -> torch.Tensor:
        """Logits of the last position of [b, t] tokens that stand at cache positions start..start+t-1."""
        b, t = tokens.shape
        end = start + t
        columns = torch.arange(start, end, device=tokens.device)
        # A row padded on the left by `offset` has its first real token at position 0.
        angles = (columns[None] - offsets[:, None]).clamp(min=0).float()[..., None] * self.inv_freq
        cos, sin = angles.cos()[:, None].to(self.embedding.dtype), angles.sin()[:, None].to(self.embedding.dtype)
        real = torch.arange(end, device=tokens.device)[None] >= offsets[:, None]  # [b, end]
        mask = real[:, None, None, :]
        if t > 1:
            causal = torch.arange(end, device=tokens.device)[None] <= columns[:, None]
            # Padding rows attend to themselves: a row without any key would be NaN.
            own = torch.arange(end, device=tokens.device)[None] == columns[:, None]
            mask = (mask & causal[None, None]) | own[None, None]
        per_group = self.heads // self.groups
        x = self._embed(tokens)
        for i, (norm1, qkv_weight, proj, norm2, fc1, fc2) in enumerate(self.layers):
            qkv = F.linear(F.rms_norm(x, (x.shape[-1],), norm1, self.eps), qkv_weight)
            qkv = qkv.view(b, t, self.groups, per_group + 2, self.head_dim)
            q = qkv[:, :, :, :per_group].reshape(b, t, self.heads, self.head_dim).transpose(1, 2)
            k, v = qkv[:, :, :, per_group].transpose(1, 2), qkv[:, :, :, per_group + 1].transpose(1, 2)
            q, k = self._rotate(q, cos, sin), self._rotate(k, cos, sin)
            self.keys[i][:, :, start:end] = k
            self.values[i][:, :, start:end] = v
            k, v = self.keys[i][:, :, :end], self.values[i][:, :, :end]
            if t == 1:
                # The queries of a group become query positions of their shared key/value head: nothing is expanded.
                q = q.reshape(b, self.groups, per_group, self.head_dim)
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(b, self.heads, 1, self.head_dim)
            else:
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=per_group > 1)
            x = x + self._reduce(F.linear(out.transpose(1, 2).reshape(b, t, -1), proj))
            gate, up = F.linear(F.rms_norm(x, (x.shape[-1],), norm2, self.eps), fc1).chunk(2, dim=-1)
            x = x + self._reduce(F.linear(F.silu(gate) * up, fc2))
        return self._logits(x[:, -1])

    def prefill(self, tokens: torch.Tensor, offsets: torch.Tensor, room: int) -> torch.Tensor:
        """Fill the cache with the prompts.

        Args:
            tokens: [b, p], padded on the left.
            offsets: [b] padding of each row.
            room: Tokens that will be added at most.

        Returns:
            [b, vocab] logits of the next token.
        """
        b, p = tokens.shape
        shape = (b, self.groups, p + room, self.head_dim)
        self.keys = [self.embedding.new_empty(shape) for _ in self.layers]
        self.values = [self.embedding.new_empty(shape) for _ in self.layers]
        return self._forward(tokens, 0, offsets)

    def step(self, tokens: torch.Tensor, position: int, offsets: torch.Tensor) -> torch.Tensor:
        """Add one token per row at cache position `position`; [b] -> [b, vocab] logits of the next."""
        return self._forward(tokens[:, None], position, offsets)

    def select(self, rows: torch.Tensor) -> None:
        """Keep (or repeat) the given rows of the cache."""
        self.keys = [k.index_select(0, rows) for k in self.keys]
        self.values = [v.index_select(0, rows) for v in self.values]
