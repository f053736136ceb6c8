"""The decoder computes the function that training computes, and samples from it.

The decoder is a second implementation of the model's forward pass; whatever they disagree on, RL learns from. So every
token and every log-probability is compared with a full forward of the training model, not with itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from generation_workers import (
    against_full_forward,
    first_tokens,
    in_one_process,
    lengths,
    repeats,
    stopped_at_each_place,
)
from tiny_models import hf_model, save_tiny
from tiny_training import write_llama

from prism_nemo.config import ParallelConfig
from prism_nemo.errors import InputError
from prism_nemo.generation.choose import restrict
from prism_nemo.runtime.launch import launch

MODELS: dict[str, dict[str, Any]] = {
    "grouped, tied, vocabulary 255": {},
    "multi-head, untied": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "head_dim 24, untied, vocabulary 101": {"head_dim": 24, "tie_word_embeddings": False, "vocab_size": 101},
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        },
        "rope_theta": None,
    },
}  # fmt: skip
# One of each other family; their states and windows are what a decoder can get wrong.
FAMILIES = ("mistral-window", "granite", "granite-4", "granite-hybrid", "granite-hybrid-one-group", "nemotron-h")
NAMES = [*MODELS, *FAMILIES]
# Those that are also cut over two ranks here: a padded vocabulary, tied and not. test_engine.py cuts the families.
SPLIT = (0, 2)
# By tensor-parallel size and model.
Compared = dict[int, dict[int, dict[str, Any]]]
# Lengths 1 to 17, so that a row has up to 16 places of padding on its left.
PROMPTS = [[(7 * i + 3 * j) % 97 + 4 for j in range(n)] for i, n in enumerate((5, 1, 17, 9, 2, 17))]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Weights of deviation 0.12 instead of 0.02, so that responses vary; larger ones amplify rounding beyond 1e-5."""
    root = tmp_path_factory.mktemp("models")
    llamas = [
        write_llama(root / str(i), seed=i + 20, std=0.12, **{k: v for k, v in changes.items() if v is not None})
        for i, changes in enumerate(MODELS.values())
    ]
    return llamas + [save_tiny(case, root / case) for case in FAMILIES]


@pytest.fixture(scope="session")
def compared(models: list[Path]) -> Compared:
    """Per tensor-parallel size, the comparison for each model; over two ranks, of those in SPLIT."""
    paths = [str(path) for path in models]
    split = [paths[model] for model in SPLIT]
    return {
        1: dict(enumerate(launch(against_full_forward, paths, ParallelConfig(), PROMPTS, 20))),
        2: dict(
            zip(SPLIT, launch(against_full_forward, split, ParallelConfig(2), PROMPTS, 20, processes=2), strict=True)
        ),
    }


@pytest.mark.parametrize(
    ("model", "tp"), [*((model, 1) for model in range(len(NAMES))), *((model, 2) for model in SPLIT)]
)
def test_every_token_equals_a_full_forward(model: int, tp: int, compared: Compared) -> None:
    found = compared[tp][model]
    assert found["greedy"]["wrong"] == 0
    assert found["greedy"]["prompts"] == PROMPTS
    # Rounding is 1e-6; with a closer race than this the comparison of tokens would be one of rounding.
    assert found["greedy"]["lead"] > 1e-4
    for mode, samples in (("greedy", 1), ("sampled", 3), ("hot", 2)):
        assert found[mode]["count"] == samples * len(PROMPTS)
        assert found[mode]["logprob_diff"] < 1e-5, mode


@pytest.mark.parametrize("model", SPLIT)
def test_tensor_parallel_ranks_write_what_one_process_writes(model: int, compared: Compared) -> None:
    assert compared[2][model]["tokens"] == compared[1][model]["tokens"]
    assert compared[2][model]["sampled"]["lengths"] == compared[1][model]["sampled"]["lengths"]


@pytest.mark.parametrize("model", range(len(NAMES)), ids=NAMES)
def test_equals_transformers_generate(model: int, models: list[Path], compared: Compared) -> None:
    reference: Any = hf_model(models[model]).eval()
    for prompt, tokens in zip(PROMPTS, compared[1][model]["tokens"], strict=True):
        row = torch.tensor([prompt])
        written = reference.generate(
            row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=20,
            eos_token_id=compared[1][model]["stop"],
            pad_token_id=0, bos_token_id=None,
        )  # fmt: skip
        assert written[0, len(prompt) :].tolist() == tokens


