"""Norm and linear layers, with what tensor and sequence parallelism exchange.

Megatron's own exchanges are used: all-gather and reduce-scatter of tokens along dimension 0 with sequence parallelism,
else a sum over ranks in the backward pass of a column-parallel layer and in the forward pass of a row-parallel one.
They are imported when they are used: Megatron imports this package from within itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from . import fp8
from .module.base import TransformerEngineBaseModule


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype)


class RMSNorm(torch.nn.Module):
    """Without an extra state, as the real one."""

    def __init__(
        self,
        normalized_shape: int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        device: torch.device | str = "cuda",
    ) -> None:
        super().__init__()
        if zero_centered_gamma:
            raise NotImplementedError
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(normalized_shape or hidden_size, dtype=params_dtype, device=device))
        self.weight.sequence_parallel = bool(sequence_parallel)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _norm(x, self.weight, self.eps)


class Linear(TransformerEngineBaseModule):
    """``x @ weight.T``: this rank's share of the features, or of the tokens after a row-parallel layer."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[[torch.Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        parameters_split: Any = None,
        device: torch.device | str = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        save_original_input: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__()
        if bias or return_bias or fuse_wgrad_accumulation or delay_wgrad_compute:
            raise NotImplementedError
        fp8.note_made(self)
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        self.parallel_mode, self.tp_group, self.tp_size = parallel_mode, tp_group, tp_size
        self.sequence_parallel = sequence_parallel and tp_size > 1
        self.save_original_input = save_original_input
        rows, columns = out_features, in_features
        if parallel_mode == "column":
            rows //= tp_size
        elif parallel_mode == "row":
            columns //= tp_size
        self.weight = torch.nn.Parameter(torch.empty(rows, columns, dtype=params_dtype, device=device))
        if init_method is not None:
            init_method(self.weight)
        if parallel_mode is not None:
            from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

            set_tensor_model_parallel_attributes(self.weight, True, 0 if parallel_mode == "column" else 1, 1)

    def forward(self, inp: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        from megatron.core.tensor_parallel import mappings

        fp8.note_run(self)
        if self.parallel_mode == "row":
            out = F.linear(inp, self.weight)
            if self.sequence_parallel:
                return mappings.reduce_scatter_to_sequence_parallel_region(out, group=self.tp_group)
            return mappings.reduce_from_tensor_model_parallel_region(out, group=self.tp_group)
        if self.sequence_parallel:
            inp = mappings.gather_from_sequence_parallel_region(inp, group=self.tp_group)
        elif self.parallel_mode == "column":
            inp = mappings.copy_to_tensor_model_parallel_region(inp, group=self.tp_group)
        return F.linear(inp, self.weight)


class LayerNormLinear(Linear):
    """A norm before a linear layer; its weight is `layer_norm_weight`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        normalization: str = "LayerNorm",
        return_layernorm_output: bool = False,
        return_layernorm_output_gathered: bool = False,
        zero_centered_gamma: bool = False,
        params_dtype: torch.dtype | None = None,
        device: torch.device | str = "cuda",
        **linear: Any,
    ) -> None:
        if normalization != "RMSNorm" or return_layernorm_output or zero_centered_gamma:
            raise NotImplementedError
        super().__init__(
            in_features, out_features, sequence_parallel, params_dtype=params_dtype, device=device, **linear
        )
        self.eps = eps
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(in_features, dtype=params_dtype, device=device))
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel

    def forward(self, inp: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        return super().forward(_norm(inp, self.layer_norm_weight, self.eps), is_first_microbatch)


class GroupedLinear(TransformerEngineBaseModule):
    """Of mixtures of experts, which are not used."""
