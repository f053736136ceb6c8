"""Verification cards: what was verified for a model, with which command, when, and what was not.

A card is YAML that people may add to. Writing one changes the entries of the checks that were run and leaves the rest
as it is.
"""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Any

import yaml

from prism_nemo.checkpoint.verification import Verification
from prism_nemo.config import ParallelConfig
from prism_nemo.errors import InputError
from prism_nemo.run import versions

_SECTIONS = ("verified", "failed", "not_verified")
# What `verify` cannot say. An entry that someone else has verified, by hand or by a test, moves it to `verified`.
_NOT_VERIFIED = {
    "gradients": "verify forwards both models and computes no gradients",
    "training": "verify does not train",
    "bfloat16 logits": "logits are compared in float32",
}


class _Plain(yaml.SafeDumper):
    """Writes a value that stands in two entries twice: people edit cards, and an alias would tie the entries."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def read_card(path: Path) -> dict[str, Any]:
    """A card, or an empty one where there is none.

    Raises:
        InputError: If the file is not one.
    """
    if not path.is_file():
        return {}
    try:
        card = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(card, dict) or not all(isinstance(card.get(s, {}), dict) for s in _SECTIONS):
        raise InputError(f"{path}: not a verification card")
    return card


def entries(result: Verification, layout: ParallelConfig, command: str) -> dict[str, tuple[bool, dict[str, Any]]]:
    """By check: whether it passed, and what a card says about it."""
    common = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "device": result.device,
        "versions": versions(),
    }
    weights: dict[str, Any] = {"tensors": result.tensors, "different": result.different_tensors[:10]}
    if result.cast:
        weights["compared_after"] = result.cast
    logits: dict[str, Any] = {
        "rms_difference": float(f"{result.rms_logit_diff:.3g}"),
        "rms_tolerance": float(f"{result.rms_tolerance:.3g}"),
        "largest_difference": float(f"{result.max_abs_logit_diff:.3g}"),
        "largest_tolerance": float(f"{result.tolerance:.3g}"),
        "standard_deviation": float(f"{result.logit_std:.4g}"),
        "same_top_token": result.argmax_agreement,
        "tokens": result.tokens,
    }
    if result.notes:
        logits["notes"] = result.notes
    name = f"logits at TP {layout.tensor_model_parallel_size}, PP {layout.pipeline_model_parallel_size}"
    return {
        "weights bit for bit": (not result.different_tensors, {**common, "figures": weights}),
        name: (result.same_function, {**common, "figures": logits}),
    }


def write_card(path: Path, model: str, family: str, result: Verification, layout: ParallelConfig, command: str) -> None:
    """Add a verification to a card, or start one.

    Args:
        path: The card.
        model: Name of the model.
        family: Its family.
        result: Of the verification.
        layout: In which it ran.
        command: That ran it.

    Raises:
        InputError: If the file is no card, or one of another model.
    """
    card = read_card(path)
    for key, value in (("model", model), ("family", family)):
        if card.setdefault(key, value) != value:
            raise InputError(f"{path}: is the card of {key} '{card[key]}', not of '{value}'")
    sections: dict[str, dict[str, Any]] = {name: dict(card.get(name) or {}) for name in _SECTIONS}
    for check, (passed, entry) in entries(result, layout, command).items():
        for section in sections.values():
            section.pop(check, None)
        sections["verified" if passed else "failed"][check] = entry
    for check, reason in _NOT_VERIFIED.items():
        if check not in sections["verified"] and check not in sections["failed"]:
            sections["not_verified"].setdefault(check, reason)
    ordered = {"model": card["model"], "family": card["family"]}
    ordered.update({name: dict(sorted(section.items())) for name, section in sections.items() if section})
    ordered.update({key: value for key, value in card.items() if key not in ordered and key not in _SECTIONS})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.write_text(yaml.dump(ordered, Dumper=_Plain, sort_keys=False, allow_unicode=True, width=100))
    os.replace(temporary, path)