@pytest.mark.parametrize("model", range(len(NAMES)), ids=NAMES)
def test_a_prompt_alone_and_in_a_batch(model: int, compared: Compared) -> None:
    """Neither padding nor neighbours nor rows that leave the batch change a response."""
    found = compared[1][model]
    for (tokens, logprobs), batch_tokens, batch_logprobs in zip(
        found["alone"], found["tokens"], found["logprobs"], strict=True
    ):
        assert tokens == batch_tokens
        assert logprobs == pytest.approx(batch_logprobs, abs=1e-5)


def test_the_stop_token_ends_a_response(compared: Compared) -> None:
    """It is kept as the last token and appears nowhere else; a response without it has the full length."""
    finished = cut = 0
    for found in [model for models in compared.values() for model in models.values()]:
        for mode in ("greedy", "sampled", "hot"):
            part = found[mode]
            assert part["stops_inside"] == 0
            for length, end, done in zip(part["lengths"], part["ends"], part["finished"], strict=True):
                assert done == (end == found["stop"])
                assert done or length == 20
                assert length <= 20
                finished, cut = finished + done, cut + (not done)
    assert finished > 10
    assert cut > 10


def test_the_stop_token_may_come_first_and_last(models: list[Path]) -> None:
    """The token that greedy decoding writes at some place becomes the stop token."""
    free, stopped, cut = launch(in_one_process, str(models[0]), stopped_at_each_place, PROMPTS, 4)
    assert {0, 3} <= set(stopped)
    for place, response in stopped.items():
        assert response.tokens == free[0].tokens[: place + 1]
        assert response.finished
        assert len(response.logprobs) == place + 1
    assert [r.tokens for r in cut] == [r.tokens[:1] for r in free]
    assert not any(r.finished for r in cut)


def test_samples_per_prompt_equals_repeating_the_prompt(models: list[Path]) -> None:
    counted, repeated = launch(in_one_process, str(models[0]), repeats, PROMPTS, 4)
    assert counted == repeated
    assert len({tuple(tokens) for _, tokens, _ in counted[:4]}) > 1  # samples of a prompt differ


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.5, 1.0), (1.0, 0.7), (0.8, 0.5)])
def test_first_tokens_follow_the_softmax(temperature: float, top_p: float, models: list[Path]) -> None:
    """Chi-square of 6000 draws, tokens expected fewer than 5 times put together; the seed is fixed.

    The limit is the mean plus six deviations of a chi-square variable (k + 6 sqrt(2k)): a right sampler misses it about
    once in a hundred thousand seeds, while the wrong temperature misses it a hundredfold.
    """
    counts, logits = launch(in_one_process, str(models[2]), first_tokens, PROMPTS[0], 6000, temperature, top_p)
    wanted = (logits.double() / temperature).softmax(-1)
    if top_p < 1:
        order = wanted.argsort(descending=True)
        size = int((wanted[order].cumsum(0) < top_p).sum()) + 1  # the token that crosses top_p belongs to the set
        allowed = torch.zeros_like(wanted, dtype=torch.bool)
        allowed[order[:size]] = True
        assert 1 < size < len(wanted)
        assert not counts[~allowed].any()
        wanted = torch.where(allowed, wanted, 0.0) / wanted[allowed].sum()
    expected = wanted * 6000
    often = expected >= 5
    seen = torch.cat([counts[often].double(), counts[~often].sum()[None].double()])
    due = torch.cat([expected[often], expected[~often].sum()[None]])
    seen, due = seen[due > 0], due[due > 0]
    freedom = len(due) - 1
    assert freedom >= 3
    assert ((seen - due) ** 2 / due).sum().item() < freedom + 6 * (2 * freedom) ** 0.5


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.01, {2}), (0.49, {2}), (0.51, {2, 0}), (0.79, {2, 0}), (0.81, {2, 0, 3}), (0.99, {0, 1, 2, 3})],
)
def test_nucleus_keeps_the_smallest_set_with_the_token_that_crosses(top_p: float, kept: set[int]) -> None:
    weights = 7 * torch.tensor([[0.3, 0.05, 0.5, 0.15], [0.05, 0.15, 0.3, 0.5]])
    inside = restrict(weights, [0, 0], [top_p, top_p])
    assert set(inside[0].nonzero()[:, 0].tolist()) == kept
    assert inside[1].count_nonzero() == len(kept)  # each row has its own set
    assert inside[0][inside[0] > 0].tolist() == weights[0][inside[0] > 0].tolist()


def test_a_response_that_cannot_fit_is_refused(models: list[Path]) -> None:
    """Beyond its positions a model computes something, and nothing that it was trained for."""
    with pytest.raises(InputError, match=r"a prompt of 3 tokens and max_new_tokens \d+ do not fit"):
        launch(in_one_process, str(models[0]), lengths, [[1, 2, 3]], 100_000, 0)
