"""What the tests of scoring run in processes of their own."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from generation_workers import load_model

from prism_nemo.config import ParallelConfig
from prism_nemo.errors import PrismError
from prism_nemo.generation import score as module
from prism_nemo.generation.passes import Pass
from prism_nemo.generation.score import Row, Scored, score_rows
from prism_nemo.models.decoder import LanguageModel
from prism_nemo.models.forward import forward_logits
from prism_nemo.runtime import start, stop

# (log-probabilities, whether greedy, log-probabilities of the tokens one place further) by a full forward.
Reference = tuple[list[float], bool, list[float]]


def full_forward(model: LanguageModel, row: Row) -> Reference:
    """One row by itself, in the training model's own forward pass, softmax in fp64 over the real vocabulary."""
    logits = forward_logits(model, torch.tensor([row.tokens]))
    assert logits is not None
    scores = logits[0, :, : model.architecture.vocab_size].double().log_softmax(-1)
    wanted = torch.tensor(row.tokens[row.first :])

    def of(first: int) -> torch.Tensor:
        return scores[first : first + len(wanted)].gather(-1, wanted[:, None])[:, 0]

    greedy = bool((scores[row.first - 1 : -1].argmax(-1) == wanted).all())
    return of(row.first - 1).tolist(), greedy, of(row.first).tolist()


def against_forward(
    hf_dirs: list[str], rows: list[Row], limits: list[int | None]
) -> list[tuple[list[list[Scored]], list[Reference], list[tuple[list[int], int]]]]:
    """By model: for each limit what was scored; the reference; and by limit, tokens of each pass and rows of logits."""
    runtime = start(ParallelConfig(), seed=0)
    found = []
    right = module.plan
    for hf_dir in hf_dirs:
        model = load_model(hf_dir, runtime)
        scored, read = [], []
        for limit in limits:
            passes: list[Pass] = []

            def seen(*args: Any, passes: list[Pass] = passes) -> Pass:
                passes.append(right(*args))
                return passes[-1]

            module.plan = seen
            scored.append(score_rows(model, rows, limit))
            module.plan = right
            read.append(([len(one.tokens) for one in passes], sum(len(one.scored) for one in passes)))
        found.append((scored, [full_forward(model, row) for row in rows], read))
    stop()
    return found


@torch.no_grad()
def in_layout(hf_dirs: list[str], parallel: ParallelConfig, rows: list[Row], limit: int) -> list[list[list[Scored]]]:
    """By rank and model, what was scored, with padding of the vocabulary that would win if it took part."""
    runtime = start(parallel, seed=0)
    found = []
    for hf_dir in hf_dirs:
        model = load_model(hf_dir, runtime)
        if parallel.tensor_model_parallel_size > 1 and hasattr(model, "output_layer"):
            weight = getattr(model.output_layer, "weight", None)
            if weight is not None and weight.shape[0] > model.real_rows:
                weight[model.real_rows :] = 10 * weight[:1]
        found.append(score_rows(model, rows, limit))
    everyone: list[Any] = [None] * runtime.world_size
    dist.all_gather_object(everyone, found)
    stop()
    return everyone


def _best_and_worse(model: LanguageModel, row: Row) -> tuple[bool, bool]:
    """Whether the model's own first choices after a row's context are greedy, and with the last of them replaced."""
    tokens = list(row.tokens[: row.first])
    for _ in range(3):
        logits = forward_logits(model, torch.tensor([tokens]))
        assert logits is not None
        tokens.append(int(logits[0, -1, : model.architecture.vocab_size].argmax()))
    other = [*tokens[:-1], (tokens[-1] + 1) % model.architecture.vocab_size]
    best, worse = score_rows(model, [Row(tokens, row.first), Row(other, row.first)])
    return best.greedy, worse.greedy


@torch.no_grad()
def special_cases(
    hf_dir: str, rows: list[Row], equal: list[Row]
) -> tuple[list[tuple[bool, bool]], list[Scored], str, list[Scored]]:
    """See `_best_and_worse`; what is scored where every logit is 0; what is said of NaN; and what of nothing."""
    model = load_model(hf_dir, start(ParallelConfig(), seed=0))
    greedy = [_best_and_worse(model, row) for row in rows]
    norm = next(p for name, p in model.named_parameters() if "final" in name)
    norm.zero_()
    level = score_rows(model, equal)
    norm.fill_(float("nan"))
    said = "accepted"
    try:
        score_rows(model, rows)
    except PrismError as error:
        said = str(error)
    nothing = score_rows(model, [])
    stop()
    return greedy, level, said, nothing
