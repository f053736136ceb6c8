"""Linear layers whose three matrix products take FP8 operands, emulated on any device.

What Transformer Engine runs in FP8 is emulated, and nothing else: the column- and row-parallel layers of attention, MLP
and mixers. Embeddings, output layer, norms, attention and the recurrence stay as they are. Operands are rounded to
FP8 with the recipe's scales; products are summed in fp32 and given in the activations' type.

A layer's three products sum over different dimensions (inputs, outputs, tokens). Recipes with blocks cut them along
the summed dimension, so each product has operands of its own, made from the unquantised tensor (as Transformer Engine
does).

Scales under parallelism. With sequence parallelism Transformer Engine reduces a tensor's amax over the tensor-parallel
group before it gathers (tensorwise), or gathers what blocks need; quantising the gathered tensor, as here, gives the
same scales. Weights and tensors cut by features have scales of their own on each rank. ``delayed`` takes the largest
amax over all tensor- and data-parallel ranks of the stage (fp8_utils.py:623), every pass.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from prism_nemo.config import PrecisionConfig
from prism_nemo.precision.check import check_recomputation
from prism_nemo.precision.formats import E4M3, E5M2
from prism_nemo.precision.scaling import (
    DelayedScale,
    quantise_current,
    quantise_mx,
    quantise_rows,
    quantise_squares,
    quantise_tensor,
)

FEATURES, TOKENS = 1, 0  # dimensions of [tokens, features]; of a weight: INPUTS, OUTPUTS
INPUTS, OUTPUTS = 1, 0


class Quantiser:
    """Quantises the operands of one linear layer.

    Args:
        precision: Recipe and format.
        device: Of the layer.
    """

    def __init__(self, precision: PrecisionConfig, device: torch.device) -> None:
        self.recipe = precision.fp8_recipe
        gradient = E5M2 if precision.fp8_format == "hybrid" else E4M3
        self.formats = {"input": E4M3, "weight": E4M3, "gradient": gradient}
        self.delayed: dict[str, DelayedScale] = {}
        if self.recipe == "delayed":
            settings = (precision.fp8_margin, precision.fp8_amax_history_len, precision.fp8_amax_compute_algo)
            self.delayed = {role: DelayedScale(form, *settings, device) for role, form in self.formats.items()}

    def __call__(self, x: torch.Tensor, role: str, *dims: int, observe: bool = True) -> list[torch.Tensor]:
        """One operand for each of the products it enters, by the dimension that the product sums over.

        Args:
            x: [rows, columns], any floating type.
            role: ``input``, ``weight`` or ``gradient``.
            dims: Summed dimensions.
            observe: Whether a delayed scale takes notice of this pass.

        Returns:
            fp32 tensors, the same one where the recipe makes no difference.
        """
        x, form = x.float(), self.formats[role]
        if self.recipe == "mxfp8":
            return [quantise_mx(x, form, dim) for dim in dims]
        if self.recipe == "blockwise" and role != "weight":
            return [quantise_rows(x, form, dim) for dim in dims]
        if self.recipe == "blockwise":
            operand = quantise_squares(x, form)
        elif self.recipe == "tensorwise":
            operand = quantise_current(x, form)
        else:
            delayed = self.delayed[role]
            operand = quantise_tensor(x, form, delayed.scale)
            if observe:
                delayed.observe(x, parallel_state.get_amax_reduction_group(with_context_parallel=True))
        return [operand] * len(dims)


class _Product(torch.autograd.Function):
    """x @ weight.T of [tokens, inputs] and [outputs, inputs], with FP8 operands forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, quantise: Quantiser, training: bool) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if training:
            x_forward, x_wgrad = quantise(flat, "input", FEATURES, TOKENS)
            w_forward, w_dgrad = quantise(weight, "weight", INPUTS, OUTPUTS)
            ctx.save_for_backward(x_wgrad, w_dgrad)
            ctx.quantise, ctx.types, ctx.shape = quantise, (x.dtype, weight.dtype), x.shape
        else:  # nothing is kept, and a validation must not move the scales of training
            (x_forward,) = quantise(flat, "input", FEATURES, observe=False)
            (w_forward,) = quantise(weight, "weight", INPUTS, observe=False)
        return (x_forward @ w_forward.t()).to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat = grads[0].reshape(-1, grads[0].shape[-1])
        x, weight = ctx.saved_tensors
        g_dgrad, g_wgrad = ctx.quantise(flat, "gradient", FEATURES, TOKENS)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = (g_dgrad @ weight).to(ctx.types[0]).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = (g_wgrad.t() @ x).to(ctx.types[1])
        return grad_x, grad_weight, None, None


class _Emulated:
    """What both kinds of parallel linear layer have in common: the product, and the scales in the checkpoint."""

    quantiser: Quantiser

    def _forward_impl(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        allreduce_dgrad: bool = False,
        sequence_parallel: bool = False,
        tp_group: Any = None,
        **_: Any,
    ) -> torch.Tensor:
        """In the place of Megatron's (layers.py:929, :1236); the communication is that of its linear function."""
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        training = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
        output = _Product.apply(input, weight, self.quantiser, training)
        return output if bias is None else output + bias

    def get_extra_state(self) -> dict[str, dict[str, torch.Tensor]] | None:
        """Scales and histories of the delayed recipe; the same on all ranks of a stage, whatever the layout."""
        return {role: scale.state() for role, scale in self.quantiser.delayed.items()} or None

    def set_extra_state(self, state: Any) -> None:
        """Take them; a checkpoint without (another recipe, an import) leaves the scales at their beginning."""
        for role, scale in self.quantiser.delayed.items():
            if isinstance(state, dict) and role in state:
                scale.restore(state[role])


class EmulatedColumnLinear(_Emulated, ColumnParallelLinear):
    """Megatron's column-parallel layer with FP8 operands."""


class EmulatedRowLinear(_Emulated, RowParallelLinear):
    """Megatron's row-parallel layer with FP8 operands."""


_KINDS: dict[type, type] = {ColumnParallelLinear: EmulatedColumnLinear, RowParallelLinear: EmulatedRowLinear}


def emulate_fp8(model: torch.nn.Module, precision: PrecisionConfig) -> list[str]:
    """Make a decoder's linear layers emulated ones, in place: their specs do not know which layer they are in.

    Args:
        model: A GPT or Mamba model on Megatron's own linear layers.
        precision: Recipe, format, and which layers stay in bf16.

    Returns:
        Names of the layers that are emulated.

    Raises:
        InputError: If the recipe cannot go together with the model's recomputation.
    """
    config: Any = model.config
    check_recomputation(precision, config.recompute_granularity, config.recompute_modules)
    done = []
    for layer in model.decoder.layers:  # type: ignore[union-attr]
        if is_first_last_bf16_layer(config, layer.layer_number - 1):
            continue
        for name, module in layer.named_modules():
            kind = _KINDS.get(type(module))
            if kind is not None:
                module.__class__ = kind
                module.quantiser = Quantiser(precision, module.weight.device)
                done.append(f"layers.{layer.layer_number - 1}.{name}")
    return done


def delayed_scales(model: torch.nn.Module) -> dict[str, DelayedScale]:
    """The delayed recipe's scales by layer and role, in the order of the layers; empty with another recipe."""
    return {
        f"{name}.{role}": scale
        for name, module in model.named_modules()
        if isinstance(module, _Emulated)
        for role, scale in module.quantiser.delayed.items()
    }
