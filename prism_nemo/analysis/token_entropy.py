"""Exact entropy of the next token, and what a model gave the token that came, at every place of given texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prism_nemo.analysis.token_rows import equal_length_batches
from prism_nemo.errors import PrismError
from prism_nemo.models.decoder import LanguageModel
from prism_nemo.models.forward import positions

# Logits that are held at a time, and of those in fp64.
_LOGITS = 2**26
_EXACT = 2**22


@dataclass(frozen=True)
class Asked:
    """A text, and where its part begins that is asked about.

    Attributes:
        tokens: Token ids.
        first: Place of the first token that is asked about, at least 1; the others follow up to the end.
    """

    tokens: list[int]
    first: int


@dataclass(frozen=True)
class Told:
    """By token that was asked about, in nats.

    Attributes:
        entropy: Of the distribution that the token is drawn from, over the whole vocabulary, at temperature 1.
        nll: Negative log-likelihood of the token.
    """

    entropy: list[float]
    nll: list[float]


@torch.no_grad()
def token_entropies(model: LanguageModel, rows: Sequence[Asked]) -> list[Told]:
    """Entropy and negative log-likelihood of every token that is asked about.

    Texts of equal length share a forward pass, so nothing is padded. The softmax is taken in fp64.

    Args:
        model: Whole on this rank.
        rows: At least one token of each is asked about.

    Returns:
        In the order of the rows.

    Raises:
        ValueError: For a row without a token before the first one asked about, or with none asked about.
        PrismError: If logits are not finite.
    """
    for number, row in enumerate(rows):
        if not 1 <= row.first < len(row.tokens):
            raise ValueError(f"row {number}: of {len(row.tokens)} tokens those from {row.first} on are asked about")
    vocabulary, device = model.architecture.vocab_size, next(model.parameters()).device
    found: list[Told | None] = [None] * len(rows)
    # The last token is asked about but not read.
    batches = equal_length_batches([row.tokens[:-1] for row in rows], max(1, _LOGITS // vocabulary))
    for places, batch in batches:
        tokens = batch.to(device)
        logits = model(tokens, positions(tokens), None)[..., :vocabulary]
        for own, place in zip(logits, places, strict=True):
            row = rows[place]
            # What is said at a place is about the token after it.
            found[place] = _told(own[row.first - 1 :], row.tokens[row.first :])
    return [told for told in found if told is not None]


def _told(logits: torch.Tensor, tokens: list[int]) -> Told:
    entropy: list[float] = []
    nll: list[float] = []
    size = max(1, _EXACT // logits.shape[-1])
    for first in range(0, len(tokens), size):
        scores = logits[first : first + size].double().log_softmax(dim=-1)
        if not bool(torch.isfinite(scores).all()):
            raise PrismError("logits are not finite; the weights have diverged or overflow in this precision")
        wanted = torch.tensor(tokens[first : first + size], device=scores.device).unsqueeze(-1)
        entropy += (-(scores.exp() * scores).sum(dim=-1)).tolist()
        nll += (-scores.gather(-1, wanted).squeeze(-1)).tolist()
    return Told(entropy, nll)
