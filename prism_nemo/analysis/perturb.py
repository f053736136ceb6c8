"""The null model of representations: a model moved as far as another one is away, in a random direction."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from prism_nemo.models.decoder import LanguageModel
from prism_nemo.models.family import table_of
from prism_nemo.models.names import actual_name
from prism_nemo.models.weights import expand


@torch.no_grad()
def move_randomly(model: LanguageModel, relative: Mapping[str, float], seed: int) -> float:
    """Add Gaussian noise to every weight tensor, of a given norm relative to the tensor's own.

    What is left of CKA after this is what any update of that size leaves: likeness above it is no sign of what training
    learned or kept.

    Args:
        model: Whole on this rank; changed in place.
        relative: By Hugging Face tensor name, ||update|| / ||weights||; tensors that are not named stay.
        seed: Of the direction; with the name of a tensor it decides that tensor's noise, whatever the order or device.

    Returns:
        The distance that was moved relative to the norm of all weights. In bf16 it differs from what was asked for:
        changes below half of a weight's spacing are lost, as they are for any update.
    """
    parameters = dict(model.named_parameters())
    moved = before = 0.0
    for mapping, layer in expand(table_of(model.architecture)):
        name, targets = mapping.at(layer)
        parameter = parameters[actual_name(name, parameters)]
        tensors = []
        for target, tensor in zip(targets, mapping.to_hf(parameter.detach().clone()), strict=True):
            old = tensor.float().cpu()
            noise = torch.randn(old.shape, generator=_generator(target, seed))
            length = relative.get(target, 0.0) * float(old.double().norm()) / float(noise.double().norm())
            new = (old + length * noise).to(parameter.dtype)
            moved += float((new.double() - old.double()).square().sum())
            before += float(old.double().square().sum())
            tensors.append(new)
        parameter.copy_(mapping.to_megatron(tuple(tensors)))
    return (moved / before) ** 0.5


def _generator(name: str, seed: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
