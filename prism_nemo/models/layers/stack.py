"""The hybrid stack of Mamba, attention and MLP layers on torch kernels, with activation recomputation.

Megatron's MambaStack makes its final norm with Transformer Engine (mamba_block.py:166) and ignores
``recompute_granularity="full"`` without a word: a run that counts on the memory would die of its lack.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from prism_nemo.errors import InputError
from prism_nemo.models.layers.attention import SDPACoreAttention
from prism_nemo.models.layers.mamba import MambaMixer, MambaMixerSubmodules
from prism_nemo.models.layers.mlp import GatedMLP
from prism_nemo.models.layers.norm import RMSNorm


class HybridStack(MambaStack):
    """MambaStack with `RMSNorm` as its final norm, full recomputation of its layers where the config asks for it, and
    parts for a virtual pipeline.

    Args:
        config: Megatron's.
        args: As MambaStack.
        post_layer_norm: As MambaStack.
        vp_stage: Which part of this pipeline stage's layers, in a virtual pipeline; else None.
        kwargs: As MambaStack.

    Raises:
        InputError: For settings that recomputation would ignore.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        post_layer_norm: bool = True,
        vp_stage: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.vp_stage = vp_stage  # the parent's constructor asks `_select_layers_for_pipeline_parallel`
        super().__init__(config, *args, post_layer_norm=False, **kwargs)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        if config.recompute_granularity == "full" and (config.fp8 or config.distribute_saved_activations):
            raise InputError("a hybrid stack cannot recompute its layers with fp8 or distribute_saved_activations")

    def _select_layers_for_pipeline_parallel(self, layer_type_list: list[str]) -> tuple[int, list[str]]:
        """This part's layers and the number of those before them, as get_transformer_layer_offset counts them."""
        parts = self.config.virtual_pipeline_model_parallel_size
        if parts is None:
            selected: tuple[int, list[str]] = super()._select_layers_for_pipeline_parallel(layer_type_list)
            return selected
        if self.vp_stage is None:
            raise ValueError("a hybrid stack of a virtual pipeline must be told which part it is")
        stages = self.pp_group.size()
        size = len(layer_type_list) // (stages * parts)
        first = (self.vp_stage * stages + self.pp_group.rank()) * size
        return first, layer_type_list[first : first + size]

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        inference_context: Any = None,
        rotary_pos_emb: torch.Tensor | None = None,
        *,
        inference_params: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
        padding_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[l, b, hidden] -> [l, b, hidden], as MambaStack.forward."""
        if not (self.training and self.config.recompute_granularity == "full"):
            return super().forward(
                hidden_states,
                attention_mask,
                inference_context,
                rotary_pos_emb,
                inference_params=inference_params,
                packed_seq_params=packed_seq_params,
                padding_mask=padding_mask,
            )
        if not self.pre_process:
            hidden_states = self.input_tensor

        def part(first: int, last: int) -> Callable[[torch.Tensor], torch.Tensor]:
            def run(hidden: torch.Tensor) -> torch.Tensor:
                for layer in self.layers[first:last]:
                    masks = {"padding_mask": padding_mask} if isinstance(layer, TransformerLayer) else {}
                    hidden = layer(
                        hidden,
                        attention_mask,
                        rotary_pos_emb=rotary_pos_emb,
                        packed_seq_params=packed_seq_params,
                        **masks,
                    )
                    hidden = hidden[0] if isinstance(hidden, tuple) else hidden  # TransformerLayer adds a context
                return hidden

            return run

        for first, last, recompute in self._parts():
            if recompute:
                hidden_states = tensor_parallel.checkpoint(part(first, last), False, hidden_states)
            else:
                hidden_states = part(first, last)(hidden_states)
        if self.post_process and self.post_layer_norm:
            hidden_states = self.final_norm(hidden_states)
        return hidden_states

    def _parts(self) -> list[tuple[int, int, bool]]:
        """(first layer, last plus one, whether only its input is kept), with the meaning of Megatron's two methods.

        ``uniform`` keeps the input of every recompute_num_layers-th layer; ``block`` recomputes that many layers one by
        one and keeps everything of the others.
        """
        n, layers = self.config.recompute_num_layers, len(self.layers)
        if self.config.recompute_method == "uniform":
            return [(i, min(i + n, layers), True) for i in range(0, layers, n)]
        return [(i, i + 1, i < n) for i in range(layers)]


def hybrid_stack_spec(
    *,
    mixer: dict[str, Any],
    norm_eps: float,
    core_attention: ModuleSpec | type = SDPACoreAttention,
    mlp: type[MLP] = GatedMLP,
    bda: ModuleSpec | Callable[..., Any] = get_bias_dropout_add,
    vp_stage: int | None = None,
) -> ModuleSpec:
    """Layers of torch kernels for Megatron's MambaModel.

    Args:
        mixer: Parameters of `MambaMixer`: conv_kernel, chunk_size and so on.
        norm_eps: Epsilon of the norms in front of the mixers, to which MambaLayer passes none (mamba_layer.py:85), and
            of the mixers' own unless `mixer` has one. The other norms take the config's layernorm_epsilon.
        core_attention: Of the attention layers.
        mlp: Class of the MLP.
        bda: How a layer's output joins the residual, for all kinds of layers.
        vp_stage: See `HybridStack`.
    """
    # Where layers number themselves, they ask which part they are in. MLPLayer cannot be told; it is a TransformerLayer
    # that takes fewer arguments (ssm/mlp_layer.py).
    part = {} if vp_stage is None else {"vp_stage": vp_stage}
    mlp_layer = MLPLayer if vp_stage is None else TransformerLayer
    column, row = ColumnParallelLinear, RowParallelLinear
    mamba = MambaLayerSubmodules(
        norm=ModuleSpec(module=RMSNorm, params={"eps": norm_eps}),
        mixer=ModuleSpec(
            module=MambaMixer,
            params={"norm_eps": norm_eps, **mixer},
            submodules=MambaMixerSubmodules(in_proj=column, out_proj=row),
        ),
        mamba_bda=bda,
        sharded_state_dict_keys_map={"norm.": "mixer.in_proj.layer_norm_"},
    )
    attention = TransformerLayerSubmodules(
        input_layernorm=RMSNorm,
        self_attention=ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(linear_qkv=column, core_attention=core_attention, linear_proj=row),
        ),
        self_attn_bda=bda,
        sharded_state_dict_keys_map={"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
    )
    feed_forward = TransformerLayerSubmodules(
        pre_mlp_layernorm=RMSNorm,
        mlp=ModuleSpec(module=mlp, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row)),
        mlp_bda=bda,
        sharded_state_dict_keys_map={"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
    )
    return ModuleSpec(
        module=HybridStack,
        params={"vp_stage": vp_stage},
        submodules=MambaStackSubmodules(
            mamba_layer=ModuleSpec(module=MambaLayer, submodules=mamba),
            attention_layer=ModuleSpec(module=TransformerLayer, params=part, submodules=attention),
            mlp_layer=ModuleSpec(module=mlp_layer, params=part, submodules=feed_forward),
        ),
    )
