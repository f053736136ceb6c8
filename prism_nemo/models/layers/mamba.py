"""The Mamba-2 mixer with Megatron's parameter names, shapes and checkpoint keys, on any device.

Megatron's own (ssm/mamba_mixer.py) cannot be imported without triton, nor built without mamba_ssm and a CUDA device,
and asks that the tensor-parallel size divide the groups of B and C. Granite-4.0-H has one group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm.gated_delta_net import _split_tensor_factory  # same as mamba_mixer.py's, which needs triton
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)

from prism_nemo.models.layers import mamba_kernels
from prism_nemo.models.layers.context_parallel import repeats, to_heads, to_tokens
from prism_nemo.models.layers.documents import documents_of
from prism_nemo.models.layers.gated_norm import GatedRMSNorm
from prism_nemo.models.layers.mamba_layout import LayerWeights, MambaLayout, SumGradients

_LOWEST_DT = 1e-4  # below it softplus cannot be inverted well; as in Megatron


@dataclass
class MambaMixerSubmodules:
    """Specs of the linear layers."""

    in_proj: ModuleSpec | type
    out_proj: ModuleSpec | type


class MambaMixer(MegatronModule):
    """Input projection, causal convolution, recurrence, gated norm, output projection.

    Where tensor parallelism cuts the groups too (see `MambaLayout`), the parameters are Megatron's: in_proj has the
    rows [z, x, B, C, dt] and conv1d the channels [x, B, C]. Where B and C are replicated, in_proj has [z, x, dt],
    conv1d [x], and in_proj_bc and conv1d_bc hold [B, C] of all groups on every rank. The gradient of such a copy is
    summed over the ranks within the backward pass, so that it is whole like that of any other replicated parameter; the
    gradient of the activations stays partial, as the input projection's own reduction expects.

    A_log and D are made fp32 and computed on in fp32, but casting the model to bf16 casts them too, as with Megatron's
    mixer and transformers': training then sees the decays that the exported bf16 model has, while the optimizer's fp32
    copies collect the updates. (Where fp32 and bf16 parameters meet in one group, Megatron's distributed optimizer also
    mixes up their states: distrib_optimizer.py:297 counts them in buffer order, :437 puts fp32 first.)

    Args:
        config: Megatron's; the sizes are its mamba_num_heads, mamba_head_dim, mamba_num_groups and mamba_state_dim.
        submodules: Specs of the linear layers.
        d_model: Hidden size.
        layer_number: Counted from 1.
        pg_collection: Process groups.
        pp_layer_offset: Not needed.
        conv_kernel: Taps of the convolution.
        conv_bias: Whether it has a bias.
        chunk_size: Tokens per chunk of the recurrence.
        norm_eps: Epsilon of the gated norm.
        dt_limit: Lowest and highest dt.
        dt_range: Range of the initial dt.
        A_range: Range of the initial -A.

    Raises:
        InputError: If the heads or groups cannot be cut over the tensor-parallel ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MambaMixerSubmodules,
        d_model: int,
        layer_number: int | None = None,
        pg_collection: Any = None,
        pp_layer_offset: int = 0,
        conv_kernel: int = 4,
        conv_bias: bool = True,
        chunk_size: int = 128,
        norm_eps: float = 1e-5,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        dt_range: tuple[float, float] = (0.001, 0.1),
        A_range: tuple[float, float] = (1.0, 16.0),
    ) -> None:
        super().__init__(config)
        self.context = pg_collection.cp if pg_collection.cp.size() > 1 else None
        self.tp_group, self.layer_number = pg_collection.tp, layer_number
        self.chunk_size, self.dt_limit = chunk_size, (float(dt_limit[0]), float(dt_limit[1]))
        self.layout = layout = MambaLayout(
            config.mamba_num_heads or 2 * d_model // config.mamba_head_dim,
            config.mamba_head_dim,
            config.mamba_num_groups,
            config.mamba_state_dim,
            self.tp_group.size(),
            self.tp_group.rank(),
        )
        inner = layout.rows[0]
        linear: dict[str, Any] = {"config": config, "bias": False, "is_expert": False, "tp_group": self.tp_group}
        self.in_proj = build_module(
            submodules.in_proj,
            d_model,
            layout.tp * sum(layout.parts["in_proj"].values()),
            init_method=lambda weight: None,  # drawn below; Megatron would cut the rows without regard to their parts
            gather_output=False,
            skip_bias_add=False,
            tp_comm_buffer_name="fc1",
            **linear,
        )
        self._init_projection(d_model)
        self._init_conv(conv_kernel, conv_bias)
        self._init_heads(dt_range, A_range)
        self.norm = GatedRMSNorm(
            layout.local_rows[0],
            inner // layout.groups,
            norm_eps,
            self.tp_group,
            config.params_dtype,
            self.in_proj.weight.device,
        )
        self.out_proj = build_module(
            submodules.out_proj,
            inner,
            d_model,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="fc2",
            **linear,
        )

    def _draw(self, rows: tuple[int, ...], tail: tuple[int, ...], init: Callable[..., Any]) -> tuple[torch.Tensor, ...]:
        """The parts of a whole parameter, drawn as one on every rank, so that no value depends on the layout."""
        full = torch.empty(sum(rows), *tail, device=self.in_proj.weight.device)
        if self.config.perform_initialization:
            init(full)
        return full.to(self.config.params_dtype).split(rows)

    def _init_projection(self, d_model: int) -> None:
        z, x, B, C, dt = self._draw(self.layout.rows, (d_model,), self.config.init_method)
        if self.layout.replicated:
            self.in_proj_bc = LayerWeights([torch.cat((B, C))], parallel=False)
        with torch.no_grad():
            parts = (z, x, dt) if self.layout.replicated else (z, x, B, C, dt)
            self.in_proj.weight.copy_(self.layout.cut(*parts))

    def _init_conv(self, width: int, has_bias: bool) -> None:
        """As nn.Conv1d: each output reads `width` numbers, so weight and bias are uniform within width^-1/2."""

        def uniform(full: torch.Tensor) -> None:
            full.uniform_(-(width**-0.5), width**-0.5)

        tails = [(1, width), ()] if has_bias else [(1, width)]
        drawn = [self._draw(self.layout.rows[1:4], tail, uniform) for tail in tails]
        if self.layout.replicated:
            self.conv1d = LayerWeights([self.layout.cut(x) for x, _, _ in drawn], parallel=True)
            self.conv1d_bc = LayerWeights([torch.cat((B, C)) for _, B, C in drawn], parallel=False)
        else:
            self.conv1d = LayerWeights([self.layout.cut(*parts) for parts in drawn], parallel=True)

    def _init_heads(self, dt_range: tuple[float, float], A_range: tuple[float, float]) -> None:
        """One number per head; softplus(dt_bias) is log-uniform within dt_range."""
        full = torch.empty(self.layout.heads, device=self.in_proj.weight.device)
        dt = full.uniform_(math.log(dt_range[0]), math.log(dt_range[1])).exp().clamp(min=_LOWEST_DT)
        dt_bias = dt + torch.log(-torch.expm1(-dt))
        A_log = full.uniform_(*A_range).log()
        cut = self.layout.cut
        self.dt_bias = torch.nn.Parameter(cut(dt_bias).to(self.config.params_dtype))
        self.A_log = torch.nn.Parameter(cut(A_log))
        self.D = torch.nn.Parameter(cut(torch.ones_like(full)))
        for parameter in (self.dt_bias, self.A_log, self.D):
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]

    def local_weights(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """What this rank computes with, in either layout.

        Returns:
            Rows [z, x, B, C, dt] of the input projection, channels [x, B, C] of the convolution's weight, and of its
            bias or None.
        """
        projection, kernel, bias = self.in_proj.weight, self.conv1d.weight, self.conv1d.bias
        if not self.layout.replicated:
            return projection, kernel, bias
        copies = (self.in_proj_bc.weight, *self.conv1d_bc.parameters())
        bc, *conv_bc = map(self.layout.own_groups, SumGradients.apply(self.tp_group, *copies))
        zx, dt = projection.split([2 * self.layout.local_rows[0], self.layout.local_heads])
        whole_bias = None if bias is None else torch.cat((bias, conv_bc[1]))
        return torch.cat((zx, bc, dt)), torch.cat((kernel, conv_bc[0])), whole_bias

    def forward(
        self,
        hidden_states: torch.Tensor,
        inference_context: Any = None,
        *,
        inference_params: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mix along the sequence.

        Args:
            hidden_states: [l, b, hidden]; with sequence or context parallelism this rank's share of l.
            inference_context: Not supported.
            inference_params: Not supported.
            packed_seq_params: Where the documents of the whole row lie (b is 1); their states and convolutions are
                separate.

        Returns:
            The same shape, and no bias.
        """
        if inference_context is not None or inference_params is not None:
            raise NotImplementedError("MambaMixer runs whole sequences; decode with ssd_step and causal_conv_step")
        weight, kernel, bias = self.local_weights()
        if self.layout.replicated:
            # in_proj's own forward takes no weight of another shape; this is the function that it calls.
            projected = self.in_proj._forward_impl(
                hidden_states,
                weight,
                bias=None,
                gradient_accumulation_fusion=False,
                allreduce_dgrad=self.in_proj.allreduce_dgrad,
                sequence_parallel=self.in_proj.sequence_parallel,
                tp_group=self.tp_group,
            )
        else:
            projected, _ = self.in_proj(hidden_states)
        inner, _, bc, _, heads = self.layout.local_rows
        z, xBC, dt = projected.transpose(0, 1).split([inner, inner + 2 * bc, heads], dim=-1)
        per_head: tuple[torch.Tensor, ...] = self.A_log, self.D, self.dt_bias
        if self.context is None:
            y = self._recur(xBC, dt, kernel, bias, per_head, packed_seq_params)
        else:
            xBC, dt, (kernel, bias), per_head = self._share(xBC, dt, (kernel, bias), per_head, self.context)
            y = self._recur(xBC, dt, kernel, bias, per_head, packed_seq_params)
            y = to_tokens(y.transpose(0, 1), self.context).transpose(0, 1)
        return self.out_proj(self.norm(y, z).transpose(0, 1).contiguous())

    def _share(
        self,
        xBC: torch.Tensor,
        dt: torch.Tensor,
        channels: tuple[torch.Tensor | None, ...],
        per_head: tuple[torch.Tensor, ...],
        context: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[Any, ...], tuple[torch.Tensor, ...]]:
        """This context-parallel rank's heads of all tokens, and its part of the weights.

        Where there are fewer groups than ranks, each gets a copy of the B and C of its group.

        Args:
            xBC: [b, l / ranks, channels].
            dt: [b, l / ranks, heads].
            channels: Weights with a row for each channel of xBC, or None.
            per_head: Weights with a row for each head.
            context: Group of ranks.

        Returns:
            The same, for fewer channels and heads: activations of [b, l, ...].
        """
        inner, bc = self.layout.local_rows[0], self.layout.local_rows[2]
        ranks, groups = context.size(), self.layout.local_groups
        copies = repeats(groups, ranks)

        def parts(x: torch.Tensor, dim: int) -> list[torch.Tensor]:
            heads, *bcs = x.split([inner, bc, bc], dim=dim)
            if copies > 1:
                bcs = [
                    part.unflatten(dim, (groups, -1)).repeat_interleave(copies, dim % x.dim()).flatten(dim, dim + 1)
                    for part in bcs
                ]
            return [heads, *bcs]

        sent = [x.transpose(0, 1) for x in (*parts(xBC, 2), dt)]
        *received, dt = (x.transpose(0, 1) for x in to_heads(sent, context))

        def own(x: torch.Tensor) -> torch.Tensor:
            return x.chunk(ranks)[context.rank()]

        cut = tuple(None if x is None else torch.cat([own(part) for part in parts(x, 0)]) for x in channels)
        return torch.cat(received, dim=-1), dt, cut, tuple(own(x) for x in per_head)

    def _recur(
        self,
        xBC: torch.Tensor,
        dt: torch.Tensor,
        kernel: torch.Tensor,
        bias: torch.Tensor | None,
        per_head: tuple[torch.Tensor, ...],
        packed_seq_params: PackedSeqParams | None,
    ) -> torch.Tensor:
        """Convolution and recurrence of whole rows: [b, l, channels], [b, l, heads] -> [b, l, heads * head_dim]."""
        (b, tokens, _), heads, seq_idx = xBC.shape, dt.shape[-1], None
        if packed_seq_params is not None:
            if b != 1:
                raise ValueError(f"packed documents come as one row, not {b}")
            documents = documents_of(packed_seq_params, tokens)
            xBC, dt = (x.reshape(documents.rows, -1, x.shape[-1]) for x in (xBC, dt))
            seq_idx = documents.seq_idx.view(documents.rows, -1)
        inner = heads * self.layout.head_dim
        bc = (xBC.shape[-1] - inner) // 2
        x, B, C = mamba_kernels.conv(xBC, kernel, bias, seq_idx).split([inner, bc, bc], dim=-1)
        A_log, D, dt_bias = per_head
        y = mamba_kernels.scan(
            x.unflatten(-1, (heads, -1)),
            dt,
            -torch.exp(A_log.float()),
            B.unflatten(-1, (-1, self.layout.d_state)),
            C.unflatten(-1, (-1, self.layout.d_state)),
            D.float(),
            dt_bias=dt_bias,
            dt_limit=self.dt_limit,
            chunk_size=self.chunk_size,
            seq_idx=seq_idx,
        )
        return y.reshape(b, tokens, inner)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Under Megatron's keys (in_proj.weight.z, .x, .B, .C, .dt and so on), which are the same in any layout."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        groups = {"tp_group": self.tp_group, "dp_cp_group": metadata["dp_cp_group"]}

        def sharded(module: torch.nn.Module, name: str, axes: dict[str, int]) -> ShardedStateDict:
            own: dict[str, torch.Tensor] = {}
            module._save_to_state_dict(own, "", keep_vars=True)
            return make_sharded_tensors_for_checkpoint(own, f"{prefix}{name}", axes, sharded_offsets, **groups)

        result = sharded(self, "", {"A_log": 0, "D": 0, "dt_bias": 0})
        for name, child in self.named_children():
            if isinstance(child, LayerWeights):
                result.update(sharded(child, f"{name}.", {"weight": 0, "bias": 0} if name == "conv1d" else {}))
            else:
                place = f"{prefix}{name}."
                result.update(
                    sharded_state_dict_default(child, place, sharded_offsets, metadata, tp_group=self.tp_group)
                )
        for module, sizes in self.layout.parts.items():
            for key in (f"{prefix}{module}.weight", f"{prefix}{module}.bias"):
                if key in result:
                    # A copy is kept under the key of the parameter that it is a part of where nothing is replicated.
                    result[key].key = key.replace(f"{module}.", f"{module.removesuffix('_bc')}.")
                    result[key] = _split_tensor_factory(result[key], list(sizes.values()), list(sizes), 0)
        return result
