"""The vLLM engine, with a stand-in for vLLM that computes with transformers; slow ones with the published vLLM."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import engine_vllm_published as published
import engine_vllm_workers as stand_in
import pytest
import torch
from tiny_models import hf_model, save_tiny
from tiny_training import character_tokenizer

from prism_nemo.config import ParallelConfig
from prism_nemo.errors import InputError
from prism_nemo.evaluation.engines import vllm as module
from prism_nemo.evaluation.engines.contract import Continuation
from prism_nemo.evaluation.engines.open import find_model
from prism_nemo.generation import vllm as rollout_module
from prism_nemo.generation.requests import Request, SamplingParams
from prism_nemo.runtime.launch import launch

CONTINUATIONS = [
    Continuation([3, 4, 5], [6]),
    Continuation([3, 4, 5], [7, 8, 9]),
    Continuation([(7 * i) % 149 for i in range(140)], [1, 2]),  # longer than the model: cut
    Continuation([9], [10, 11]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    character_tokenizer(save_tiny("llama", root / "hf", head_dim=32))
    return root / "hf"


def written_by_transformers(folder: Path, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens after a prompt."""
    tokens = torch.tensor([prompt])
    for _ in range(count):
        best = hf_model(folder)(tokens).logits[0, -1].argmax()
        tokens = torch.cat([tokens, best.reshape(1, 1)], 1)
    return tokens[0, len(prompt) :].tolist()


def requests() -> list[Request]:
    """Greedy ones, most of which come to a letter, and stop there."""
    return [Request([3 + i, 4, 5], SamplingParams(8, 0.0, stop_texts=tuple(string.ascii_lowercase))) for i in range(12)]


@pytest.mark.parametrize(
    "both",
    [
        pytest.param(stand_in.both, id="stand-in"),
        pytest.param(published.both, id="published", marks=[pytest.mark.slow, published.vllm_published.needed]),
    ],
)
@pytest.mark.parametrize("layout", [ParallelConfig(), ParallelConfig(2)], ids=lambda p: p.describe())
def test_it_answers_as_our_engine_does(layout: ParallelConfig, both: Any, folder: Path, tmp_path: Path) -> None:
    """Greedy, also up to a stop text, which vLLM is not told; log-probabilities within rounding of two programs.

    vLLM has to write a token after what it scores: two tokens fewer than the model has positions.
    """
    likeliest = Continuation([3, 4, 5], written_by_transformers(folder, [3, 4, 5], 2))
    asked = [*CONTINUATIONS, likeliest]
    args = (str(folder), str(folder), str(tmp_path / "vllm"), requests(), asked, layout)
    (written, scored), (our_written, our_scored), longest = launch(both, *args, processes=layout.world_size)
    assert longest == 126
    assert [(r.tokens, r.finished) for r in written] == [(r.tokens, r.finished) for r in our_written]
    assert {r.finished for r in written} == {True, False}
    for i, (own, other) in enumerate(zip(scored, our_scored, strict=True)):
        if i != 2:  # it was cut at another length
            assert own.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert (own.tokens, own.greedy) == (other.tokens, other.greedy)
    assert [likelihood.greedy for likelihood in scored] == [False, False, False, False, True]


def test_scores_that_are_not_what_was_asked_are_errors(folder: Path, tmp_path: Path) -> None:
    args = (str(folder), str(folder), str(tmp_path / "vllm"), requests(), CONTINUATIONS, ParallelConfig())
    lost, without = launch(stand_in.faulty, *args)
    assert "vLLM gave 3 answers to 4 rows" in lost
    assert "not to its" in without


def test_without_the_package_or_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_present", lambda package: False)
    with pytest.raises(InputError, match=r"engine: vllm is not installed; pip install .* engine=megatron"):
        find_model(folder, "vllm")
    monkeypatch.setattr(module, "is_present", lambda package: True)
    monkeypatch.setattr(module, "capability", lambda: None)
    with pytest.raises(InputError, match=r"engine: vllm needs a CUDA device .* engine=megatron"):
        find_model(folder, "vllm")


def test_a_length_that_vllm_cannot_score_is_refused_before_it_starts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in (module, rollout_module):
        monkeypatch.setattr(place, "is_present", lambda package: True)
        monkeypatch.setattr(place, "capability", lambda: (9, 0))
    assert find_model(folder, "vllm", max_length=126).max_length == 126
    with pytest.raises(InputError, match="max_length: 127 is more than the 126 tokens"):
        find_model(folder, "vllm", max_length=127)
