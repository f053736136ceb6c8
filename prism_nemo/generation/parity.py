"""Where sampler and trainer part: the residual stream of both after each layer, on the same tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from prism_nemo.errors import InputError
from prism_nemo.generation.decode import Decoder
from prism_nemo.models.decoder import LanguageModel
from prism_nemo.models.forward import forward_logits


@torch.no_grad()
def layer_gaps(model: LanguageModel, tokens: list[int]) -> list[tuple[str, float]]:
    """Largest difference per layer between the training forward pass and the decoder.

    The decoder reads the first half of the tokens as a prompt and adds the others one by one, as in a rollout. A layer
    that computes something else shows as the first gap beyond rounding; those after it inherit its error.

    Args:
        model: This rank's part; every rank of the model-parallel group calls this with the same tokens.
        tokens: Ids of one sequence, two or more; with sequence parallelism as many as its ranks can share.

    Returns:
        (name, gap) of "embedding", each "decoder.layers.i" counted over all stages, and "output_layer" (the logits);
        the same on every rank.

    Raises:
        InputError: For fewer than two tokens.
    """
    if len(tokens) < 2:
        raise InputError(f"layer_gaps needs two tokens or more, one to read and one to add; got {len(tokens)}")
    trained, logits = _trained(model, tokens)
    decoded, last = _decoded(model, tokens)
    gaps = {name: _gap(trained[name], decoded[name]) for name in trained}
    if logits is not None and last is not None:
        gaps["output_layer"] = _gap(logits[-len(last) :, : last.shape[1]], last)
    group = parallel_state.get_model_parallel_group()
    everyone: list[dict[str, float]] = [gaps] * group.size()
    if group.size() > 1:
        dist.all_gather_object(everyone, gaps, group=group)
    found: dict[str, float] = {}
    for part in everyone:  # stage by stage, so in the order of the layers
        for name, gap in part.items():
            found[name] = max(gap, found.get(name, 0.0))
    return [(name, found[name]) for name in sorted(found, key=_place)]


def _place(name: str) -> tuple[int, int]:
    if name.startswith("decoder.layers."):
        return 1, int(name.rsplit(".", 1)[1])
    return (0, 0) if name == "embedding" else (2, 0)


def _gap(a: torch.Tensor, b: torch.Tensor) -> float:
    gap = (a.float() - b.float()).abs().max().item()
    return gap if gap == gap else float("inf")  # not a number: max() would lose it


def _trained(model: LanguageModel, tokens: list[int]) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """Residual stream [s, h] by name, and on the last stage the logits [s, vocab]."""
    states: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            x = output[0] if isinstance(output, tuple) else output
            if model.config.sequence_parallel:
                x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False)
            states[name] = x[:, 0].clone()

        return hook

    layers = model.decoder.layers
    hooks = [layer.register_forward_hook(keep(f"decoder.layers.{layer.layer_number - 1}")) for layer in layers]
    if model.pre_process:
        hooks.append(model.embedding.register_forward_hook(keep("embedding")))
    device = next(model.parameters()).device
    try:
        logits = forward_logits(model, torch.tensor([tokens], device=device))
    finally:
        for hook in hooks:
            hook.remove()
    return states, None if logits is None else logits[0]


def _decoded(model: LanguageModel, tokens: list[int]) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """The same from the decoder; on one rank the logits from the prompt's last token on."""
    parts: dict[str, list[torch.Tensor]] = {}
    passed: dict[str, torch.Tensor] = {}

    def see(name: str, x: torch.Tensor) -> None:
        passed[name] = x.view(-1, x.shape[-1]).clone()  # a transformer's layer is seen twice; the second is its end

    decoder = Decoder(model)
    decoder.observe = see
    prompt = len(tokens) // 2
    logits, memories = decoder.prefill([tokens[:prompt]])
    caches = decoder.caches(1, len(tokens))
    for cache, memory in zip(caches, memories, strict=True):
        cache.fill(memory, torch.zeros(1, dtype=torch.long, device=decoder.like.device), 0)
    rows = [logits]
    for position in range(prompt, len(tokens) + 1):
        for name, x in passed.items():
            parts.setdefault(name, []).append(x)
        if position < len(tokens):
            rows.append(decoder.step([tokens[position]], [position], caches, 1))
    for message in decoder.take_sent():
        message.wait()
    states = {name: torch.cat(part) for name, part in parts.items()}
    return states, torch.cat([row for row in rows if row is not None]) if decoder.has_logits else None
