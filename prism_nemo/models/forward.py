"""Forward passes without training: logits through any layout, hidden states of every layer."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from prism_nemo.models.decoder import LanguageModel


def positions(tokens: torch.Tensor) -> torch.Tensor:
    """Position ids 0..s-1 for [b, s] tokens."""
    return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)


@torch.no_grad()
def forward_logits(model: LanguageModel, tokens: torch.Tensor) -> torch.Tensor | None:
    """Logits of a batch, through tensor- and pipeline-parallel ranks.

    Args:
        model: This rank's part.
        tokens: [b, s], the same on every rank.

    Returns:
        [b, s, padded vocabulary] in fp32 on the ranks of the last pipeline stage, None on others.
    """
    training = model.training
    model.eval()

    def step(_: Any, chunk: LanguageModel) -> tuple[torch.Tensor, Any]:
        output = chunk(tokens, positions(tokens), None)
        return output, lambda out, non_loss_data=False: out

    outputs = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=None,
        model=[model],
        num_microbatches=1,
        seq_length=tokens.shape[1],
        micro_batch_size=tokens.shape[0],
        forward_only=True,
        collect_non_loss_data=True,
    )
    model.train(training)
    if not parallel_state.is_pipeline_last_stage():
        return None
    return gather_from_tensor_model_parallel_region(outputs[0]).float()


@torch.no_grad()
def hidden_states(model: LanguageModel, tokens: torch.Tensor) -> list[torch.Tensor]:
    """The residual stream after the embedding and after each layer (TP 1, PP 1).

    Args:
        model: The whole model.
        tokens: [b, s].

    Returns:
        num_layers + 1 tensors of [b, s, hidden], the last one before the final norm.
    """
    states: list[torch.Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        states.append(tensor.detach().transpose(0, 1))

    hooks = [model.embedding.register_forward_hook(keep)]
    hooks += [layer.register_forward_hook(keep) for layer in model.decoder.layers]
    training = model.training
    model.eval()
    try:
        model(tokens, positions(tokens), None)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    return states
